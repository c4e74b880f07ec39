"""What a run shows and keeps: a live display, one JSON line of metrics a step, optional trackers.

with Tracker(output_dir, total_steps, "GRPO", columns=GRPO_COLUMNS) as tracker:
    tracker.log(step, {"reward": 0.52, "kl": 0.001})
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlcore.errors import UserError
from rlcore.runs.display import Display
from rlcore.runs.output_dir import COMPLETIONS_FILE, METRICS_FILE, discard_empty
from rlcore.runs.reporting import Reporter, check_report_to
from rlcore.runs.samples import Sample, append_samples
from rlcore.runs.warnings import Warnings

GRPO_COLUMNS = ("reward", "kl", "entropy", "tokens_per_second")
SFT_COLUMNS = ("loss", "learning_rate", "tokens_per_second")


class Tracker:
    """Logs a run's metrics while it shows them; a context manager.

    Args:
        output_dir: metrics.jsonl is appended to here, one line a `log`.
        total_steps: what the progress bar counts to.
        description: the run's name in the display.
        columns: the metrics shown, in order; the first one's course is drawn.
        report_to: "none", or names of TRACKERS: "tensorboard", "wandb", ...
        enabled: False in all processes but the main one: then nothing is shown or written.
        start_step: the step a resumed run goes on from; later lines of metrics.jsonl are dropped.
        config: hyperparameters for the trackers of `report_to`.
        run_name, run_id: of the run for those trackers; the same id goes on with the same run.
        subtitle: where the run is and what it trains, beside the description.

    Raises:
        UserError: an unknown name in `report_to`, or one whose package is missing.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total_steps: int,
        description: str,
        *,
        columns: Iterable[str] = GRPO_COLUMNS,
        report_to: str | Iterable[str] | None = "none",
        enabled: bool = True,
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        subtitle: str = "",
    ):
        self._path = Path(output_dir) / METRICS_FILE
        self._names = check_report_to(report_to)
        self._enabled = enabled
        self._start_step = start_step
        self._config = dict(config or {})
        name = run_name or Path(output_dir).resolve().name
        self._identity = (name, run_id or uuid.uuid4().hex)
        self._display = Display(
            console, total_steps, description, tuple(columns), start_step, subtitle
        )
        self._file: Any = None
        self._reporters: list[Any] = []
        self._without_samples: set[str] = set()  # trackers of which that was said
        self._warnings = Warnings()

    def __enter__(self) -> Tracker:
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self._path, self._path.with_name(COMPLETIONS_FILE)):
                _drop_later_lines(path, self._start_step)
            if self._path.exists():
                self._display.recall(read_metrics(self._path))
            self._file = self._path.open("a", encoding="utf-8")
            self._reporters = [
                Reporter(name, self._path.parent, *self._identity, self._config)
                for name in self._names
            ]
            self._display.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self._enabled:
            return
        self._display.stop()
        self._file.close()
        for reporter in self._reporters:
            reporter.finish()
        if kind is not None:
            discard_empty(self._path.parent)
            return
        # on a terminal they stand on the screen that stays
        for sentence in () if self._display.is_live else self._warnings.active.values():
            self._display.message(f"warning: {sentence}")
        if course := self._display.held_out_course():
            self._display.message(course)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of `step`, show them, and hand them to the trackers.

        A value that is NaN or infinite is written as null: JSON has no name for it.
        """
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for reporter in self._reporters:
            reporter.log(values, step)
        self._warnings.follow(values)
        self._display.update(step, values, self._warnings.active)

    def samples(self, step: int, split: str, samples: Sequence[Sample]) -> None:
        """Keep the samples of `step` in completions.jsonl and show the first two.

        Args:
            split: "train", or "eval" for held-out prompts.
        """
        if self._enabled and samples:
            append_samples(self._path.parent, step, split, samples)
            for reporter in self._reporters:
                taken = reporter.samples(step, split, samples)
                if not taken and reporter.name not in self._without_samples:
                    self._without_samples.add(reporter.name)
                    self._display.message(
                        f"{reporter.name} takes no tables: the samples are in {COMPLETIONS_FILE} "
                        "alone"
                    )
            self._display.show_samples(step, samples)

    def phase(self, name: str) -> None:
        """Name what the run does now; shown on a terminal."""
        if self._enabled:
            self._display.show_phase(name)

    def message(self, text: str) -> None:
        """Show one line above the progress display."""
        if self._enabled:
            self._display.message(text)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises UserError with the line number where another line is not JSON.
    """
    try:
        # not splitlines: text may hold characters that end a line elsewhere, as U+2028
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read metrics {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a line of JSON: {line[:60]!r}") from None
    return rows


def _drop_later_lines(path: Path, start_step: int) -> None:
    """Keep the lines up to `start_step`: a resumed run writes the others again."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= start_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)
