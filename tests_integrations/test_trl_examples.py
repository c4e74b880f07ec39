"""The scripts in examples/ run as they stand, and show what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, directory: Path) -> list[list[str]]:
    """The words of every line that the script prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_the_trl_example_shows_the_same_curve_twice(tmp_path):
    lines = [words for words in printed("trl_grpo.py", tmp_path) if words[0].isdigit()]
    assert len(lines) == 10
    for _, loss, patched, entropy, patched_entropy in lines:
        assert abs(float(loss) - float(patched)) < 1e-5
        assert abs(float(entropy) - float(patched_entropy)) < 1e-4
    assert len({loss for _, loss, *_ in lines}) > 5


def test_the_loop_of_ones_own_learns(tmp_path):
    rewards = [float(words[3]) for words in printed("own_loop.py", tmp_path) if words[0] == "step"]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0] + 0.3
