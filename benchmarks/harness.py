"""What the asserted comparisons share: medians of contestants in turn, memory of scripts here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rlcore.bench import timing


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, run in turn."""
    times = timing.interleaved(contestants, rounds)
    return {name: taken.median for name, taken in times.items()}


def peak_memory(script: str, *arguments: object) -> int:
    """Bytes by which `script` (a file here, given the arguments) raises its resident peak.

    The script runs in a fresh process and prints the figure as the last line, as JSON.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])
