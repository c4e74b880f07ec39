"""What a reader of a run wants to know besides its options: data, model, versions, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import shlex
import sys
from typing import Any

PACKAGES = ("rlcore", "torch", "triton", "transformers", "accelerate", "peft", "datasets")


def facts_of(model: Any, rows: int | None) -> dict[str, Any]:
    """{"started", "command", "versions", "model", "parameters", "trained_parameters", "rows"}."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": _versions(),
        "model": type(model).__name__,
        # one byte holds two of those in 4 bit
        "parameters": model.num_parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "rows": rows,
    }


def _command() -> str:
    """The command line where one started the run, "" where a program of the user's did."""
    program, *words = sys.argv or [""]
    if "rlcore" not in program:
        return ""
    return shlex.join(["rlcore", *words])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_words(count: float) -> str:
    """A number of parameters: 0.34M, 7.6B."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size / 10:
            return f"{count / size:.3g}{unit}"
    return f"{count / 1e3:.3g}k"
