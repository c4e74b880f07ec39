"""PPO and the policy gradient on two processes: they take the step of one, and stay together."""

from __future__ import annotations

import pytest
import torch
from helpers import actor_critic as make
from helpers import grpo as grpo_make
from helpers.ranks import launch_two

import rlcore as rl
from rlcore.runs.tracking import read_metrics
from rlcore.trainers.ppo_update import update


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo processes wrote, each on half of the rows."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, launch_two("two_critics.py", directory)


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_two_processes_take_the_step_of_one(two_ranks, tmp_path, backbone):
    run, critic = make.make_run(make.ppo_config(tmp_path, value_backbone=backbone))
    metrics = update(run, critic, 1, make.experience(ref=0.4), torch.arange(8), 1.0)
    expected = {
        "policy": grpo_make.gradient(run.policy),
        "value": grpo_make.gradient(critic.run.policy),
    }
    for rank in two_ranks[1]:
        taken = rank[backbone]
        for name, gradient in expected.items():
            assert (taken[name] - gradient).norm() < 1e-5 * gradient.norm(), name
        assert taken["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_they_whiten_over_all_of_their_tokens(two_ranks):
    made = make.experience()
    expected = rl.whiten(torch.where(made.mask, made.returns, 0.0), made.mask)
    for rank, results in enumerate(two_ranks[1]):
        found = results["own"]["whitened"]
        wanted = expected[4 * rank : 4 * rank + 4, : found.shape[1]]
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["ppo", "shared", "pg"])
def test_they_end_a_run_with_the_same_weights_and_one_log(two_ranks, name):
    directory, (one, two) = two_ranks
    for key, value in one["weights"][name].items():
        assert torch.equal(value, two["weights"][name][key])
    assert [line["step"] for line in read_metrics(directory / name / "metrics.jsonl")] == [1, 2, 3]
    assert (directory / name / "checkpoint-2").is_dir()
