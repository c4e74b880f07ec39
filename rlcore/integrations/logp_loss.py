"""A policy loss on log-probabilities, for trainers that hand out those and not the logits.

    loss = sum_t weight_t ratio_is,t surrogate(logp_t, old_logp_t, A_t)

The surrogates and the weights are the table's: nothing is defined a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlcore.kernels.blocks import statistics_dtype
from rlcore.kernels.rows.policy_inputs import DEFAULTS, PolicyArguments, prepare_policy
from rlcore.kernels.rows.policy_loss import PolicyLoss, composed_policy_loss
from rlcore.kernels.rows.token_logprob import TokenLogprob

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOT_HERE = {"temperature", "cu_seqlens"}  # options that need logits, or packed tokens
OPTIONS = sorted(DEFAULTS.keys() - NOT_HERE)


def policy_loss_from_logp(
    logp: Tensor,
    advantage: Tensor,
    *,
    old_logp: Tensor | None,
    mask: Tensor,
    **options: Unpack[PolicyArguments],
) -> PolicyLoss:
    """`rl.policy_loss` where the log-probabilities are known, differentiable in `logp`.

    Args:
        logp: (B, T), float32, bfloat16, float16 or float64.
        advantage: (B, T), or (B,) spread over T.
        old_logp: (B, T) or None, as in `rl.policy_loss`.
        mask: bool (B, T), true = the token counts; elsewhere anything may stand, NaN too.
        options: those of `rl.policy_loss` in OPTIONS, by the same names.

    Returns:
        PolicyLoss(loss, logp, entropy, kl, clipped); the entropy is unknown here, and 0.

    Raises:
        ValueError: as `rl.policy_loss`.
        TypeError: an option that is not in OPTIONS.
    """
    unknown = options.keys() - OPTIONS
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {OPTIONS}")
    # a head of width 1 stands for the one that made them: it has their shape, dtype and device
    rows, target = logp.unsqueeze(-1), torch.zeros_like(logp, dtype=torch.long)
    given = DEFAULTS | options | {"old_logp": old_logp, "mask": mask}
    prepared, mask, weight, per_token = prepare_policy(rows, target, advantage, given, "logp")
    logp = torch.where(mask, logp.to(statistics_dtype(rows)), 0.0)
    statistics = TokenLogprob(logp, torch.zeros_like(logp), logp)
    return composed_policy_loss(statistics, mask, weight, per_token, prepared)
