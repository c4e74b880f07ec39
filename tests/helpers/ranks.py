"""Scripts of this directory run by two processes, which write what they found into a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
# the tests, and the tree that they are in
PATHS = os.pathsep.join(map(str, (HERE.parent, HERE.parents[1])))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


def launch_two(script: str, directory: Path, *arguments: str) -> list[Any]:
    """What both ranks of `script DIRECTORY ARGUMENTS...` saved, under torchrun as trainers run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(HERE / script), str(directory), *arguments],
        env=os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]
