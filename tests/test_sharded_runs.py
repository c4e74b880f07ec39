"""Runs whose models FSDP2 shards over two processes end with whole models."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import launch_two
from helpers.uneven_shares import assert_same_step, options_of, write_data
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlcore.models.loading import load_policy
from rlcore.trainers import (
    DPOConfig,
    RewardModelConfig,
    SFTConfig,
    train_dpo,
    train_reward_model,
    train_sft,
)

ALONE = {
    "sft": (train_sft, SFTConfig, AutoModelForCausalLM),
    "dpo": (train_dpo, DPOConfig, AutoModelForCausalLM),
    "reward_model": (train_reward_model, RewardModelConfig, AutoModelForSequenceClassification),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the sharded runs have ended."""
    directory = tmp_path_factory.mktemp("sharded")
    write_data(directory)
    assert launch_two("sharded_runs.py", directory) == [True, True]
    return directory


@pytest.mark.parametrize("name", ALONE)
def test_the_saved_model_is_the_one_that_one_process_trains(directory, name):
    train, config, auto_class = ALONE[name]
    alone = train(
        config(**options_of(directory, f"{name}-alone", 3, gradient_accumulation_steps=2))
    ).output_dir
    expected, found, start = (
        auto_class.from_pretrained(path).state_dict()
        for path in (alone, directory / f"{name}-sharded", directory / "model")
    )
    if name == "reward_model":
        del start["score.weight"]  # drawn anew at each loading
    assert_same_step(found, expected, start)


@pytest.mark.parametrize("name", ["lora", "grpo", "ppo"])
def test_what_was_trained_is_saved_whole(directory, name):
    start = load_policy(str(directory / "model")).state_dict()
    trained = load_policy(str(directory / f"{name}-sharded")).state_dict()
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    assert all(value.isfinite().all() for value in trained.values())


def test_the_value_model_is_saved_whole_beside_the_policy(directory):
    loaded = AutoModelForSequenceClassification.from_pretrained(
        directory / "ppo-sharded" / "value_model", num_labels=1
    )
    assert loaded.score.weight.abs().max() > 0
