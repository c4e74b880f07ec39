"""A finished or running run, read from its output directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlcore.errors import UserError
from rlcore.runs.figures import higher_is_better
from rlcore.runs.output_dir import COMPLETIONS_FILE, CONFIG_FILE, METRICS_FILE
from rlcore.runs.run_record import read_record
from rlcore.runs.tracking import read_metrics

# what one decides by, the first that a run has
DECISIVE = ("eval/reward", "eval/accuracy", "eval/loss", "reward", "loss")


@dataclass(frozen=True)
class RunFiles:
    """What stands in a run's directory."""

    directory: Path
    trainer: str  # the class of its options: "GRPOConfig"
    options: dict[str, Any]
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl, each with "step"
    completions: list[dict[str, Any]]  # lines of completions.jsonl
    facts: Mapping[str, Any]  # of its record: rows, model, versions, command, notes

    @property
    def names(self) -> list[str]:
        """Every metric's name, in the order of appearance."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in names if name != "step"]

    def course(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, where it is a finite number."""
        return [
            (line["step"], line[name])
            for line in self.metrics
            if isinstance(line.get(name), int | float) and math.isfinite(line[name])
        ]

    def best(self, name: str) -> tuple[int, float] | None:
        """(step, value) of its best; the earliest of equal ones, None without a value."""
        sign = 1 if higher_is_better(name) else -1
        return max(self.course(name), key=lambda pair: (sign * pair[1], -pair[0]), default=None)


def read_run(directory: str | Path) -> RunFiles:
    """The run in `directory`.

    Raises:
        UserError: no run there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no run at {str(directory)!r}: there is no such directory")
    if not (directory / METRICS_FILE).is_file() or not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"no run at {str(directory)!r}: it has no {METRICS_FILE} and {CONFIG_FILE}; name the "
            "output_dir of a training run"
        )
    record, completions = read_record(directory), directory / COMPLETIONS_FILE
    return RunFiles(
        directory,
        record.trainer if record else "",
        yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8")) or {},
        read_metrics(directory / METRICS_FILE),
        read_metrics(completions) if completions.is_file() else [],
        record.facts if record else {},
    )


def decisive_metric(runs: Sequence[RunFiles]) -> str | None:
    """The first of DECISIVE that all runs have, else that one has; None without any."""
    for wanted in (all, any):
        for name in DECISIVE:
            if wanted(name in run.names for run in runs):
                return name
    return None
