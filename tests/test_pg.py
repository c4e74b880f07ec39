"""The policy gradient: its loss against the formula; returns and baselines by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import actor_critic as make
from helpers import grpo as grpo_make
from helpers.tiny import tiny_model

import rlcore as rl
from rlcore.errors import UserError
from rlcore.models.heads import choose_head
from rlcore.trainers.options.pg import check_pg_config
from rlcore.trainers.pg import _experience, _update
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.policies import Policy

CUTS = [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
]
LOSSES = {
    "plain": {},
    "entropy": {"entropy_coef": 0.1},
    "k2": {"beta": 0.3, "kl_placement": "loss"},
    "k3": {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "k3"},
}
VALUE = {"baseline": "value", "return_type": "reward_to_go"}


def update(tmp_path, made, kind="gpt2", fused=False, **changes):
    """(metrics, gradient) of one optimizer step on `made`."""
    run, critic = make.make_run(make.pg_config(tmp_path, **changes), kind)
    run.head, _ = choose_head(run.policy, fused)
    critic = critic if run.config.baseline == "value" else None
    metrics = _update(run, critic, 1, made)
    return metrics, grpo_make.gradient(run.policy)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert expected.norm() > 0
    assert (actual - expected).norm() < tolerance * expected.norm()


def naive(made, *, kind="gpt2", entropy_coef=0.0, beta=0.0, kl_estimator="k2", **_):
    """(loss, gradient) by the formula, in float64."""
    model = tiny_model(kind).double()
    logp = make.naive_logp(model, made)[made.mask]
    loss = -made.advantage[made.mask].double() * logp
    if beta:
        gap = logp - made.ref_logp[made.mask].double()
        kl = {"k2": gap.square() / 2, "k3": (-gap).exp() - 1 + gap}[kl_estimator]
        loss = loss + beta * kl
    if entropy_coef:
        loss = loss - entropy_coef * grpo_make.naive_logp(model, made, 1.0)[1][made.mask]
    loss.mean().backward()
    return loss.mean().item(), grpo_make.gradient(model)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_loss_and_gradient_are_the_formulas(tmp_path, options):
    made = make.experience(ref=0.4)
    metrics, gradient = update(tmp_path, made, **options)
    loss, expected = naive(made, **options)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert_near(gradient, expected)


@pytest.mark.parametrize("kind", make.KINDS)
def test_they_are_so_through_the_fused_head_of_each_architecture(tmp_path, kind):
    made = make.experience(old=None)
    metrics, gradient = update(tmp_path, made, kind, fused=True)
    loss, expected = naive(made, kind=kind)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert_near(gradient, expected, 1e-4)


@pytest.mark.parametrize("cut", CUTS, ids=["2x4", "8x1"])
@pytest.mark.parametrize("options", [*LOSSES.values(), VALUE], ids=[*LOSSES, "value"])
def test_accumulated_micro_steps_are_the_large_batch(tmp_path, options, cut):
    made = make.experience(ref=0.4)
    expected, large = update(tmp_path, made, **options)
    metrics, gradient = update(tmp_path, made, **options, **cut)
    assert_near(gradient, large, 5e-6)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_padding_columns_change_nothing(tmp_path):
    made, options = make.experience(ref=0.4), LOSSES["k2"] | VALUE
    expected, large = update(tmp_path, made, **options)
    metrics, gradient = update(tmp_path, make.padded(made), **options)
    assert_near(gradient, large)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_value_model_goes_through_the_batch_as_often_as_it_is_told(tmp_path):
    made = make.experience()
    options = VALUE | {"value_learning_rate": 1e-2}
    losses = [
        update(tmp_path, made, num_value_epochs=epochs, **options)[0]["loss/value_avg"]
        for epochs in (1, 4)
    ]
    assert losses[1] < losses[0]


nan = math.nan
SCORES = [1.0, 0.0, nan, 2.0, -1.0, 0.5, 1.5, 0.0]
# row 2 was not judged, row 3 is out of the loss
COUNTED = [0, 1, 4, 5, 6, 7]


def judged(tmp_path, beta=0.1, **changes):
    """What is made of a sampled batch in two groups of four."""
    config = make.pg_config(tmp_path, num_generations=4, beta=beta, **changes)
    run, critic = make.make_run(config)
    critic = critic if config.baseline == "value" else None
    reference = Policy(tiny_model("gpt2", seed=5), run.head) if beta else None
    made = grpo_make.experience()
    batch = Sampled(made, torch.zeros(8, dtype=torch.bool), torch.tensor(SCORES), 0, {})
    return _experience(run, critic, reference, batch)


def naive_rewards(beta=0.1):
    """{row: its counted tokens' rewards}."""
    made = grpo_make.experience()
    logp, ref_logp = (make.naive_logp(tiny_model("gpt2", seed=seed), made) for seed in (0, 5))
    rows = {}
    for row in COUNTED:
        rows[row] = (-beta * (logp - ref_logp)[row, made.mask[row]]).tolist()
        rows[row][-1] += SCORES[row]
    return rows


def check(found, expected):
    """`expected` holds {row: values of its counted tokens}; elsewhere there must be 0."""
    made = grpo_make.experience()
    for row in range(8):
        values = torch.zeros(made.mask.shape[1])
        if row in expected:
            values[made.mask[row]] = torch.tensor(expected[row]).float()
        assert torch.allclose(found[row], values, atol=1e-4), row


def test_with_no_baseline_a_token_has_its_whole_sequences_reward(tmp_path):
    rewards = naive_rewards()
    found = judged(tmp_path, baseline="none").advantage
    check(found, {row: [sum(own)] * len(own) for row, own in rewards.items()})


def test_or_the_discounted_reward_to_go(tmp_path):
    options = {"baseline": "none", "return_type": "reward_to_go", "gamma": 0.9}
    expected = {
        row: [sum(0.9**k * r for k, r in enumerate(own[t:])) for t in range(len(own))]
        for row, own in naive_rewards().items()
    }
    check(judged(tmp_path, **options).advantage, expected)


def test_the_batchs_mean_is_that_of_its_judged_completions(tmp_path):
    totals = {row: sum(own) for row, own in naive_rewards().items()}
    lengths = {row: len(own) for row, own in naive_rewards().items()}
    mean = sum(totals.values()) / 6
    expected = {row: [total - mean] * lengths[row] for row, total in totals.items()}
    check(judged(tmp_path, baseline="batch_mean").advantage, expected)


def test_leave_one_out_compares_with_the_groups_other_judged_completions(tmp_path):
    rewards = naive_rewards()
    totals = {row: sum(own) for row, own in rewards.items()}
    expected = {}
    for row, own in rewards.items():
        others = [totals[r] for r in COUNTED if r // 4 == row // 4 and r != row]
        to_go = [sum(own[t:]) for t in range(len(own))]
        expected[row] = [g - sum(others) / len(others) for g in to_go]
    options = {"baseline": "leave_one_out", "return_type": "reward_to_go"}
    check(judged(tmp_path, **options).advantage, expected)


def test_the_value_baseline_is_the_value_models(tmp_path):
    made = grpo_make.experience()
    values = make.naive_values(make.tiny_classifier(), made).detach()
    expected = {}
    for row, own in naive_rewards().items():
        to_go = torch.tensor([sum(own[t:]) for t in range(len(own))])
        expected[row] = (to_go - values[row, made.mask[row]]).tolist()
    found = judged(tmp_path, **VALUE)
    check(found.advantage, expected)
    assert torch.equal(
        found.returns, torch.where(found.mask, found.advantage + found.value, 0.0)
    ) or torch.allclose(found.returns[found.mask], (found.advantage + found.value)[found.mask])


def test_whitened_rewards_to_go_are_reinforce_plus_plus(tmp_path):
    options = {"baseline": "none", "return_type": "reward_to_go"}
    plain = judged(tmp_path, **options)
    found = judged(tmp_path, whiten_advantages=True, **options)
    assert torch.allclose(found.advantage, rl.whiten(plain.advantage, plain.mask), atol=1e-6)


def test_a_kl_in_the_loss_is_none_in_the_reward(tmp_path):
    found = judged(tmp_path, baseline="none", kl_placement="loss")
    without = judged(tmp_path, beta=0.0, baseline="none")
    assert torch.equal(found.advantage, without.advantage)
    assert found.ref_logp is not None and without.ref_logp is None


def test_leave_one_out_leaves_out_what_nobody_judged():
    reward = torch.tensor([1.0, nan, 3.0, 0.0, nan, nan])
    found = rl.leave_one_out_advantage(reward, 3)
    assert found.tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "mean"}, "unknown baseline 'mean'"),
        ({"return_type": "togo"}, "unknown return_type 'togo'"),
        ({"kl_placement": "los", "beta": 0.1}, "unknown kl_placement 'los'. Did you mean 'loss'"),
        ({"kl_estimator": "k4", "beta": 0.1}, "unknown kl_estimator 'k4'"),
        ({"baseline": "leave_one_out"}, "needs num_generations of at least 2, not 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"num_generations": 3}, "8 x 1 = 8 completions at a time, which num_generations"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"kl_placement": "loss"}, "kl_placement is set, but has no effect here: beta is 0"),
        ({"kl_placement": "loss", "beta": 0.1, "kl_estimator": "k1"}, "k1 does nothing"),
        ({"ref_model": "x"}, "with beta 0 no reference is used"),
        ({"gamma": 0.9}, "return_type 'sequence' discounts nothing"),
        ({"baseline": "value"}, "set return_type reward_to_go with it"),
        ({"value_learning_rate": 0.1}, "baseline 'batch_mean' has no value model"),
        (VALUE | {"value_backbone": "shared", "num_value_epochs": 2}, "num_value_epochs is set"),
        (VALUE | {"num_value_epochs": 0}, "num_value_epochs must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_pg_config(make.pg_config(tmp_path, **changes), 1)


def test_the_default_options_are_fine(tmp_path):
    check_pg_config(make.pg_config(tmp_path), 1)
    check_pg_config(dataclasses.replace(make.pg_config(tmp_path), **VALUE), 1)
