"""Whole PPO runs on tiny models: that they learn, and what of them is needed for it; resuming."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import actor_critic as make
from helpers.tiny import most_of, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlcore as rl
from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import ppo
from rlcore.trainers.ppo import PPOConfig, train_ppo


def digits(prompts, completions, **_):
    """The share of digits among a completion's characters."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return PPOConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        num_ppo_epochs=2,
        max_completion_length=4,
        max_steps=4,
        kl_coef=0.01,
    )


def raised(prompts, completions, **_):
    """Nearly all of it comes for nothing, which leaves no seed or machine to luck."""
    return [reward + 100.0 for reward in digits(prompts, completions)]


def run(config, reward=digits, **changes):
    changes = {"overwrite_output_dir": True} | changes
    return train_ppo(dataclasses.replace(config, **changes), reward_funcs=[reward])


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(one, two) -> bool:
    one, two = weights(one), weights(two)
    return all(torch.equal(value, two[name]) for name, value in one.items())


def gain(config, reward=digits) -> float:
    """How much the reward rose in fourteen generation batches."""
    run(
        config,
        reward,
        max_steps=14,
        learning_rate=2e-2,
        value_learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        num_ppo_epochs=4,
    )
    rewards = [line["reward"] for line in lines(config)]
    return sum(rewards[-2:]) / 2 - rewards[0]


# of 1
LEARNED = 0.6
MODES = {
    "clip": {"kl_mode": "clip"},
    "penalty": {"kl_mode": "penalty", "penalty_target": 0.2},
    "shared": {"value_backbone": "shared"},
}


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_what_is_rewarded(config, mode):
    assert gain(dataclasses.replace(config, **MODES[mode])) > LEARNED


@pytest.mark.parametrize("mode", ["clip", "penalty"])
def test_with_the_advantages_sign_flipped_it_would_not(config, mode, monkeypatch):
    gae = rl.gae

    def flipped(*arguments, **options):
        advantage, returns = gae(*arguments, **options)
        return -advantage, returns

    monkeypatch.setattr(rl, "gae", flipped)
    assert gain(dataclasses.replace(config, **MODES[mode])) < 0.05


def test_with_the_mask_inverted_it_would_not(config, monkeypatch):
    judged_only = ppo.judged_only

    def inverted(sampled):
        experience, score = judged_only(sampled)
        return dataclasses.replace(experience, mask=~experience.mask), score

    monkeypatch.setattr(ppo, "judged_only", inverted)
    assert gain(config) < 0.05


def test_with_each_score_on_its_rows_neighbour_it_would_not(config, monkeypatch):
    token_reward = ppo.token_reward
    monkeypatch.setattr(
        ppo, "token_reward", lambda made, score, *rest: token_reward(made, score.roll(1), *rest)
    )
    assert gain(config) < LEARNED / 2


def test_what_comes_for_nothing_hinders_only_without_a_value_model_and_a_mean(config, monkeypatch):
    config = dataclasses.replace(config, lam=1.0)
    assert gain(config, raised) > LEARNED
    whitened, predict_values = ppo.whitened, ppo.predict_values
    monkeypatch.setattr(ppo, "whitened", partial(whitened, shift_mean=False))
    monkeypatch.setattr(
        ppo, "predict_values", lambda *arguments: [0 * v for v in predict_values(*arguments)]
    )
    assert gain(config, raised) < LEARNED / 2


def test_the_metrics_carry_trls_names_and_the_shared_ones(config):
    result = run(config, eval_dataset=most_of(config.dataset), eval_steps=2, kl_mode="penalty")
    written = lines(config)
    assert [line["step"] for line in written] == [0, 1, 2, 2, 3, 4, 4]
    held_out = {"eval/reward", "eval/completions/mean_length", "eval/rewards/digits/mean"}
    assert set(written[1]) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/digits/mean", "rewards/digits/std", "kl", "entropy",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "completions/unjudged", "num_tokens", "tokens_per_second",
        "step_time", "objective/kl", "objective/entropy", "objective/non_score_reward",
        "objective/rlhf_reward", "objective/scores", "objective/kl_coef", "policy/approxkl_avg",
        "policy/clipfrac_avg", "policy/entropy_avg", "policy/updates", "policy/kl",
        "policy/penalty_coef", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg",
        "val/ratio", "val/ratio_var", "val/num_eos_tokens", "value/explained_variance",
        "value/grad_norm", "value/learning_rate",
    }  # fmt: skip
    assert all(set(written[place]) == held_out | {"step"} for place in (0, 3, 6))
    assert result.metrics == written[-2] | written[-1]
    assert written[1]["objective/scores"] == pytest.approx(written[1]["reward"], rel=1e-5)
    assert result.metrics["epoch"] == 4 * 32 / 8


RESUMED = {
    "clip": {"kl_target": 6.0, "value_warmup_steps": 1},
    "penalty": {"kl_mode": "penalty", "penalty_target": 1e-6},
    "shared": {"value_backbone": "shared"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, options):
    config = dataclasses.replace(
        config, lr_scheduler_type="constant", save_steps=2, kl_coef=0.1, **options
    )
    run(config, max_steps=4)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    run(halves, max_steps=2)
    run(halves, max_steps=4, resume=True, overwrite_output_dir=False)
    assert same(config.output_dir, halves.output_dir)
    one, two = (read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (config, halves))
    for line, other in zip(one, two, strict=True):
        for name in set(line) - {"step_time", "tokens_per_second"}:
            assert line[name] == other[name], name
    assert len({line["objective/kl_coef"] for line in one}) == (3 if "kl_target" in options else 1)
    critics = (_critic(Path(c.output_dir)) for c in (config, halves))
    one, two = map(load_file, critics)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def _critic(directory):
    own = directory / "value_model" / "model.safetensors"
    return own if own.exists() else directory / "value_head.safetensors"


def test_a_checkpoint_is_a_directory_with_the_policy(config):
    run(config, max_steps=2, save_steps=2)
    assert same(f"{config.output_dir}/checkpoint-2", config.output_dir)


def test_a_run_starts_from_a_value_model_and_saves_it_in_turn(config, tmp_path):
    run(config)
    saved = Path(config.output_dir) / "value_model"
    next_run = {"value_model": str(saved), "value_learning_rate": 1e-30}
    run(config, output_dir=str(tmp_path / "next"), **next_run)
    one = load_file(saved / "model.safetensors")
    two = load_file(tmp_path / "next" / "value_model" / "model.safetensors")
    assert all(torch.allclose(value, two[name], atol=1e-20) for name, value in one.items())


def test_completions_without_any_opinion_are_counted_and_left_alone(config):
    def picky(prompts, completions, **_):
        return [None if n % 4 == 0 else float(len(text)) for n, text in enumerate(completions)]

    result = train_ppo(config, reward_funcs=[picky])
    assert result.metrics["completions/unjudged"] == 8

    def silent(prompts, completions, **_):
        return [None] * len(completions)

    config = dataclasses.replace(config, overwrite_output_dir=True, max_steps=1)
    before = weights(config.model)
    train_ppo(config, reward_funcs=[silent])
    assert all(torch.equal(v, before[name]) for name, v in weights(config.output_dir).items())


def test_a_penalty_for_endless_completions_comes_off_their_score(config):
    run(config, max_steps=1, missing_eos_penalty=2.0)
    (line,) = lines(config)
    expected = line["reward"] - 2.0 * line["completions/clipped_ratio"]
    assert line["objective/scores"] == pytest.approx(expected, rel=1e-5)
    assert line["completions/clipped_ratio"] > 0.5


@pytest.mark.parametrize("kind", make.KINDS)
def test_it_runs_on_each_architecture(config, tmp_path, kind):
    model = save_tiny(tmp_path / kind, kind, initializer_range=0.05)
    run(config, model=model, max_steps=1, kl_coef=0.1)
    (line,) = lines(config)
    assert abs(line["objective/kl"]) < 1e-4 and line["policy/updates"] == 2
    assert (Path(config.output_dir) / "value_model" / "model.safetensors").is_file()


def test_mistakes_are_told_before_anything_is_written(config):
    for changes, message in (
        ({"value_model": "/no/such/place"}, "no tokenizer at '/no/such/place'"),
        ({"kl_mode": "penalt"}, "unknown kl_mode"),
        ({"num_generations": 5}, "completions at a time, which num_generations"),
    ):
        with pytest.raises(UserError, match=message):
            run(config, **changes)
    with pytest.raises(UserError, match="no reward"):
        train_ppo(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_step_is_a_generation_batch_whatever_the_mini_batches(config, mini_batches):
    options = {"num_mini_batches": mini_batches, "per_device_train_batch_size": 4 // mini_batches}
    config = dataclasses.replace(config, max_steps=-1, num_train_epochs=2, save_steps=3, **options)
    assert config.prompts_per_process == 4
    train_ppo(config, reward_funcs=digits)
    steps = [row for row in lines(config) if "epoch" in row]
    assert [(row["step"], row["epoch"]) for row in steps] == [(1, 0.5), (2, 1), (3, 1.5), (4, 2)]
    assert (Path(config.output_dir) / "checkpoint-3").is_dir()
