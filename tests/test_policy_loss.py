"""policy_loss: loss, statistics and gradient of both backends, held against float64."""

from __future__ import annotations

import pytest
import torch
from helpers.batteries import ALL, EVERYTHING
from helpers.cases import LAYOUTS, batch, flat, policy_inputs
from helpers.checks import check_policy_loss

import rlcore as rl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
OPTIONS = {
    "alone": {},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 0.3},
    "clip_of_the_low_side_only": {"epsilon": 0.3, "epsilon_high": 1e9},
    "dual_clip": {"delta": 1.5},
    "entropy_bonus": {"entropy_coef": 0.05},
    "negative_entropy_bonus": {"entropy_coef": -0.05},
    "temperature_low": {"temperature": 0.1},
    "temperature_high": {"temperature": 10.0},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(logits, device, backend, *names, upstream=1.0, masked=0.3, **options):
    inputs = policy_inputs(logits, *names, masked=masked, **options)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, v", [(5, 1), (5, 2), (5, 127), (5, 1000), (3, 50257)])
def test_loss_and_gradient_are_no_worse_than_eager(n, v, dtype, device, backend):
    check(flat(n, v, dtype), device, backend, *ALL, **EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_is_served(layout, dtype, device, backend):
    check(LAYOUTS[layout](dtype), device, backend, *ALL, **EVERYTHING)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ppo_clip_follows_its_options(options, device, backend):
    check(flat(32, 130, torch.float32), device, backend, "old_logp", **options)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_reinforce_is_the_policy_gradient(entropy_coef, device, backend):
    options = {"surrogate": "reinforce", "entropy_coef": entropy_coef}
    check(flat(8, 130, torch.float32), device, backend, "mask", **options)


def test_without_old_logp_the_ratio_is_one_and_its_gradient_stays(device, backend):
    check(flat(8, 130, torch.float32), device, backend, epsilon=0.2)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3", "k3_ratio"])
@pytest.mark.parametrize("surrogate", ["reinforce", "ppo_clip"])
def test_each_kl_estimator_enters_loss_and_gradient(surrogate, kl_estimator, beta, device, backend):
    names = ("ref_logp", "mask") if surrogate == "reinforce" else ("old_logp", "ref_logp", "mask")
    options = {"surrogate": surrogate, "kl_estimator": kl_estimator, "beta": beta}
    check(flat(12, 130, torch.float32), device, backend, *names, **options)


def test_the_importance_ratio_weighs_the_surrogate_alone(device, backend):
    check(flat(12, 130, torch.float32), device, backend, *ALL, beta=0.2, entropy_coef=0.1)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["local", "int", "tensor"])
@pytest.mark.parametrize("mode", MODES)
def test_aggregations_of_a_batch(mode, num_items, device, backend):
    options = {"loss_agg_mode": mode, "num_items": num_items}
    check(batch(3, 5, 40, torch.float32), device, backend, "old_logp", "mask", **options)


@pytest.mark.parametrize("mode", MODES)
def test_aggregations_of_packed_tokens(mode, device, backend):
    options = {"loss_agg_mode": mode}
    if mode != "token-mean":
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    if mode == "seq-mean-token-sum-norm":
        options["norm_length"] = 9
    check(flat(11, 40, torch.float32), device, backend, "old_logp", "mask", **options)


def test_norm_length_divides_instead_of_the_width(device, backend):
    options = {"loss_agg_mode": "seq-mean-token-sum-norm", "norm_length": 12}
    check(batch(3, 5, 40, torch.float32), device, backend, "mask", **options)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_without_a_counted_token_is_not_counted(mode, device, backend):
    inputs = policy_inputs(batch(3, 4, 40, torch.float32), "old_logp", loss_agg_mode=mode)
    inputs.options["mask"] = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


def test_one_advantage_a_sequence_spreads_over_its_tokens(device, backend):
    inputs = policy_inputs(batch(3, 4, 40, torch.float32), "old_logp", "mask", masked=0.3)
    inputs.advantage = torch.randn(3)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [-1.0, 1.7, 1e-3, 0.0])
def test_the_gradient_of_the_loss_may_be_scaled(upstream, dtype, device, backend):
    logits = flat(5, 127, dtype)
    check(logits, device, backend, *ALL, upstream=upstream, num_items=1, **EVERYTHING)


@pytest.mark.parametrize("columns", [slice(0, 8500), slice(0, 3), slice(100, 9001)], ids=str)
def test_banned_tokens_change_nothing_else(columns, device, backend):
    logits = flat(3, 9001, torch.float32)
    logits[:, columns] = -float("inf")
    inputs = policy_inputs(logits, "ref_logp", beta=0.1, entropy_coef=0.1)
    inputs.target = logits.argmax(-1)
    inputs.options["ref_logp"] = torch.full((3,), -2.0)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_may_hold_anything_anywhere(rubbish, device, backend):
    inputs = policy_inputs(flat(6, 130, torch.bfloat16), *ALL, **EVERYTHING)
    mask = inputs.options["mask"] = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    for x in (inputs.logits, inputs.advantage, *(inputs.options[name] for name in ALL[:3])):
        x[~mask] = rubbish
    inputs.target[~mask] = torch.tensor([-100, 130, 2**40])
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_with_every_token_masked_gives_a_differentiable_zero(mode, device, backend):
    z = torch.full((2, 3, 50), float("nan"), device=device, requires_grad=True)
    target = torch.full((2, 3), -100, device=device)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    advantage = torch.ones(2, device=device)
    out = rl.policy_loss(z, target, advantage, mask=mask, loss_agg_mode=mode, backend=backend)
    assert out.loss.item() == 0
    out.loss.backward()
    assert not z.grad.any() and not out.clipped.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_extreme_logits_lose_no_accuracy(offset, device, backend):
    logits = flat(4, 300, torch.float32).add(offset)
    check(logits, device, backend, "old_logp", "ref_logp", **EVERYTHING)


def test_logits_of_both_extremes_stay_finite(device, backend):
    inputs = policy_inputs(torch.randn(3, 300).sign() * 1e4)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)
