"""Experiment trackers beside metrics.jsonl, through accelerate's own: `report_to`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlcore.errors import UserError, reason_of, unknown_name
from rlcore.runs.run_record import note_facts, read_record
from rlcore.runs.samples import Sample

PROJECT = "rlcore"
# What each tracker is started with: (directory, run's name, run's id) -> its options. The same id
# makes a resumed run go on as the same run; mlflow gives its own, see `Reporter`.
TRACKERS: dict[str, Callable[[Path, str, str], dict[str, Any]]] = {
    "tensorboard": lambda directory, name, id: {
        "run_name": "tensorboard", "logging_dir": str(directory),
    },
    "wandb": lambda directory, name, id: {
        "run_name": PROJECT, "name": name, "dir": str(directory), "id": id, "resume": "allow",
    },
    # knows a run by its name alone
    "trackio": lambda directory, name, id: {
        "run_name": PROJECT, "name": f"{name}-{id[:8]}", "resume": "allow",
    },
    "mlflow": lambda directory, name, id: {"experiment_name": PROJECT, "run_name": name},
    # its ids had to have 21 characters, and may have that many
    "swanlab": lambda directory, name, id: {
        "run_name": PROJECT, "experiment_name": name, "logdir": str(directory / "swanlab"),
        "id": id[:21], "resume": "allow",
    },
}  # fmt: skip
MLFLOW_RUN = "mlflow_run"  # the fact in a run's record: under which id mlflow knows it
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
    """One of accelerate's trackers, started.

    Raises:
        UserError: it does not start.
    """

    def __init__(self, name: str, directory: Path, run_name: str, run_id: str, config: Mapping):
        self.name, self._directory = name, directory
        options = TRACKERS[name](directory, run_name, run_id)
        plain = {
            key: v if isinstance(v, bool | int | float | str) else str(v)
            for key, v in config.items()
        }
        try:
            if name == "mlflow":
                self._start_mlflow(options, plain)
            else:
                self._start(options)
                self._tracker.store_init_configuration(plain)
        except Exception as error:
            raise UserError(
                f"report_to {name}: it does not start: {reason_of(error)}; mend it or leave it out"
            ) from error

    def _start(self, options: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # some of accelerate's trackers ask it who they are
        self._tracker = LOGGER_TYPE_TO_CLASS[self.name](**options)
        # accelerate begins some in the constructor, in its earlier versions
        if hasattr(self._tracker, "start"):
            self._tracker.start()

    def _start_mlflow(self, options: dict[str, Any], config: dict[str, Any]) -> None:
        """Go on with the run that mlflow gave the directory's, where it still knows that.

        It keeps the first value of a parameter; those that changed since become tags. The
        environment's MLFLOW_RUN_ID wins over the record's.
        """
        import mlflow

        record = read_record(self._directory)
        earlier = record and record.facts.get(MLFLOW_RUN)
        if earlier:
            with contextlib.suppress(mlflow.exceptions.MlflowException):  # another server's
                options["run_id"] = mlflow.get_run(earlier).info.run_id
        self._start(options)
        run = self._tracker.tracker
        if record is not None:
            note_facts(self._directory, {MLFLOW_RUN: run.info.run_id})
        known = run.data.params
        changed = {f"resumed.{k}": v for k, v in config.items() if known.get(k, str(v)) != str(v)}
        if changed:
            mlflow.set_tags(changed)
        self._tracker.store_init_configuration({k: v for k, v in config.items() if k not in known})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a step."""
        self._tracker.log(dict(values), step=step)

    def samples(self, step: int, split: str, samples: Sequence[Sample]) -> bool:
        """Completions as a table, or as text; False where the tracker takes neither."""
        told = [{**asdict(sample), "step": step, "split": split} for sample in samples]
        rows = [[_plain(sample[column]) for column in COLUMNS] for sample in told]
        name = f"completions/{split}"
        if hasattr(self._tracker, "log_table"):
            self._tracker.log_table(name, columns=COLUMNS, data=rows, step=step)
        elif self.name == "tensorboard":
            text = "\n\n".join(_LINES.format(**sample) for sample in told)
            self._tracker.tracker.add_text(name, text, global_step=step)
        elif self.name == "mlflow":
            import mlflow

            # a file a step: mlflow would read a longer one back to add to it
            mlflow.log_dict({"columns": COLUMNS, "data": rows}, f"{name}/{step:06d}.json")
        elif (make := _table_of(self.name)) is not None:
            self._tracker.log({name: make(rows, told)}, step=step)
        else:
            return False
        return True

    def finish(self) -> None:
        """End the run there."""
        self._tracker.finish()


def _plain(value: Any) -> Any:
    """As all of the trackers take it: a number or a text."""
    return value if isinstance(value, bool | int | float | str) else str(value)


_LINES = "{reward}\n\n    {prompt}\n\n    {completion}"


def _table_of(name: str) -> Callable[[list, list], Any] | None:
    """(rows, samples) -> what the tracker's package shows them as; None where it has nothing."""
    package = importlib.import_module(name)
    if getattr(package, "Table", None):
        return lambda rows, told: package.Table(columns=COLUMNS, data=rows)
    if getattr(package, "Text", None):
        return lambda rows, told: [package.Text(_LINES.format(**each)) for each in told]
    return None
