"""Two processes with unequal work: no run waits for a process that has nothing to do."""

from __future__ import annotations

import pytest
import torch
from helpers.grpo import config, make_run
from helpers.ranks import launch_two
from helpers.uneven_shares import HELD_OUT, assert_same_step, every_run, write_data

from rlcore.models.loading import load_policy
from rlcore.trainers.shared import writing

RUNS = [
    *(f"{name}{n}" for n in HELD_OUT for name in ("sft", "dpo", "precomputed", "reward_model")),
    *(f"grpo{n}" for n in HELD_OUT),
    *("kto3", "online", "pg", "trpo", "ppo"),
]
# what a run of two does to the same rows as a run of one
SAME_ROWS = [
    name for name in RUNS if name.startswith(("sft", "dpo", "precomputed", "reward", "kto"))
]


@pytest.fixture(scope="module")
def two_and_one(tmp_path_factory):
    """What both processes ended with, what one process alone does, and the weights before."""
    directory = tmp_path_factory.mktemp("uneven")
    write_data(directory)
    start = load_policy(str(directory / "model")).state_dict()
    return launch_two("uneven_shares.py", directory), every_run(directory, 1), start


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_end_with_the_same_weights(two_and_one, name):
    one, two = (rank[name]["weights"] for rank in two_and_one[0])
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", RUNS)
def test_no_process_ends_before_the_model_is_saved(two_and_one, name):
    assert all(rank[name]["saved"] for rank in two_and_one[0])


@pytest.mark.parametrize("name", SAME_ROWS)
def test_two_processes_measure_and_train_what_one_does(two_and_one, name):
    ranks, alone, start = two_and_one
    assert_same_step(ranks[0][name]["weights"], alone[name]["weights"], start)
    measured = {
        key: value for key, value in alone[name]["metrics"].items() if key.startswith("eval/")
    }
    assert measured
    for rank in ranks:
        found = {key: rank[name]["metrics"][key] for key in measured}
        assert found == pytest.approx(measured, rel=1e-4, abs=1e-6)


def test_a_process_without_a_pair_of_its_own_takes_the_others_step(two_and_one):
    (one, two), _, _ = two_and_one
    # the second process's completions are all worth the same
    assert one["online"]["metrics"]["frac_pairs"] == two["online"]["metrics"]["frac_pairs"] == 0.5
    assert (
        one["online"]["metrics"]["rewards/margins"] == two["online"]["metrics"]["rewards/margins"]
    )


def test_a_directory_is_claimed_once_every_process_has_looked_at_it(monkeypatch, tmp_path):
    made = make_run(config(tmp_path))
    seen = []
    monkeypatch.setattr(made.accelerator, "wait_for_everyone", lambda: seen.append("waited"))
    monkeypatch.setattr(writing, "_claim", lambda *_: seen.append("claimed"))
    with writing.tracking(made, {"tracker": object()}, "GRPO", ()):
        assert seen == ["waited", "claimed"]
