"""Distillation on two processes: they take the steps of one, and stay together."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import launch_two
from helpers.two_students import make_config

from rlcore.trainers import train_distill


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo processes wrote, each on half of the rows."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, launch_two("two_students.py", directory)


def test_two_processes_take_the_steps_of_one(two_ranks, tmp_path):
    directory, ranks = two_ranks
    config = make_config(directory, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2)
    alone = train_distill(config)
    for rank in ranks:
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(rank["data"]["weights"][name], value, rtol=1e-3, atol=1e-4)
        for name in ("loss", "grad_norm", "eval/loss", "num_tokens", "epoch"):
            assert rank["data"]["metrics"][name] == pytest.approx(alone.metrics[name], rel=1e-3)


def test_they_stay_together_on_what_they_sample_and_when_resumed(two_ranks):
    _, (one, two) = two_ranks
    for name, value in one["samples"]["weights"].items():
        assert torch.equal(value, two["samples"]["weights"][name])
    halves, whole = one["halves"]
    assert all(torch.equal(halves[name], value) for name, value in whole.items())
