"""Experiment trackers beside metrics.jsonl, through accelerate's own: `report_to`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlcore.errors import UserError, unknown_name
from rlcore.runs.samples import Sample

PROJECT = "rlcore"
# What each tracker is started with: (directory, run's name, run's id) -> its options. The same id
# makes a resumed run go on as the same run.
TRACKERS: dict[str, Callable[[Path, str, str], dict[str, Any]]] = {
    "tensorboard": lambda directory, name, id: {
        "run_name": "tensorboard", "logging_dir": str(directory),
    },
    "wandb": lambda directory, name, id: {
        "run_name": PROJECT, "name": name, "dir": str(directory), "id": id, "resume": "allow",
    },
    "trackio": lambda directory, name, id: {"run_name": PROJECT, "name": name, "resume": "allow"},
    "mlflow": lambda directory, name, id: {"experiment_name": PROJECT, "run_name": name},
    "swanlab": lambda directory, name, id: {
        "run_name": PROJECT, "experiment_name": name, "logdir": str(directory / "swanlab"),
        "id": id, "resume": "allow",
    },
}  # fmt: skip
COLUMNS = ["step", "split", "prompt", "completion", "reward", "advantage", "truncated"]


def check_report_to(report_to: str | Iterable[str] | None) -> list[str]:
    """The names of `report_to` without "none"; UserError for an unknown or uninstalled one."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker in report_to", name, ["none", *TRACKERS])
        if importlib.util.find_spec(name) is None:
            extra = "'rlcore[tracking]'" if name in ("tensorboard", "wandb") else name
            raise UserError(f"report_to={name!r} needs the package {name}: pip install {extra}")
    return names


class Reporter:
    """One of accelerate's trackers, started."""

    def __init__(self, name: str, directory: Path, run_name: str, run_id: str, config: Mapping):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._tracker = LOGGER_TYPE_TO_CLASS[name](**TRACKERS[name](directory, run_name, run_id))
        # accelerate begins some in the constructor, in its earlier versions
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        plain = {
            key: v if isinstance(v, bool | int | float | str) else str(v)
            for key, v in config.items()
        }
        self._tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a step."""
        self._tracker.log(dict(values), step=step)

    def samples(self, step: int, split: str, samples: Sequence[Sample]) -> None:
        """Completions as a table where the tracker has tables, as text where it has that."""
        told = [{**asdict(sample), "step": step, "split": split} for sample in samples]
        name = f"completions/{split}"
        if hasattr(self._tracker, "log_table"):
            rows = [[_plain(sample[column]) for column in COLUMNS] for sample in told]
            self._tracker.log_table(name, columns=COLUMNS, data=rows, step=step)
        elif hasattr(self._tracker.tracker, "add_text"):
            lines = "{reward}\n\n    {prompt}\n\n    {completion}"
            text = "\n\n".join(lines.format(**sample) for sample in told)
            self._tracker.tracker.add_text(name, text, global_step=step)

    def finish(self) -> None:
        """End the run there."""
        self._tracker.finish()


def _plain(value: Any) -> Any:
    """As all of the trackers take it: a number or a text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
