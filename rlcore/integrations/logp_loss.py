"""A policy loss on log-probabilities, for trainers that hand out those and not the logits.

    loss = sum_t weight_t ratio_is,t surrogate(logp_t, old_logp_t, A_t)

The surrogates and the weights are the table's: nothing is defined a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlcore.kernels.blocks import statistics_dtype
from rlcore.kernels.rows.policy_inputs import prepare_policy
from rlcore.kernels.rows.policy_loss import PolicyLoss, composed_policy_loss
from rlcore.kernels.rows.token_logprob import TokenLogprob

DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.0,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "importance_sampling_level": "token",
    "loss_agg_mode": "token-mean",
    "num_items": None,
    "norm_length": None,
    "surrogate_params": None,
}


def policy_loss_from_logp(
    logp: Tensor,
    advantage: Tensor,
    *,
    old_logp: Tensor | None,
    mask: Tensor,
    surrogate: str = "ppo_clip",
    ref_logp: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """`rl.policy_loss` where the log-probabilities are known, differentiable in `logp`.

    Args:
        logp: (B, T), float32, bfloat16, float16 or float64.
        advantage: (B, T), or (B,) spread over T.
        old_logp, ref_logp: (B, T) or None, as in `rl.policy_loss`.
        mask: bool (B, T), true = the token counts; elsewhere anything may stand, NaN too.
        options: those of `rl.policy_loss` in DEFAULTS, by the same names.

    Returns:
        PolicyLoss(loss, logp, entropy, kl, clipped); the entropy is unknown here, and 0.

    Raises:
        ValueError: as `rl.policy_loss`.
        TypeError: an option that is not in DEFAULTS.
    """
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {sorted(DEFAULTS)}")
    # a head of width 1 stands for the one that made them: it has their shape, dtype and device
    rows = logp.unsqueeze(-1)
    prepared, mask, weight, per_token = prepare_policy(
        rows, torch.zeros_like(logp, dtype=torch.long), advantage, old_logp, ref_logp, mask,
        importance_sampling_ratio, surrogate=surrogate, temperature=1.0, cu_seqlens=None,
        name="logp", **DEFAULTS | options,
    )  # fmt: skip
    logp = torch.where(mask, logp.to(statistics_dtype(rows)), 0.0)
    statistics = TokenLogprob(logp, torch.zeros_like(logp), logp)
    return composed_policy_loss(statistics, mask, weight, per_token, prepared)
