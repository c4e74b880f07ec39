"""Losses on per-token values, in plain PyTorch, differentiated by autograd.

clipped value loss   0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)
token KL             k1, k2 or k3 of a sampled token's log-probabilities
pairwise reward      -log sigmoid(chosen - rejected - margin) + c (chosen + rejected)^2
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlcore.errors import unknown_name
from rlcore.kernels.checks import (
    check_denominators,
    check_finite,
    check_numbers,
    check_positive,
    checks_types,
)
from rlcore.kernels.formulas.kl import KL_BOUND, KL_ESTIMATORS, k3


def _wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@checks_types
def token_kl(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    kl_estimator: str = "k3",
    kl_bound: float | None = KL_BOUND,
) -> Tensor:
    """Estimates KL(pi || pi_ref) from each sampled token (Schulman 2020, "Approximating KL").

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As a loss, on-policy, k1's
    gradient is zero in expectation, k2's is that of KL(pi || pi_ref), k3's of KL(pi_ref || pi).

    Args:
        logp, ref_logp: of one shape, in nats.
        kl_bound: where -d is beyond it, k3 goes on as its tangent there, so that one token cannot
            outweigh all others; the losses' bound is 10. None: k3 everywhere. The other estimators
            have no use for one.

    Returns:
        Their shape, float32 (float64 for float64 inputs), differentiable in both.

    Raises:
        ValueError: the shapes differ, the estimator is unknown, or the bound is not positive.
    """
    if kl_estimator not in KL_ESTIMATORS:
        raise unknown_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    if logp.shape != ref_logp.shape:
        raise ValueError(
            f"ref_logp must have the shape of logp, {tuple(logp.shape)}, not "
            f"{tuple(ref_logp.shape)}: one number a token"
        )
    check_positive(kl_bound=kl_bound)
    logp, ref_logp = _wide(logp), _wide(ref_logp)
    if kl_estimator == "k3":
        return k3(logp, ref_logp, math.inf if kl_bound is None else kl_bound)[0]
    return KL_ESTIMATORS[kl_estimator](logp, ref_logp)[0]


@checks_types
def value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    *,
    epsilon: float = 0.2,
    mask: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped value loss, the mean over tokens of 0.5 max(error^2, clipped error^2).

    The clipped error is that of old_value + clip(value - old_value, -epsilon, epsilon): a step of
    more than epsilon that lessens the error gets no gradient (Engstrom et al. 2020,
    arXiv:2005.12729, "value function clipping").

    Args:
        value, old_value, returns: (N,) or (B, T). Gradients flow to value alone.
        epsilon: positive; infinity does not clip.
        mask: bool, true = the token counts; elsewhere anything may stand, NaN too.
        num_items: replaces the count of tokens in the denominator, so that micro-batches and ranks
            add up to the whole batch.

    Returns:
        A scalar, float32 (float64 for float64 values); a differentiable 0 where nothing counts.

    Raises:
        ValueError: shapes differ, mask is not bool, epsilon or num_items is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    check_denominators(num_items=num_items)
    if value.dim() not in (1, 2):
        raise ValueError(f"value must be (N,) or (B, T), not {tuple(value.shape)}")
    mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    for name, tensor in (("old_value", old_value), ("returns", returns), ("mask", mask)):
        if tensor.shape != value.shape:
            raise ValueError(
                f"{name} must have the shape of value, {tuple(value.shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}: pass mask.bool()")
    # select before the arithmetic: the gradient of a masked NaN is then 0 and not NaN
    value, old_value, returns = (
        torch.where(mask, _wide(tensor), 0) for tensor in (value, old_value, returns)
    )
    old_value, returns = old_value.detach(), returns.detach()
    clipped = old_value + (value - old_value).clamp(-epsilon, epsilon)
    error = torch.maximum((value - returns).square(), (clipped - returns).square())
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    return 0.5 * error.sum() / count


@checks_types
def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_rewards_coefficient: float = 0.0,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Bradley-Terry loss of a reward model, -log sigmoid(chosen - rejected - margin), on average.

    The likelihood of the preferences (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), with a margin
    (Llama 2, arXiv:2307.09288, eq. 2) and c (chosen + rejected)^2, which centres the rewards at 0
    (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen, rejected: (B,) rewards; subtracted in float32 (float64 stays), whatever their dtype.
        margin: (B,) or a number, by how much chosen is to win; None = 0.
        center_rewards_coefficient: c, not negative.
        num_items: replaces the count of pairs in the denominator, so that micro-batches and ranks
            add up to the whole batch.

    Returns:
        A scalar, float32 (float64 for float64 rewards); a differentiable 0 of no pairs.

    Raises:
        ValueError: shapes differ or are not (B,); a coefficient or num_items out of range.
    """
    if chosen.dim() != 1 or rejected.shape != chosen.shape:
        raise ValueError(
            f"chosen and rejected must both be (B,), not {tuple(chosen.shape)} and "
            f"{tuple(rejected.shape)}"
        )
    if isinstance(margin, Tensor) and margin.shape != chosen.shape:
        raise ValueError(f"margin must be {tuple(chosen.shape)}, not {tuple(margin.shape)}")
    if not 0 <= center_rewards_coefficient < float("inf"):
        raise ValueError(
            "center_rewards_coefficient must be finite and not negative, not "
            f"{center_rewards_coefficient}"
        )
    check_denominators(num_items=num_items)
    if margin is not None and not isinstance(margin, Tensor):
        check_numbers(margin=margin)
        check_finite(margin=margin)
    chosen, rejected = _wide(chosen), _wide(rejected)
    margin = margin.to(chosen.dtype) if isinstance(margin, Tensor) else margin or 0.0
    loss = -F.logsigmoid(chosen - rejected - margin)
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    return loss.sum() / (max(len(chosen), 1) if num_items is None else num_items)
