"""Ratios that hold on a noisy machine: contestants in turn, medians, memory in fresh processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, run in turn, one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def peak_memory(script: str, *arguments: object) -> int:
    """Bytes by which `script` (a file here, given the arguments) raises its resident peak.

    The script runs in a fresh process and prints the figure as the last line, as JSON.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])
