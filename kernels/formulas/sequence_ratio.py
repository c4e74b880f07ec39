"""Sums over sequences, and the importance ratio that a sequence's tokens share.

s = exp(mean over the sequence's counted tokens of log pi / pi_old)      (GSPO)
w = exp(sum over them), where the surrogate takes the product           (VESPO)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..limits import FARTHEST, log_ratio
from .sequences import sequence_ids
from .surrogates import SURROGATES, PolicyOptions


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's sum over its own sequence: rows of (B, T), or by cu_seqlens of packed (N,)."""
    if x.dim() == 2:
        return x.sum(1, keepdim=True).expand(x.shape)
    # segment by segment and in order: index_add would add up in any order on a GPU
    offsets = cu_seqlens.to(x.device, torch.long)
    sums = torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)
    return sums[sequence_ids(offsets, x.shape[0])]


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's mean over its sequence's counted tokens; x is 0 where the mask is false."""
    return sequence_sum(x, cu_seqlens) / sequence_sum(mask.to(x.dtype), cu_seqlens).clamp(min=1)


def share_sequence_ratio(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    options: PolicyOptions,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """An old_logp that gives each token its sequence's ratio, and the tokens clipped beforehand.

    The ratio is that of GSPO (arXiv:2507.18071) eq. 7, or the product of the tokens' ratios. A
    formula takes its ratio from logp - old_logp, so what it gets for old_logp is logp - log s,
    with the gradient of both: r's is then s's, which spreads over the sequence, while a logp
    beside a detached r keeps its own.
    """
    old_logp = logp.detach() if old_logp is None else old_logp
    x = torch.where(mask, log_ratio(logp, old_logp), 0.0)
    entry = SURROGATES[options.surrogate]
    clipped = torch.zeros_like(mask)
    if entry.clip_token is not None:
        x, clipped = entry.clip_token(x, advantage, options.parameters)
    shared = sequence_sum(x, cu_seqlens) if entry.product else sequence_mean(x, mask, cu_seqlens)
    return logp.clamp(min=-FARTHEST) - shared, clipped
