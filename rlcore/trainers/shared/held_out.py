"""Evaluation on held-out data in a run: when it happens, the best model kept, an early end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlcore.errors import unknown_name
from rlcore.models.pretrained import no_progress_bars
from rlcore.runs import checkpoint
from rlcore.runs.figures import higher_is_better
from rlcore.runs.output_dir import BEST
from rlcore.trainers.options.base import KEEP_BEST
from rlcore.trainers.shared.metrics import Clock, Log
from rlcore.trainers.shared.run import Run
from rlcore.trainers.shared.weights import whole_weights

# what "auto" goes by, the first that the trainer measures
DECISIVE = ("eval/reward", "eval/accuracy", "eval/loss")


class HeldOut:
    """Measures the model at the start, every `eval_steps` steps and at the end.

    The best model so far is kept in output_dir/best, as `keep_best` says; after
    `early_stopping_patience` measurements without a better one the run ends.

    Args:
        sets: the held-out data by name; of several each is measured, and the mean of all. Nothing
            is ever measured where there is none.
        measure: a set -> {"eval/...": value}, the same on every process.
        clock: does not count the time that this takes.
    """

    def __init__(
        self,
        run: Run,
        log: Log,
        clock: Clock,
        sets: Mapping[str, Any],
        measure: Callable[[Any], Mapping[str, float]],
    ):
        self._run, self._log, self._clock = run, log, clock
        self._sets, self._measure = sets, measure
        if sets and run.first_step == 0:
            self._take(0)
        clock.skip()

    def after(self, step: int) -> None:
        """Measure after `step` where it is time to; the clock starts anew in any case."""
        every = self._run.config.eval_steps
        due = step == self._run.total_steps or (every > 0 and step % every == 0)
        if self._sets and due:
            self._take(step)
        self._clock.skip()

    def _take(self, step: int) -> None:
        self._run.phase("evaluating")
        measured = self._measured()
        self._log.write(step, measured)
        self._run.tell("on_evaluate", step, measured)
        metric = self._metric(measured)
        if metric is None:
            return
        run, best = self._run, self._run.best
        value, sign = measured[metric], 1 if higher_is_better(metric) else -1
        if math.isfinite(value) and (best.value is None or sign * (value - best.value) > 0):
            best.metric, best.value, best.step, best.misses = metric, value, step, 0
            if step > 0 and self._keeps:
                self._save()
            return
        best.misses += 1
        patience = run.config.early_stopping_patience
        if patience is not None and best.misses >= patience and step < run.total_steps:
            run.total_steps = step
            self._log.flush(step)
            self._log.message(
                f"ended early: {best.misses} evaluations since step {best.step} without a better "
                f"{metric} than {best.value:.4g}"
            )

    def _measured(self) -> Mapping[str, float]:
        """{"eval/reward": mean over the sets, "eval/NAME/reward": ...}; of one set its own."""
        parts = {name: self._measure(rows) for name, rows in self._sets.items()}
        if list(parts) == [""]:
            return parts[""]
        metrics = dict.fromkeys(metric for part in parts.values() for metric in part)
        means = {}
        for metric in metrics:
            values = [part[metric] for part in parts.values() if metric in part]
            means[metric] = sum(values) / len(values)
        each = {
            f"eval/{name}/{metric.removeprefix('eval/')}": value
            for name, part in parts.items()
            for metric, value in part.items()
        }
        return means | each

    @property
    def _keeps(self) -> bool:
        """Of one evaluation at the end the best model would be the last one."""
        config = self._run.config
        return config.keep_best not in KEEP_BEST or (
            config.keep_best == "auto" and config.eval_steps
        )

    def _metric(self, measured: Mapping[str, float]) -> str | None:
        """What is gone by, of what was measured."""
        wanted = self._run.config.keep_best
        if wanted in KEEP_BEST:
            return next((name for name in DECISIVE if name in measured), None)
        name = wanted if wanted.startswith("eval/") else f"eval/{wanted}"
        if name not in measured:
            raise unknown_name("metric in keep_best", wanted, measured)
        return name

    def _save(self) -> None:
        run = self._run
        weights = whole_weights(run)
        if run.accelerator.is_main_process:
            with no_progress_bars():
                directory = Path(run.config.output_dir) / BEST
                checkpoint.save_model(run.policy, run.tokenizer, directory, weights)
