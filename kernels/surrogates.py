"""The policy-gradient surrogates: one formula each, in PyTorch and as a jitted twin.

A formula maps per-token (logp, old_logp, advantage, *parameters) to
(loss, dloss/dlogp, clipped). A new surrogate is one pair of functions and one row in SURROGATES;
every kernel, backend and trainer then knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import tl, triton
from .kl import KL_ESTIMATORS


@dataclass(frozen=True)
class Surrogate:
    """A row of the table.

    Args:
        torch: (logp, old_logp, advantage, parameters) -> (loss, dlogp, clipped), elementwise.
        triton: the jitted twin; None = served by the torch formula on every backend.
        parameters: names of the scalars the formulas take, in order.
        has_ratio: False where the formula has no importance ratio, so takes no old_logp.
    """

    torch: Callable[..., tuple[Tensor, Tensor, Tensor]]
    triton: Callable | None
    parameters: tuple[str, ...]
    has_ratio: bool = True


def reinforce(logp, old_logp, advantage, parameters):
    """loss = -A log pi(a|s): the policy gradient theorem (Williams 1992, eq. 3; Sutton 2000)."""
    return -advantage * logp, -advantage, torch.zeros_like(logp, dtype=torch.bool)


@triton.jit
def _reinforce(logp, old_logp, advantage, parameters):
    return -advantage * logp, -advantage, logp < logp


def ppo_clip(logp, old_logp, advantage, parameters):
    """loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = pi / pi_old.

    PPO (arXiv:1707.06347) eq. 7; epsilon_high apart from epsilon is clip-higher (DAPO,
    arXiv:2503.14476, eq. 10). For A < 0 the objective is bounded below by delta * A: dual clip
    (arXiv:1912.09729, eq. 5), off where delta is infinite. `held` is the ratio, or the constant
    wherever the minimum picks it; there the gradient is zero.
    """
    epsilon, epsilon_high, delta = parameters
    ratio = torch.exp(logp - old_logp)
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    held = torch.where(too_bad, delta, ratio)
    held = torch.where(too_low, 1 - epsilon, held)
    held = torch.where(too_high, 1 + epsilon_high, held)
    clipped = too_high | too_low | too_bad
    return -advantage * held, torch.where(clipped, 0.0, -advantage * ratio), clipped


@triton.jit
def _ppo_clip(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high, delta = parameters
    ratio = tl.exp(logp - old_logp)
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    held = tl.where(too_bad, delta, ratio)
    held = tl.where(too_low, 1 - epsilon, held)
    held = tl.where(too_high, 1 + epsilon_high, held)
    clipped = too_high | too_low | too_bad
    return -advantage * held, tl.where(clipped, 0.0, -advantage * ratio), clipped


SURROGATES: dict[str, Surrogate] = {
    "reinforce": Surrogate(reinforce, _reinforce, parameters=(), has_ratio=False),
    "ppo_clip": Surrogate(ppo_clip, _ppo_clip, parameters=("epsilon", "epsilon_high", "delta")),
}


@dataclass(frozen=True)
class PolicyOptions:
    """What a token's policy loss is made of; `parameters` belong to the surrogate, in its order."""

    surrogate: str
    parameters: tuple[float, ...]
    kl_estimator: str
    beta: float
    entropy_coef: float


class PolicyTerms(NamedTuple):
    """A token's loss, dloss/dlogp (dloss/dentropy is -entropy_coef), KL estimate and clipping."""

    loss: Tensor
    dlogp: Tensor
    kl: Tensor | None
    clipped: Tensor


def policy_terms(
    logp: Tensor,
    entropy: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    options: PolicyOptions,
) -> PolicyTerms:
    """loss = ratio_is * surrogate + beta * KL(pi || ref) - entropy_coef * H, elementwise.

    Without old_logp the sampling policy is the present one: its value, not its gradient.
    """
    old_logp = logp.detach() if old_logp is None else old_logp
    formula = SURROGATES[options.surrogate].torch
    loss, dlogp, clipped = formula(logp, old_logp, advantage, options.parameters)
    if importance_sampling_ratio is not None:
        loss, dlogp = loss * importance_sampling_ratio, dlogp * importance_sampling_ratio
    kl = None
    if ref_logp is not None:
        kl, dkl = KL_ESTIMATORS[options.kl_estimator](logp, ref_logp)
        if options.beta:
            loss, dlogp = loss + options.beta * kl, dlogp + options.beta * dkl
    if options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    return PolicyTerms(loss, dlogp, kl, clipped)
