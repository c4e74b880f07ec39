"""Times: CUDA events with L2 flushed on a GPU, rounds in turn on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
SHORTEST = 2e-3  # seconds that a sample lasts at least: shorter calls are repeated within it
MOST_REPEATS = 1000
WARMUP_MS, MEASURED_MS = 50, 300


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median of the samples, their 20% and 80% quantiles."""

    median: float
    low: float
    high: float
    samples: int


def summary(samples: list[float]) -> Times:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Times(statistics.median(ordered), low, high, len(ordered))


def interleaved(
    calls: Mapping[str, Call], rounds: int, most_seconds: float = float("inf")
) -> dict[str, Times]:
    """Each call's times, all in turn within every round, after one round that does not count.

    A ratio of two medians then holds on a machine that does other things as well. Rounds stop
    early once `most_seconds` have passed, but not before the first that counts.
    """
    begun = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: _repeats(_seconds(call, 1)) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_seconds(call, repeats[name]))
        if time.perf_counter() - begun > most_seconds:
            break
    return {name: summary(taken) for name, taken in samples.items()}


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(seconds: float) -> int:
    return min(max(round(SHORTEST / max(seconds, 1e-9)), 1), MOST_REPEATS)


def on_gpu(call: Call) -> Times:
    """One call's times by CUDA events, L2 flushed before each, after a warm-up."""
    import triton.testing

    median, low, high = triton.testing.do_bench(
        call, warmup=WARMUP_MS, rep=MEASURED_MS, quantiles=[0.5, 0.2, 0.8]
    )
    return Times(median / 1e3, low / 1e3, high / 1e3, max(int(MEASURED_MS / max(median, 1e-3)), 1))


def host_seconds(call: Call, repeats: int = 200) -> float:
    """Seconds that the host spends to issue a call whose work on the GPU is negligible."""
    torch.cuda.synchronize()
    taken = []
    for _ in range(5):
        taken.append(_seconds(call, repeats))
        torch.cuda.synchronize()
    return statistics.median(taken)
