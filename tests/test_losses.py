"""Losses on per-token values and on pairs: clipped value loss, KL estimators, Bradley-Terry."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracle import KL

import rlcore as rl


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(*shape: int) -> tuple[torch.Tensor, ...]:
    """value, old_value and returns, near enough that the clip holds some and not others."""
    value, step, error = torch.randn(3, *shape, dtype=torch.float64)
    return value.requires_grad_(), value.detach() + 0.3 * step, value.detach() + error


def naive_value_loss(value, old_value, returns, mask, epsilon: float):
    """The loss, its gradient and the share of clipped tokens, token by token."""
    total, gradient, clipped = 0.0, torch.zeros_like(value), 0
    for i in mask.nonzero().tolist():
        v, old, target = (x[tuple(i)].item() for x in (value, old_value, returns))
        near = min(max(v, old - epsilon), old + epsilon)
        plain, held = (v - target) ** 2, (near - target) ** 2
        total += 0.5 * max(plain, held)
        is_held = held > plain and near != v
        clipped += is_held
        gradient[tuple(i)] = 0.0 if is_held else v - target
    count = int(mask.sum())
    return total / count, gradient / count, clipped


@pytest.mark.parametrize("shape", [(40,), (5, 8)], ids=str)
def test_value_loss_and_its_gradient_equal_the_loop_over_tokens(shape):
    value, old_value, returns = inputs(*shape)
    mask = torch.rand(shape) < 0.7
    loss = rl.value_loss(value, old_value, returns, epsilon=0.25, mask=mask)
    (dvalue,) = torch.autograd.grad(loss, value)
    total, gradient, clipped = naive_value_loss(value, old_value, returns, mask, 0.25)
    assert clipped > 2
    torch.testing.assert_close(loss.item(), total)
    torch.testing.assert_close(dvalue, gradient)


def test_value_loss_has_zero_gradient_where_the_clip_holds():
    value = torch.tensor([0.0], requires_grad=True)
    loss = rl.value_loss(value, torch.tensor([-1.0]), torch.tensor([0.5]), epsilon=0.25)
    (dvalue,) = torch.autograd.grad(loss, value)
    assert loss.item() == 0.5 * 1.25**2 and dvalue.item() == 0


def test_an_infinite_epsilon_does_not_clip():
    value, old_value, returns = inputs(40)
    loss = rl.value_loss(value, old_value, returns, epsilon=float("inf"))
    torch.testing.assert_close(loss, 0.5 * (value - returns).square().mean())


def test_masked_values_may_be_nan_and_get_zero_gradient():
    value, old_value, returns = inputs(6)
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    hidden = [torch.where(mask, x.detach(), float("nan")) for x in (value, old_value, returns)]
    leaf = hidden[0].requires_grad_()
    loss = rl.value_loss(*hidden, mask=mask)
    (dvalue,) = torch.autograd.grad(loss, leaf)
    kept = rl.value_loss(value[mask], old_value[mask], returns[mask])
    torch.testing.assert_close(loss, kept)
    assert dvalue.isfinite().all() and not dvalue[~mask].any() and dvalue[mask].any()


def test_an_all_masked_batch_gives_a_differentiable_zero():
    value, old_value, returns = inputs(6)
    loss = rl.value_loss(value, old_value, returns, mask=torch.zeros(6, dtype=torch.bool))
    (dvalue,) = torch.autograd.grad(loss, value)
    assert loss.item() == 0 and not dvalue.any()


def test_micro_batches_with_num_items_add_up_to_the_batch():
    value, old_value, returns = inputs(6, 5)
    mask = torch.rand(6, 5) < 0.6
    whole = rl.value_loss(value, old_value, returns, mask=mask)
    count = mask.sum()
    parts = [
        rl.value_loss(value[i], old_value[i], returns[i], mask=mask[i], num_items=count)
        for i in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_half_precision_values_are_judged_in_float32():
    value, old_value, returns = (x.detach().bfloat16() for x in inputs(40))
    loss = rl.value_loss(value, old_value, returns)
    wide = rl.value_loss(value.double(), old_value.double(), returns.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "value, gradient",
    # old value 0, return 2, clip 0.5: a step of 1 towards the return went too far to go further
    [(1.0, 0.0), (0.3, -1.7), (-1.0, -3.0), (3.0, 0.0)],
)
def test_a_value_that_moved_far_towards_its_return_gets_no_gradient(value, gradient):
    value = torch.tensor([value], requires_grad=True)
    loss = rl.value_loss(value, torch.zeros(1), torch.full((1,), 2.0), epsilon=0.5)
    assert torch.autograd.grad(loss, value)[0].item() == pytest.approx(gradient)


def test_the_value_loss_gives_no_gradient_to_old_values_and_returns():
    value, old, returns = torch.randn(3, 6).requires_grad_().unbind()
    loss = rl.value_loss(value, old, returns)
    grads = torch.autograd.grad(loss, (value, old, returns), allow_unused=True)
    assert grads[0].any() and not any(g is not None and g.any() for g in grads[1:])


@pytest.mark.parametrize("kl_estimator", KL)
def test_token_kl_and_its_gradients_equal_the_formula(kl_estimator):
    logp, ref_logp = (-torch.rand(2, 4, 5, dtype=torch.float64)).unbind()
    ours, theirs = ([x.clone().requires_grad_() for x in (logp, ref_logp)] for _ in range(2))
    kl, formula = rl.token_kl(*ours, kl_estimator=kl_estimator), KL[kl_estimator](*theirs)
    torch.testing.assert_close(kl, formula)
    for a, b in zip(ours, theirs, strict=True):
        (da,), (db,) = (
            torch.autograd.grad(kl.sum(), a, retain_graph=True),
            torch.autograd.grad(formula.sum(), b, retain_graph=True),
        )
        torch.testing.assert_close(da, db)


def test_k3_does_not_cancel_for_policies_that_are_close():
    logp, ref_logp = torch.tensor([-1.0]), torch.tensor([-1.0001])
    exact = KL["k3"](logp.double(), ref_logp.double())
    assert rl.token_kl(logp, ref_logp).item() == pytest.approx(exact.item(), rel=1e-2)


def naive_pairwise(chosen, rejected, margin, center):
    terms = []
    for i in range(len(chosen)):
        p = 1 / (1 + torch.exp(-(chosen[i] - rejected[i] - margin[i])))
        terms.append(-torch.log(p) + center * (chosen[i] + rejected[i]) ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margin", [None, 0.3, torch.linspace(-1, 1, 8)], ids=["no", "one", "each"])
def test_the_pairwise_loss_and_its_gradient_are_the_definitions(margin, center):
    chosen, rejected = torch.randn(2, 8, dtype=torch.float64)
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    options = {"margin": margin, "center_rewards_coefficient": center}
    loss = rl.pairwise_reward_loss(chosen, rejected, **options)
    margins = torch.zeros(8) if margin is None else torch.as_tensor(margin).expand(8)
    want = naive_pairwise(chosen, rejected, margins.double(), center)
    torch.testing.assert_close(loss, want)
    got, wanted = (torch.autograd.grad(x, (chosen, rejected)) for x in (loss, want))
    torch.testing.assert_close(got, wanted)


def test_rewards_are_subtracted_in_float32():
    # in bfloat16 100.5 - 100 would be 0 or 1
    chosen, rejected = torch.tensor([100.5]).bfloat16(), torch.tensor([100.0]).bfloat16()
    margin = torch.tensor([0.25]).bfloat16()
    loss = rl.pairwise_reward_loss(chosen, rejected, margin=margin)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(chosen.float() - 100.25).item())))


@pytest.mark.parametrize("gap, want", [(1e4, 0.0), (-1e4, 1e4)])
def test_far_apart_rewards_neither_overflow_nor_lose_the_gradient(gap, want):
    chosen = torch.tensor([gap], requires_grad=True)
    loss = rl.pairwise_reward_loss(chosen, torch.zeros(1))
    assert loss.item() == want
    assert torch.autograd.grad(loss, chosen)[0].item() == (0.0 if gap > 0 else -1.0)


def test_micro_batches_of_pairs_add_up_and_no_pair_gives_zero():
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64).unbind()
    options = {"center_rewards_coefficient": 0.1}
    full = rl.pairwise_reward_loss(chosen, rejected, **options)
    parts = [
        rl.pairwise_reward_loss(chosen[rows], rejected[rows], num_items=7, **options)
        for rows in (slice(0, 2), slice(2, 7), slice(7, 7))
    ]
    torch.testing.assert_close(sum(parts), full)
    empty = torch.zeros(0, requires_grad=True)
    loss = rl.pairwise_reward_loss(empty, empty)
    assert loss.item() == 0 and torch.autograd.grad(loss, empty)[0].shape == (0,)


X = torch.zeros(3)
BAD = {
    "epsilon must be positive": lambda: rl.value_loss(X, X, X, epsilon=0.0),
    "num_items must be positive": lambda: rl.value_loss(X, X, X, num_items=0),
    "old_value must have the shape of value": lambda: rl.value_loss(X, X[:2], X),
    "mask must be bool": lambda: rl.value_loss(X, X, X, mask=X),
    "ref_logp must have the shape of logp": lambda: rl.token_kl(X, X[:2]),
    "unknown kl_estimator 'k33'. Did you mean 'k3'?": lambda: rl.token_kl(X, X, kl_estimator="k33"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


FOUR = torch.zeros(4)
BAD_PAIRS = {
    "rejected": ({"rejected": torch.zeros(3)}, r"chosen and rejected.*\(4,\).*\(3,\)"),
    "matrix": ({"chosen": torch.zeros(4, 1)}, r"\(B,\).*\(4, 1\)"),
    "margin": ({"margin": torch.zeros(3)}, r"margin.*\(4,\).*\(3,\)"),
    "center": ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient.*-0.1"),
    "num_items": ({"num_items": 0}, "num_items.*positive"),
}


@pytest.mark.parametrize("changed, message", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_bad_argument_of_the_pairwise_loss_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.pairwise_reward_loss(**{"chosen": FOUR, "rejected": FOUR} | changed)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_a_token_kl_that_overflows_spoils_no_gradient(kl_estimator):
    logp = torch.tensor([-200.0, -torch.inf, -1.0], requires_grad=True)
    kl = rl.token_kl(logp, torch.tensor([0.0, -torch.inf, -1.0]), kl_estimator=kl_estimator)
    assert kl[1] == 0 and kl[2] == 0 and not kl.isnan().any()
    (dlogp,) = torch.autograd.grad(
        torch.where(torch.tensor([False, True, True]), kl, 0).sum(), logp
    )
    assert dlogp[0] == 0 and dlogp.isfinite().all()


def test_k3_goes_on_as_its_tangent_beyond_the_bound():
    d = torch.tensor([9.0, 10.0, 10.001, 12.0, 1e3, 1e30], dtype=torch.float64)
    logp = (-d).requires_grad_()
    kl = rl.token_kl(logp, torch.zeros_like(d))
    (dlogp,) = torch.autograd.grad(kl.sum(), logp)
    slope = torch.expm1(d.clamp(max=10))
    close = {"rtol": 1e-13, "atol": 0.0}
    torch.testing.assert_close(dlogp, -slope, **close)
    wanted = torch.expm1(d[:2]) - d[:2]
    torch.testing.assert_close(kl[:2], wanted, **close)
    torch.testing.assert_close(kl[2:], wanted[1] + slope[1] * (d[2:] - 10), **close)
    # the value and the slope are continuous at the bound
    near = torch.tensor([-10 + 1e-9, -10 - 1e-9], dtype=torch.float64, requires_grad=True)
    kl = rl.token_kl(near, torch.zeros(2).double())
    slopes = torch.autograd.grad(kl.sum(), near)[0]
    assert abs(kl[0] - kl[1]) < 1e-4 and abs(slopes[0] - slopes[1]) < 1e-4
    torch.autograd.gradcheck(lambda x: rl.token_kl(x, torch.zeros(2).double()), near - 0.1)


def test_k3s_bound_can_be_another_or_none():
    logp, ref_logp = torch.tensor([-4.0, -30.0]), torch.zeros(2)
    tangent = math.expm1(3) - 3 + math.expm1(3) * torch.tensor([1.0, 27.0])
    torch.testing.assert_close(rl.token_kl(logp, ref_logp, kl_bound=3.0), tangent)
    free = rl.token_kl(logp, ref_logp, kl_bound=None)
    torch.testing.assert_close(free, torch.expm1(-logp) + logp)
    with pytest.raises(ValueError, match="kl_bound must be positive"):
        rl.token_kl(logp, ref_logp, kl_bound=0.0)


def test_where_both_policies_agree_the_gradients_are_those_of_the_formulas():
    logp, ref_logp = torch.tensor([-1.0]).requires_grad_(), torch.tensor([-1.0])
    for estimator, slope in {"k1": 1.0, "k2": 0.0, "k3": 0.0}.items():
        kl = rl.token_kl(logp, ref_logp, kl_estimator=estimator)
        assert torch.autograd.grad(kl.sum(), logp)[0].item() == slope
    # -log sigmoid(beta x) at x = 0
    loss = rl.preference_loss(logp, ref_logp, ref_logp, ref_logp, beta=0.5).loss
    assert torch.autograd.grad(loss, logp)[0].item() == -0.25
