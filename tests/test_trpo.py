"""TRPO's update on tiny models of several architectures, and the options that it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import actor_critic, grpo
from helpers.tiny import save_tiny, tiny_model

from rlcore.errors import TrainingDiverged, UserError
from rlcore.trainers import trpo
from rlcore.trainers.shared.natural_gradient import Fisher
from rlcore.trainers.trpo import (
    TRPOConfig,
    _policy,
    _surrogate_gradient,
    _update,
    train_trpo,
)

KINDS = ("gpt2", "llama", "qwen2", "gemma2")
OPTIONS = {"num_generations": 4, "cg_iterations": 4, "cg_damping": 0.1, "max_steps": 10}


def trpo_config(tmp_path: Path, **changes) -> TRPOConfig:
    common = {
        k: v for k, v in actor_critic.COMMON.items() if k not in ("learning_rate", "max_grad_norm")
    }
    return TRPOConfig(**(common | OPTIONS | {"output_dir": str(tmp_path / "run")} | changes))


def make_run(tmp_path, kind: str = "gpt2", **changes):
    return grpo.make_run(trpo_config(tmp_path, **changes), tiny_model(kind))


def update(run, made, step: int = 1, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, float]]:
    """(how each parameter moved, the metrics) of one update."""
    policy = _policy(run)
    before = [p.detach().clone() for p in policy.parameters.values()]
    metrics = _update(run, step, policy, made, seed)
    moved = [p.detach() - b for p, b in zip(policy.parameters.values(), before, strict=True)]
    return moved, metrics


def flat(vector) -> torch.Tensor:
    return torch.cat([part.reshape(-1).double() for part in vector])


def kl_curvature(policy, made, vector) -> torch.Tensor:
    """The Hessian of the mean KL(old || new) times the vector, by double backward."""
    parameters = list(policy.parameters.values())
    log_p = (policy.logits(made) / policy.temperature).log_softmax(-1)
    old = log_p.detach()
    kl = (old.exp() * (old - log_p)).sum(-1)[made.mask].mean()
    first = torch.autograd.grad(kl, parameters, create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(first, vector, strict=True))
    return flat(torch.autograd.grad(slope, parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_product_is_the_hessian_of_the_kl_times_the_vector(tmp_path, kind):
    run, made = make_run(tmp_path, kind, temperature=0.8), grpo.experience()
    run.policy.set_attn_implementation("eager")  # the only one with a double backward
    policy = _policy(run)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in policy.parameters.values()]
    found = flat(Fisher(policy, [made], float(made.mask.sum()))(vector))
    expected = kl_curvature(policy, made, vector)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_policy_gradient(tmp_path, kind):
    run, made = make_run(tmp_path, kind, temperature=0.8), grpo.experience()
    policy = _policy(run)
    gradient, metrics = _surrogate_gradient(run, 1, policy, [made], float(made.mask.sum()))
    logp, entropy = grpo.naive_logp(run.policy, made, 0.8)
    surrogate = (logp * made.advantage[:, None])[made.mask].mean()
    expected = flat(torch.autograd.grad(surrogate, list(policy.parameters.values())))
    assert (flat(gradient) - expected).norm() < 1e-5 * expected.norm()
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy[made.mask].mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_moves_every_architecture_within_its_trust_region(tmp_path, kind):
    moved, metrics = update(make_run(tmp_path, kind), grpo.experience())
    assert flat(moved).norm() > 0
    assert metrics["trpo/step_norm"] == pytest.approx(float(flat(moved).norm()), rel=1e-2)
    assert 0 < metrics["trpo/kl"] <= metrics["trpo/delta"] == 0.01
    assert metrics["trpo/improvement"] > 0 and metrics["trpo/expected_improvement"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_the_same_in_any_micro_batches(tmp_path, kind):
    made = grpo.experience()
    (whole, expected), (parts, found) = (
        update(
            make_run(
                tmp_path,
                kind,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            ),
            made,
        )
        for size in (8, 1)
    )
    assert (flat(parts) - flat(whole)).norm() < 1e-4 * flat(whole).norm()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_more_padding_changes_nothing(tmp_path):
    made = actor_critic.experience()
    plain, _ = update(make_run(tmp_path), made)
    padded, _ = update(make_run(tmp_path), actor_critic.padded(made))
    assert (flat(padded) - flat(plain)).norm() < 1e-4 * flat(plain).norm()


def test_a_part_of_the_rows_gives_another_direction_of_the_same_length(tmp_path):
    made = grpo.experience()
    whole, _ = update(make_run(tmp_path), made)
    one, metrics = update(make_run(tmp_path, fisher_rows=4), made)
    same, _ = update(make_run(tmp_path, fisher_rows=4), made)
    other, _ = update(make_run(tmp_path, fisher_rows=4), made, seed=1)
    assert torch.equal(flat(one), flat(same))
    for different in (whole, other):
        assert (flat(one) - flat(different)).norm() > 1e-2 * flat(one).norm()
    assert metrics["trpo/kl"] <= 0.01


def test_delta_goes_with_the_square_of_the_schedule(tmp_path):
    run = make_run(tmp_path, lr_min_ratio=0.1)
    deltas = [update(run, grpo.experience(), step)[1]["trpo/delta"] for step in (1, 6, 10)]
    # 1, 0.55 and 0.19 of the length
    assert deltas == pytest.approx([0.01, 0.01 * 0.55**2, 0.01 * 0.19**2])


def test_a_step_that_no_trial_accepts_leaves_the_weights_bit_identical(tmp_path, monkeypatch):
    natural_step = trpo.natural_step

    def backwards(*arguments, **options):
        found = natural_step(*arguments, **options)
        return found._replace(step=[-part for part in found.step])

    monkeypatch.setattr(trpo, "natural_step", backwards)
    moved, metrics = update(make_run(tmp_path, line_search_steps=3), grpo.experience())
    assert not flat(moved).any()
    assert metrics["trpo/step_fraction"] == metrics["trpo/kl"] == metrics["trpo/step_norm"] == 0.0
    assert metrics["trpo/line_search_steps"] == 3


def test_a_batch_without_a_difference_in_reward_leaves_the_weights_bit_identical(tmp_path):
    made = dataclasses.replace(grpo.experience(), advantage=torch.zeros(8))
    moved, metrics = update(make_run(tmp_path), made)
    assert not flat(moved).any()
    assert metrics["grad_norm"] == metrics["trpo/expected_improvement"] == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    made = grpo.experience()
    made.advantage[0] = torch.nan
    with pytest.raises(TrainingDiverged, match="step 1: grad_norm is nan"):
        update(make_run(tmp_path), made)


def test_only_parameters_that_can_be_trained_move(tmp_path):
    run = make_run(tmp_path)
    for name, parameter in run.policy.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
    update(run, grpo.experience())
    for name, parameter in run.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == ("mlp" not in name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"delta": 0.0}, "delta must be positive"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1"),
        ({"cg_damping": -0.1}, "cg_damping must be at least 0"),
        ({"fisher_rows": 0}, "fisher_rows must be at least 1"),
        ({"line_search_steps": 0}, "line_search_steps must be at least 1"),
        ({"line_search_shrink": 1.0}, r"line_search_shrink must be in \(0, 1\)"),
        ({"trained_parameters": []}, "trained_parameters is empty"),
        ({"baseline": "groups"}, "unknown baseline 'groups'. Did you mean 'group'"),
        ({"scale_rewards": "std"}, "unknown scale_rewards"),
        ({"baseline": "leave_one_out", "scale_rewards": "none"}, "scale_rewards is set"),
        ({"num_generations": 1}, "baseline group needs num_generations of at least 2"),
        ({"num_generations": 3}, "which num_generations"),
        ({"learning_rate": 1e-3}, "learning_rate is set, but has no effect"),
        ({"max_grad_norm": 0.5}, "max_grad_norm is set, but has no effect"),
        ({"lam": 0.9}, "lam is set, but has no effect"),
        ({"ref_model": "x"}, "ref_model is set, but has no effect"),
        ({"baseline": "value"}, "baseline value needs value_learning_rate"),
        (
            {"baseline": "value", "value_learning_rate": 1e-3, "value_backbone": "shared"},
            "value_backbone must be own",
        ),
        ({"lora_dropout": 0.1, "peft": "lora"}, "lora_dropout must be 0"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused_before_anything_is_read(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_trpo(trpo_config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_fits_no_parameter_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 8)
    config = trpo_config(
        tmp_path,
        model=save_tiny(tmp_path / "model"),
        dataset=str(tmp_path / "rows.jsonl"),
        trained_parameters=["*.no_such_layer.*"],
    )
    with pytest.raises(UserError, match="no_such_layer"):
        train_trpo(config)
    assert not (tmp_path / "run").exists()
