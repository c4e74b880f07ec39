"""TRPO on two processes: they take the step of one, and stay together."""

from __future__ import annotations

import pytest
import torch
from helpers import two_trust_regions
from helpers.ranks import launch_two
from helpers.tiny import tiny_model

from rlcore.runs.tracking import read_metrics


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(directory, what two gloo processes wrote there, each on half of the rows)."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, launch_two("two_trust_regions.py", directory)


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
