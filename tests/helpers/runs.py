"""Whole runs in a fraction of a second, to stop, resume and overwrite."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.tiny import save_tiny
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.sft import SFTConfig

ROWS = [{"prompt": f"{n}+1", "completion": f" {n + 1}", "answer": str(n)} for n in range(12)]


def write_rows(path: Path, rows: list[dict] = ROWS) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def sft_config(directory: Path, **changes: Any) -> SFTConfig:
    """Four steps on twelve rows, with dropout, so that random states count."""
    model = directory / "model"
    if not model.is_dir():
        save_tiny(model, initializer_range=0.05, attention_dropout=0.1)
    options = dict(
        model=str(model),
        dataset=write_rows(directory / "rows.jsonl"),
        output_dir=str(directory / "run"),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=0,
    )
    return SFTConfig(**options | changes)


def grpo_config(directory: Path, **changes: Any) -> GRPOConfig:
    """The same as a GRPO run whose generation batch serves two steps."""
    sft = sft_config(directory)
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    shared = {name: value for name, value in vars(sft).items() if name in names}
    options = dict(num_generations=4, num_iterations=2, max_completion_length=4)
    return GRPOConfig(**shared | options | changes)


def digits(prompts: list, completions: list, **_: Any) -> list[float]:
    return [float(sum(map(str.isdigit, text))) for text in completions]


def train_with_digits(config: GRPOConfig) -> Any:
    return train_grpo(config, reward_funcs=[digits])


def content(directory: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file below `directory`, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def killed(action: Callable[[], Any]) -> int:
    """Do it in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
