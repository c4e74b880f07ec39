"""torch.compile(fullgraph=True) of the losses, whose numbers and lengths change between calls."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE

import rlcore as rl

H, V = 4, 9


@pytest.fixture(autouse=True)
def seed(device):
    torch.manual_seed(0)
    torch.compiler.reset()


def pairs(hidden, weight, target, _values, scale, **options):
    mask = torch.ones_like(target, dtype=torch.bool)
    return rl.linear_preference_loss(hidden, weight, target, mask, beta=scale, **options).loss


def policy_loss(hidden, weight, target, values, temperature, scale):
    out = rl.policy_loss(
        hidden @ weight.T, target, values, old_logp=values - 2, ref_logp=values - 3,
        temperature=temperature, beta=scale, entropy_coef=scale, epsilon=scale,
        epsilon_high=2 * scale, delta=temperature + 1, num_items=10 * scale,
    )  # fmt: skip
    return out.loss


def linear_policy_loss(hidden, weight, target, values, temperature, scale):
    out = rl.linear_policy_loss(
        hidden, weight, target, values, old_logp=values - 2, ref_logp=values - 3,
        temperature=temperature, beta=scale, entropy_coef=scale, epsilon=scale,
        epsilon_high=2 * scale, softcap=30 * temperature, logit_scale=temperature,
        loss_agg_mode="seq-mean-token-sum-norm", norm_length=7 * scale,
    )  # fmt: skip
    return out.loss


def sequence_level(hidden, weight, target, values, temperature, scale):
    return rl.linear_policy_loss(
        hidden, weight, target, values, old_logp=values - 2, temperature=temperature,
        entropy_coef=scale, importance_sampling_level="sequence", num_items=scale,
    ).loss  # fmt: skip


def own_parameters(hidden, weight, target, values, temperature, scale):
    return rl.linear_policy_loss(
        hidden, weight, target, values, old_logp=values - 2, surrogate="sapo",
        surrogate_params={"tau_pos": temperature, "tau_neg": scale + 1},
    ).loss  # fmt: skip


def token_logprob(hidden, weight, target, values, temperature, scale):
    out = rl.token_logprob(hidden @ weight.T, target, temperature=temperature)
    return (out.logp * values).sum() + scale * out.entropy.sum()


def linear_token_logprob(hidden, weight, target, values, temperature, scale):
    out = rl.linear_token_logprob(hidden, weight, target, temperature=temperature)
    return (out.logp * values).sum() + scale * out.entropy.sum()


def categorical_kl(hidden, weight, target, values, temperature, scale):
    logits = hidden @ weight.T
    return scale * rl.categorical_kl(logits, logits.detach() * 2, temperature=temperature).sum()


def linear_categorical_kl(hidden, weight, target, values, temperature, scale):
    other = (hidden.detach() * 2, weight.detach())
    return scale * rl.linear_categorical_kl(hidden, weight, *other, temperature=temperature).sum()


def linear_preference_loss(hidden, weight, target, values, temperature, scale):
    ref_logp = torch.zeros_like(values[:, 0])
    return pairs(
        hidden, weight, target, values, scale, ref_logp=ref_logp, temperature=temperature,
        label_smoothing=scale / 9,
    )  # fmt: skip


def a_preference_with_its_reference_and_weights(hidden, weight, target, values, temperature, scale):
    return pairs(
        hidden, weight, target, values, scale, ref_hidden=hidden.detach() * 2,
        ref_weight=weight.detach(), temperature=temperature, use_weighting=True,
        ld_alpha=scale / 2, num_items=5 * scale,
    )  # fmt: skip


LOSSES = [
    policy_loss, linear_policy_loss, sequence_level, own_parameters, token_logprob,
    linear_token_logprob, categorical_kl, linear_categorical_kl, linear_preference_loss,
    a_preference_with_its_reference_and_weights,
]  # fmt: skip
CALLS = [(2, 1.0, 0.1), (4, 0.9, 0.2), (6, 1.3, 0.05)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_loss_compiles_whole_while_its_numbers_and_lengths_change(loss):
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for rows, temperature, scale in CALLS[1:]:
        compare(compiled, loss, rows, temperature, scale)


def test_a_compiled_loss_takes_numbers_that_change_after_all():
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")
    for rows, temperature, scale in CALLS:
        compare(compiled, linear_policy_loss, rows, temperature, scale)


def compare(compiled, loss, rows: int, *numbers: float) -> None:
    """Value and gradients of both."""
    hidden = torch.randn(rows, 3, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    target = torch.randint(V, (rows, 3), device=DEVICE)
    values, results = torch.randn(rows, 3, device=DEVICE), []
    for function in (compiled, loss):
        scalar = function(hidden, weight, target, values, *numbers)
        results.append([scalar.detach(), *torch.autograd.grad(scalar, (hidden, weight))])
    torch.testing.assert_close(*results)


def test_numbers_that_are_not_finite_are_still_refused():
    hidden, weight = torch.randn(3, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    target = torch.tensor([0, 1, 2], device=DEVICE)
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be"):
            rl.linear_token_logprob(hidden, weight, target, temperature=value)
    for value in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(ValueError, match="entropy_coef must be a finite number"):
            rl.linear_policy_loss(hidden, weight, target, hidden[:, 0], entropy_coef=value)
