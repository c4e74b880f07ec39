"""TRPO on two processes: they take the step of one, and stay together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_trust_regions
from helpers.tiny import tiny_model

from rlcore.tracking import read_metrics


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(directory, what two gloo processes wrote there, each on half of the rows)."""
    directory = tmp_path_factory.mktemp("ranks")
    script = Path(two_trust_regions.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(directory)],
        env=environment | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_take_the_step_of_one(two_ranks, tmp_path):
    updated, metrics = two_trust_regions.update(tmp_path, torch.arange(8), 8)
    start = tiny_model("gpt2").state_dict()
    for results in two_ranks[1]:
        assert results["metrics"] == pytest.approx(metrics, rel=1e-3, abs=1e-6)
        found, expected = (
            torch.cat([(weights[name] - start[name]).flatten() for name in start])
            for weights in (results["updated"], updated)
        )
        assert (found - expected).norm() < 1e-3 * expected.norm()


def test_they_end_a_run_with_the_same_weights_and_one_log(two_ranks):
    directory, (one, two) = two_ranks
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    written = read_metrics(directory / "run" / "metrics.jsonl")
    assert [line["step"] for line in written] == [1, 2, 3]
    assert any(line["trpo/kl"] > 0 for line in written)
