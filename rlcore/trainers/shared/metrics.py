"""What a step's numbers become on their way to metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rlcore.trainers.shared.run import Run


class Means:
    """Means of per-token quantities over micro-steps and processes."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, mask: torch.Tensor, **values: torch.Tensor | None) -> None:
        """Add each of `values` (B, T) where `mask` (B, T) counts; None adds nothing."""
        count = mask.sum().double()
        for name, value in values.items():
            if value is not None:
                total = torch.where(mask, value, 0).sum().double()
                pair = torch.stack([total, count])
                self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """{name: mean} over everything that was added on any process."""
        if not self._totals:
            return {}
        names = sorted(self._totals)
        totals = accelerator.reduce(torch.stack([self._totals[name] for name in names]), "sum")
        return {
            name: total / max(count, 1.0)
            for name, (total, count) in zip(names, totals.tolist(), strict=True)
        }


@dataclass
class Moments:
    """Mean and variance of everything that was added so far (Welford 1962)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # summed squared distances from the mean

    def add(self, values: torch.Tensor) -> None:
        """Take in finite values, of any shape."""
        if not values.numel():
            return
        values = values.double()
        count, mean = values.numel(), values.mean().item()
        distance, total = mean - self.mean, self.count + count
        self.squares += (values - mean).square().sum().item()
        self.squares += distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total

    def normalized(self, values: torch.Tensor) -> torch.Tensor:
        """(values - mean) / std, in their dtype; 0 where everything so far was equal."""
        std = math.sqrt(self.squares / max(self.count - 1, 1))
        return (values - self.mean) / (std + 1e-8)


class Log:
    """Averages the metrics of the steps between two lines of metrics.jsonl."""

    def __init__(self, run: Run, tracker: Any):
        self.run, self.tracker = run, tracker
        self.last: dict[str, float] = {}
        self._pending: list[Mapping[str, float]] = []

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics; write their averages every `logging_steps` and at the end."""
        self._pending.append(metrics)
        self.run.tell("on_step", step, metrics)
        self._show_samples(step, "train")
        if step % self.run.config.logging_steps == 0 or step == self.run.total_steps:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Write what no line has yet."""
        if not self._pending:
            return
        metrics = self._pending[-1]
        names = dict.fromkeys(name for pending in self._pending for name in pending)
        means = {}
        for name in names:
            values = [pending[name] for pending in self._pending if name in pending]
            means[name] = sum(values) / len(values)
        # Counters stand for now, not for the average of the steps.
        counters = {name: metrics[name] for name in ("epoch", "num_tokens") if name in metrics}
        self._pending = []
        self.write(step, means | counters)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line as it is; `last` has all of the last step's lines."""
        known = self.last if self.last.get("step") == step else {}
        self.last = {**known, "step": step, **metrics}
        self.tracker.log(step, metrics)
        self._show_samples(step, "eval")

    def message(self, text: str) -> None:
        """Say something on the screen, once."""
        if self.run.accelerator.is_main_process:
            self.tracker.message(text)

    def _show_samples(self, step: int, split: str) -> None:
        # a caller's own tracker may only log
        samples = self.run.samples.pop(split, None)
        if samples and hasattr(self.tracker, "samples"):
            self.tracker.samples(step, split, samples)


class Clock:
    """Times the steps and counts their tokens; what is skipped is on nobody's time."""

    def __init__(self) -> None:
        self._seconds, self._tokens = 0.0, 0.0
        self.skip()

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._mark = time.perf_counter()

    def lap(self, tokens: float) -> dict[str, float]:
        """The step's time, and the run's tokens per second with these `tokens`."""
        seconds = time.perf_counter() - self._mark
        self._seconds += seconds
        self._tokens += tokens
        self.skip()
        return {"step_time": seconds, "tokens_per_second": self._tokens / self._seconds}
