"""PPO's updates: the losses against the paper's, whatever the batches are cut into."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import actor_critic as make
from helpers import grpo as grpo_make
from helpers.tiny import tiny_model

from rlcore.models.heads import choose_head
from rlcore.trainers import pg, ppo
from rlcore.trainers import ppo_update as ppo_steps
from rlcore.trainers.ppo import _train
from rlcore.trainers.ppo_update import update as ppo_update
from rlcore.trainers.ppo_update import warm_up
from rlcore.trainers.shared.critic import actor_critic_step

EVERYTHING = torch.arange(8)
CUTS = [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
]
BACKBONES = ["own", "shared"]


def update(tmp_path, made, kind="gpt2", fused=False, **changes):
    """(metrics, policy gradient, value gradient) of one optimizer step on the whole of `made`."""
    run, critic = make.make_run(make.ppo_config(tmp_path, **changes), kind)
    run.head, _ = choose_head(run.policy, fused)
    metrics = ppo_update(run, critic, 1, made, EVERYTHING, run.config.penalty_coef)
    return metrics, grpo_make.gradient(run.policy), grpo_make.gradient(critic.run.model)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert expected.norm() > 0
    assert (actual - expected).norm() < tolerance * expected.norm()


def naive(made, kl_mode="clip", backbone="own", kind="gpt2", cliprange_value=0.2):
    """(losses, policy gradient, value gradient) by the formulas, in float64."""
    model, head = tiny_model(kind).double(), make.tiny_head().double()
    classifier = make.tiny_classifier(kind).double()
    policy = make.naive_policy_loss(model, made, kl_mode)
    if backbone == "own":
        critic = classifier
        value = make.naive_value_loss(make.naive_values(classifier, made), made, cliprange_value)
        (policy + value).backward()
    else:
        critic = head
        values = make.naive_hidden_values(model, head, made)
        value = make.naive_value_loss(values, made, cliprange_value)
        (policy + 0.1 * value).backward()
    gradients = grpo_make.gradient(model), grpo_make.gradient(critic)
    return (policy.item(), value.item()), *gradients


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kl_mode", ["clip", "penalty"])
def test_losses_and_gradients_are_the_formulas(tmp_path, kl_mode, backbone):
    made = make.experience()
    metrics, policy, value = update(tmp_path, made, kl_mode=kl_mode, value_backbone=backbone)
    losses, expected_policy, expected_value = naive(made, kl_mode, backbone)
    found = metrics["loss/policy_avg"], metrics["loss/value_avg"]
    assert found == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert_near(policy, expected_policy)
    assert_near(value, expected_value)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", make.KINDS)
def test_they_are_so_through_the_fused_head_of_each_architecture(tmp_path, kind, backbone):
    made = make.experience()
    made = dataclasses.replace(made, old_logp=_near_logp(kind, made))
    found = update(tmp_path, made, kind, fused=True, value_backbone=backbone)
    losses, policy, value = naive(made, "clip", backbone, kind)
    assert found[0]["loss/policy_avg"] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    assert found[0]["loss/value_avg"] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    assert_near(found[1], policy, 1e-4)
    assert_near(found[2], value, 1e-4)


def _near_logp(kind, made):
    logp = make.naive_logp(tiny_model(kind), made).detach().float()
    return logp + 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kl_mode", ["clip", "penalty"])
def test_at_ratio_one_the_gradient_is_the_policy_gradients(tmp_path, kl_mode):
    made = make.experience(old=0.0)
    _, gradient, _ = update(tmp_path, made, kl_mode=kl_mode)
    run, _ = make.make_run(make.pg_config(tmp_path))
    pg._update(run, None, 1, made)
    assert_near(gradient, grpo_make.gradient(run.policy), 1e-5)


def test_away_from_it_it_is_not(tmp_path):
    made = make.experience(old=0.3)
    _, gradient, _ = update(tmp_path, made)
    run, _ = make.make_run(make.pg_config(tmp_path))
    pg._update(run, None, 1, made)
    expected = grpo_make.gradient(run.policy)
    assert (gradient - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("cut", CUTS, ids=["2x4", "8x1"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kl_mode", ["clip", "penalty"])
def test_accumulated_micro_steps_are_the_large_batch(tmp_path, kl_mode, backbone, cut):
    made = make.experience(ref=0.4)
    options = {"kl_mode": kl_mode, "value_backbone": backbone, "entropy_coef": 0.05}
    expected = update(tmp_path, made, **options)
    metrics, *gradients = update(tmp_path, made, **options, **cut)
    for gradient, large in zip(gradients, expected[1:], strict=True):
        assert_near(gradient, large, 5e-6)
    for name, value in expected[0].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("part", ["policy", "value"])
def test_micro_steps_that_count_for_themselves_would_not_be(tmp_path, part, monkeypatch):
    made = make.experience()
    expected = update(tmp_path, made)

    def own_count(*arguments):
        *others, policy_loss, value_loss = arguments
        of = dict(policy=policy_loss, value=value_loss)
        items, total = made.mask.sum(), made.mask.sum()

        def wrong(rows, *value):
            return of[part](rows, *value) * items / (4 * made.mask[rows].sum().clamp(min=1))

        of_both = of | {part: wrong}
        assert total == items
        return actor_critic_step(*others, of_both["policy"], of_both["value"])

    monkeypatch.setattr(ppo_steps, "actor_critic_step", own_count)
    found = update(tmp_path, made, **CUTS[1])
    index = 1 if part == "policy" else 2
    assert (found[index] - expected[index]).norm() > 1e-2 * expected[index].norm()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_columns_change_nothing(tmp_path, backbone):
    made = make.experience(ref=0.4)
    expected = update(tmp_path, made, value_backbone=backbone)
    metrics, *gradients = update(tmp_path, make.padded(made), value_backbone=backbone)
    for gradient, large in zip(gradients, expected[1:], strict=True):
        assert_near(gradient, large)
    assert metrics == pytest.approx(expected[0], rel=1e-5, abs=1e-6)


def test_the_metrics_are_what_their_names_say(tmp_path):
    made = make.experience(ref=0.4)
    metrics, *_ = update(tmp_path, made)
    model = tiny_model("gpt2").double()
    logp, entropy = grpo_make.naive_logp(model, made, 1.0)
    log_ratio = (logp - made.old_logp)[made.mask]
    advantage = made.advantage[made.mask]
    ratio = log_ratio.exp()
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    values = make.naive_values(make.tiny_classifier().double(), made)
    value, old, returns = (x[made.mask].double() for x in (values, made.value, made.returns))
    held = value.clamp(old - 0.2, old + 0.2)
    gap = (made.ref_logp - logp)[made.mask]
    expected = {
        "entropy": entropy[made.mask].mean(),
        "kl": (gap.exp() - 1 - gap).mean(),
        "policy/approxkl_avg": log_ratio.square().mean() / 2,
        "val/ratio": ratio.mean(),
        "policy/clipfrac_avg": clipped.double().mean(),
        "val/clipfrac_avg": ((held - returns).abs() > (value - returns).abs()).double().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4), name
    assert metrics["policy/entropy_avg"] == metrics["entropy"]


def trained(tmp_path, made, step=1, **changes):
    """(the updates' metrics, run, critic, policy before, value model before)."""
    changes = {"learning_rate": 3e-3} | changes
    run, critic = make.make_run(make.ppo_config(tmp_path, **changes))
    before = [copy.deepcopy(model.state_dict()) for model in (run.policy, critic.run.model)]
    run.coefficients = {"kl_coef": 0.1, "penalty_coef": 1.0}
    return _train(run, critic, step, made, 0), run, critic, *before


def unchanged(model, before, tolerance=0.0) -> bool:
    now = model.state_dict()
    return all((value - before[name]).abs().max() <= tolerance for name, value in now.items())


def test_a_batch_is_gone_through_in_epochs_and_mini_batches(tmp_path, monkeypatch):
    seen = []
    real = ppo.update

    def spy(run, critic, step, made, rows, *rest):
        seen.append(rows.tolist())
        return real(run, critic, step, made, rows, *rest)

    monkeypatch.setattr(ppo, "update", spy)
    options = {"num_ppo_epochs": 3, "num_mini_batches": 2, "per_device_train_batch_size": 4}
    metrics, *_ = trained(tmp_path, make.experience(old=0.0), **options)
    assert metrics["policy/updates"] == 6 and [len(rows) for rows in seen] == [4] * 6
    passes = [seen[index] + seen[index + 1] for index in (0, 2, 4)]
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert len(set(map(tuple, passes))) == 3


def test_updates_end_where_the_policy_went_too_far(tmp_path):
    made = make.experience(old=0.0)
    free, *_ = trained(tmp_path, made, num_ppo_epochs=6)
    held, *_ = trained(tmp_path, made, num_ppo_epochs=6, target_kl=1e-3)
    never, *_ = trained(tmp_path, made, num_ppo_epochs=6, target_kl=1e6)
    assert free["policy/updates"] == never["policy/updates"] == 6
    assert 1 < held["policy/updates"] < 6


def test_a_warm_up_moves_the_value_model_alone(tmp_path):
    made = make.experience()
    metrics, run, critic, policy, value = trained(tmp_path, made, step=2, value_warmup_steps=2)
    assert unchanged(run.policy, policy) and not unchanged(critic.run.model, value)
    assert metrics["loss/value_avg"] > 0 and "loss/policy_avg" not in metrics
    metrics, run, critic, policy, value = trained(tmp_path, made, step=3, value_warmup_steps=2)
    assert not unchanged(run.policy, policy) and "loss/policy_avg" in metrics


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_value_model_has_a_learning_rate_of_its_own(tmp_path, backbone):
    options, made = {"value_backbone": backbone}, make.experience()
    rates = {"value_learning_rate": 1e-30}
    _, run, critic, policy, value = trained(tmp_path, made, **options, **rates)
    assert not unchanged(run.policy, policy)
    assert unchanged(critic.run.model, value, 1e-20)
    rates = {"learning_rate": 1e-30, "value_learning_rate": 1e-2}
    _, run, critic, policy, value = trained(tmp_path, made, **options, **rates)
    assert unchanged(run.policy, policy, 1e-20)
    assert not unchanged(critic.run.model, value, 1e-3)


def test_fitting_lessens_the_value_loss(tmp_path):
    made = make.experience()
    run, critic = make.make_run(make.ppo_config(tmp_path, learning_rate=1e-2, cliprange_value=None))
    losses = [warm_up(run, critic, 1, made, EVERYTHING)["loss/value_avg"] for _ in range(10)]
    assert losses[-1] < losses[0] / 2
