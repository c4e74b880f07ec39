"""Whole TRPO runs on tiny models: that they learn, and what of them is needed for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import actor_critic as make
from helpers.tiny import most_of, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlcore.cli import main
from rlcore.errors import TrainingDiverged, UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import trpo
from rlcore.trainers.options.trpo import ADVANTAGES
from rlcore.trainers.shared import online
from rlcore.trainers.trpo import TRPOConfig, train_trpo


def digits(prompts, completions, **_):
    """The share of digits among a completion's characters."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def raised(prompts, completions, **_):
    """Much of it comes for nothing."""
    return [reward + 2.0 for reward in digits(prompts, completions)]


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return TRPOConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        delta=0.05,
        cg_iterations=4,
        per_device_train_batch_size=32,
        max_completion_length=4,
        max_steps=4,
    )


def run(config, reward=digits, **changes):
    changes = {"overwrite_output_dir": True} | changes
    return train_trpo(dataclasses.replace(config, **changes), reward_funcs=[reward])


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(one, two) -> bool:
    one, two = weights(one), weights(two)
    return all(torch.equal(value, two[name]) for name, value in one.items())


def gain(config, reward=digits) -> float:
    """How much the reward rose in twelve steps."""
    run(
        config,
        reward,
        max_steps=12,
        delta=0.3,
        fisher_rows=16,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
    )
    rewards = [line["reward"] for line in lines(config)]
    return sum(rewards[-3:]) / 3 - rewards[0]


# of 1
LEARNED = 0.5
VALUE = {"baseline": "value", "value_learning_rate": 3e-3, "num_value_epochs": 4}
MODES = {
    "group": {},
    "leave_one_out": {"baseline": "leave_one_out"},
    "batch_mean": {"baseline": "batch_mean"},
    "value": VALUE,
}


@pytest.mark.parametrize("mode", ["group", "leave_one_out", "batch_mean"])
def test_it_learns_what_is_rewarded_beside_what_comes_for_nothing(config, mode):
    assert gain(dataclasses.replace(config, **MODES[mode]), raised) > LEARNED


def test_without_a_baseline_it_would_not(config, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "batch_mean", lambda scores, config: scores)
    assert gain(dataclasses.replace(config, baseline="batch_mean"), raised) < LEARNED / 4


def test_it_learns_with_a_value_model(config):
    assert gain(dataclasses.replace(config, **VALUE)) > LEARNED


def mutated(monkeypatch, change):
    """From now on what was sampled is changed before it is learned from."""
    experience = trpo._experience
    monkeypatch.setattr(trpo, "_experience", lambda *arguments: change(experience(*arguments)))


def test_with_the_advantages_sign_flipped_it_would_not(config, monkeypatch):
    mutated(monkeypatch, lambda made: dataclasses.replace(made, advantage=-made.advantage))
    assert gain(config) < LEARNED / 4


def test_with_the_gradients_sign_flipped_the_line_search_would_let_nothing_through(
    config, monkeypatch
):
    surrogate_gradient = trpo._surrogate_gradient

    def flipped(*arguments):
        gradient, metrics = surrogate_gradient(*arguments)
        return [-part for part in gradient], metrics

    monkeypatch.setattr(trpo, "_surrogate_gradient", flipped)
    assert gain(config) < LEARNED / 4


def test_with_the_mask_inverted_it_would_not(config, monkeypatch):
    mutated(monkeypatch, lambda made: dataclasses.replace(made, mask=~made.mask))
    assert gain(config) < LEARNED / 4


def test_with_each_advantage_on_its_rows_neighbour_it_would_not(config, monkeypatch):
    mutated(
        monkeypatch, lambda made: dataclasses.replace(made, advantage=made.advantage.roll(13, 0))
    )
    assert gain(config) < LEARNED / 4


@pytest.mark.parametrize("kind", make.KINDS)
def test_it_runs_on_each_architecture(config, tmp_path, kind):
    model = save_tiny(tmp_path / kind, kind, initializer_range=0.05)
    run(config, model=model, max_steps=1)
    (line,) = lines(config)
    assert 0 < line["trpo/kl"] <= 0.05 and line["trpo/improvement"] > 0


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_it_runs_as_other_trainers_do(config, options):
    run(config, max_steps=1, **options)
    (line,) = lines(config)
    assert 0 < line["trpo/kl"] <= 0.05 and line["trpo/improvement"] > 0


def test_an_adapter_moves_and_the_model_beside_it_does_not(config, tmp_path):
    result = run(config, peft="lora", lora_r=4)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    before = weights(config.model)
    after = {name.replace(".base_layer", ""): p for name, p in result.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.any() for name, p in result.model.named_parameters() if "lora_B" in name), (
        "an adapter starts at 0"
    )
    # a batch of equal rewards moves nothing
    assert all((line["trpo/kl"] > 0) == (line["grad_norm"] > 0) for line in lines(config))
    assert all(line["trpo/kl"] <= line["trpo/delta"] for line in lines(config))


def test_only_named_parameters_move(config):
    run(config, max_steps=1, trained_parameters=["*.mlp.*", "model.norm.weight"])
    before, after = weights(config.model), weights(config.output_dir)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if ".mlp." in n or n == "model.norm.weight"}


@pytest.mark.parametrize("options", [{"fisher_rows": 8}, VALUE], ids=["fisher_rows", "value"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, options):
    config = dataclasses.replace(config, lr_scheduler_type="constant", save_steps=2, **options)
    run(config, max_steps=4)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    run(halves, max_steps=2)
    run(halves, max_steps=4, resume=True, overwrite_output_dir=False)
    assert same(config.output_dir, halves.output_dir)
    for line, other in zip(lines(config), lines(halves), strict=True):
        for name in set(line) - {"step_time", "tokens_per_second"}:
            assert line[name] == other[name], name


def test_the_value_model_is_saved_as_it_was_fitted(config, monkeypatch):
    made, load = [], online.load_critic

    def spy(*arguments):
        made.append(load(*arguments))
        return made[-1]

    monkeypatch.setattr(online, "load_critic", spy)
    run(config, max_steps=1, **VALUE)
    saved = load_file(Path(config.output_dir) / "value_model" / "model.safetensors")
    fitted = made[0].run.policy.classifier.state_dict()
    assert saved.keys() == fitted.keys()
    assert all(torch.equal(value, fitted[name]) for name, value in saved.items())
    assert saved["score.weight"].any(), "it starts at 0"


def test_a_step_that_is_not_finite_stops_the_run_and_moves_nothing(config, monkeypatch):
    step = trpo.natural_step
    monkeypatch.setattr(
        trpo, "natural_step", lambda *a, **k: step(*a, **k)._replace(expected=float("nan"))
    )
    with pytest.raises(TrainingDiverged, match="step 1: trpo/expected_improvement is nan"):
        run(config)
    assert not (Path(config.output_dir) / "config.json").exists()


def test_the_metrics_say_how_each_step_was_found(config):
    result = run(config, eval_dataset=most_of(config.dataset), eval_steps=2)
    written = lines(config)
    assert [line["step"] for line in written] == [0, 1, 2, 2, 3, 4, 4]
    assert set(written[1]) == {
        "step", "epoch", "grad_norm", "reward", "reward_std", "frac_reward_zero_std",
        "rewards/digits/mean", "rewards/digits/std", "entropy", "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "completions/unjudged", "num_tokens", "tokens_per_second", "step_time",
        "trpo/expected_improvement", "trpo/improvement", "trpo/delta", "trpo/kl", "trpo/first_kl",
        "trpo/step_fraction", "trpo/line_search_steps", "trpo/step_norm", "trpo/cg_residual",
        "trpo/cg_iterations",
    }  # fmt: skip
    assert result.metrics == written[-2] | written[-1] and "eval/reward" in written[-1]


def test_completions_without_any_opinion_are_counted_and_leave_the_weights_alone(config):
    def silent(prompts, completions, **_):
        return [None] * len(completions)

    for mode in MODES.values():
        result = run(config, silent, **(mode | {"max_steps": 1}))
        assert result.metrics["completions/unjudged"] == 32
        assert same(config.model, config.output_dir)


def test_a_model_without_forward_derivatives_is_refused_before_anything_is_written(
    config, monkeypatch
):
    monkeypatch.setattr(trpo, "supports_forward_ad", lambda *arguments: "no such rule")
    with pytest.raises(UserError, match="has no forward derivative: no such rule"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_the_command_line_knows_it(config, capsys):
    flags = ["--model", config.model, "--dataset", config.dataset, "--output_dir", "unused"]
    assert main(["train", "trpo", *flags, "--delta", "0"]) == 2
    assert "delta must be positive" in capsys.readouterr().err
