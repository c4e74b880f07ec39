"""Whole policy-gradient runs on tiny models: that they learn, and what of them is needed for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import actor_critic as make
from helpers.tiny import most_of, save_tiny
from transformers import AutoModelForCausalLM

from rlcore.runs.tracking import read_metrics
from rlcore.trainers import pg
from rlcore.trainers.pg import PGConfig, train_pg


def digits(prompts, completions, **_):
    """The share of digits among a completion's characters."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def raised(prompts, completions, **_):
    """Nearly all of it comes for nothing, which leaves no seed or machine to luck."""
    return [reward + 100.0 for reward in digits(prompts, completions)]


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return PGConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=4,
        max_steps=4,
    )


def run(config, reward=digits, **changes):
    changes = {"overwrite_output_dir": True} | changes
    return train_pg(dataclasses.replace(config, **changes), reward_funcs=[reward])


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(one, two) -> bool:
    one, two = weights(one), weights(two)
    return all(torch.equal(value, two[name]) for name, value in one.items())


def gain(config, reward=digits) -> float:
    """How much the reward rose in twenty steps."""
    run(
        config,
        reward,
        max_steps=20,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
    )
    rewards = [line["reward"] for line in lines(config)]
    return sum(rewards[-3:]) / 3 - rewards[0]


# of 1
LEARNED = 0.6
VALUE = {"return_type": "reward_to_go", "value_learning_rate": 3e-3, "num_value_epochs": 4}
MODES = {
    "none": {"baseline": "none"},
    "batch_mean": {"baseline": "batch_mean"},
    "leave_one_out": {"baseline": "leave_one_out"},
    "value": {"baseline": "value", **VALUE},
    "reinforce++": {
        "baseline": "none", "return_type": "reward_to_go", "whiten_advantages": True, "beta": 0.001
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_what_is_rewarded(config, mode):
    assert gain(dataclasses.replace(config, **MODES[mode])) > LEARNED


def mutated(monkeypatch, change):
    """From now on what was sampled is changed before it is learned from."""
    experience = pg._experience
    monkeypatch.setattr(pg, "_experience", lambda *arguments: change(experience(*arguments)))


@pytest.mark.parametrize("mode", ["leave_one_out", "value"])
def test_with_the_advantages_sign_flipped_it_would_not(config, mode, monkeypatch):
    mutated(monkeypatch, lambda made: dataclasses.replace(made, advantage=-made.advantage))
    assert gain(dataclasses.replace(config, **MODES[mode])) < 0.1


def test_with_the_mask_inverted_it_would_not(config, monkeypatch):
    mutated(monkeypatch, lambda made: dataclasses.replace(made, mask=~made.mask))
    assert gain(config) < 0.1


def test_with_each_advantage_on_its_rows_neighbour_it_would_not(config, monkeypatch):
    mutated(
        monkeypatch, lambda made: dataclasses.replace(made, advantage=made.advantage.roll(13, 0))
    )
    assert gain(config) < LEARNED / 2


@pytest.mark.parametrize("mode", ["batch_mean", "leave_one_out"])
def test_what_comes_for_nothing_hinders_only_without_a_baseline(config, mode):
    assert gain(dataclasses.replace(config, **MODES[mode]), raised) > LEARNED
    assert gain(dataclasses.replace(config, **MODES["none"]), raised) < LEARNED / 2


@pytest.mark.parametrize("kind", make.KINDS)
def test_it_runs_on_each_architecture(config, tmp_path, kind):
    model = save_tiny(tmp_path / kind, kind, initializer_range=0.05)
    run(config, model=model, max_steps=1, beta=0.1)
    (line,) = lines(config)
    assert abs(line["kl"]) < 1e-4 and line["grad_norm"] > 0


@pytest.mark.parametrize("options", [{}, MODES["value"]], ids=["batch_mean", "value"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, options):
    config = dataclasses.replace(
        config, lr_scheduler_type="constant", save_steps=2, beta=0.1, **options
    )
    run(config, max_steps=4)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    run(halves, max_steps=2)
    run(halves, max_steps=4, resume=True, overwrite_output_dir=False)
    assert same(config.output_dir, halves.output_dir)
    for line, other in zip(lines(config), lines(halves), strict=True):
        for name in set(line) - {"step_time", "tokens_per_second"}:
            assert line[name] == other[name], name


def test_the_metrics_carry_trls_names(config):
    result = run(config, eval_dataset=most_of(config.dataset), eval_steps=2)
    written = lines(config)
    assert [line["step"] for line in written] == [0, 1, 2, 2, 3, 4, 4]
    assert set(written[1]) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/digits/mean", "rewards/digits/std", "entropy",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "completions/unjudged", "num_tokens", "tokens_per_second",
        "step_time",
    }  # fmt: skip
    assert result.metrics == written[-2] | written[-1] and "eval/reward" in written[-1]


def test_completions_without_any_opinion_are_counted_and_left_alone(config):
    def silent(prompts, completions, **_):
        return [None] * len(completions)

    before = weights(config.model)
    for mode in MODES.values():
        result = run(config, silent, **(mode | {"max_steps": 1, "beta": 0.0}))
        assert result.metrics["completions/unjudged"] == 32
        assert all(torch.equal(v, before[name]) for name, v in weights(config.output_dir).items())
