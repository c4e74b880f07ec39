"""Per-token weights that turn token losses into one scalar.

Every aggregation is linear in the token losses: loss = sum_t weight_t * loss_t, with weight_t
exactly 0 where the mask is false. The weights depend on the mask and the counts alone, so a
kernel can apply them, and micro-batches that share `num_items` add up to the full batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_denominators


def token_weight(
    mask: Tensor,
    loss_agg_mode: str,
    *,
    num_items: int | float | Tensor | None = None,
    norm_length: int | float | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights of the tokens in the aggregated loss.

    Args:
        mask: bool (B, T), or (N,) for packed tokens; true = the token counts.
        loss_agg_mode: "token-mean" (sum over tokens / tokens), "seq-mean-token-mean" (mean over
            sequences of token means), "seq-mean-token-sum", or "seq-mean-token-sum-norm" (token
            sums / (sequences x norm_length)).
        num_items: replaces the local count in the denominator: of tokens for "token-mean", of
            sequences for the others. A number or a scalar tensor.
        norm_length: "seq-mean-token-sum-norm" only; None = T.
        cu_seqlens: int (B + 1,), boundaries of the sequences in packed (N,) tokens.

    Returns:
        Weights of mask's shape in `dtype`; 0 where masked. A sequence without a counted token is
        not counted; with no counted token at all, every weight is 0.
    """
    if loss_agg_mode not in AGGREGATIONS:
        known = ", ".join(map(repr, AGGREGATIONS))
        raise ValueError(f"loss_agg_mode must be one of {known}, got {loss_agg_mode!r}")
    if norm_length is not None and loss_agg_mode != "seq-mean-token-sum-norm":
        raise ValueError(
            f"norm_length belongs to loss_agg_mode 'seq-mean-token-sum-norm', not {loss_agg_mode!r}"
        )
    check_denominators(num_items=num_items, norm_length=norm_length)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, mask)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(mask.device, dtype)
    weight = AGGREGATIONS[loss_agg_mode](mask, num_items, norm_length, cu_seqlens, dtype)
    return torch.where(mask, weight, torch.zeros((), dtype=dtype, device=mask.device))


def _token_mean(mask, num_items, norm_length, cu_seqlens, dtype):
    count = mask.sum().clamp(min=1).to(dtype) if num_items is None else num_items
    return torch.ones_like(mask, dtype=dtype) / count


def _seq_mean_token_mean(mask, num_items, norm_length, cu_seqlens, dtype):
    tokens, sequences = _counts(mask, cu_seqlens, "seq-mean-token-mean")
    sequences = sequences.to(dtype) if num_items is None else num_items
    return (1 / tokens.to(dtype) / sequences).expand(mask.shape)


def _seq_mean_token_sum(mask, num_items, norm_length, cu_seqlens, dtype):
    _, sequences = _counts(mask, cu_seqlens, "seq-mean-token-sum")
    sequences = sequences.to(dtype) if num_items is None else num_items
    return torch.ones_like(mask, dtype=dtype) / sequences


def _seq_mean_token_sum_norm(mask, num_items, norm_length, cu_seqlens, dtype):
    if norm_length is None:
        if mask.dim() == 1:
            raise ValueError(
                "norm_length is needed by loss_agg_mode 'seq-mean-token-sum-norm' on packed (N,) "
                "tokens: pass the length that divides every sequence's sum"
            )
        norm_length = max(mask.shape[1], 1)
    return _seq_mean_token_sum(mask, num_items, None, cu_seqlens, dtype) / norm_length


def _counts(mask: Tensor, cu_seqlens: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """Counted tokens of each token's own sequence, (B, 1) or (N,), and sequences that have any."""
    if mask.dim() == 2:
        tokens = mask.sum(1, keepdim=True)
        return tokens.clamp(min=1), (tokens > 0).sum().clamp(min=1)
    if cu_seqlens is None:
        raise ValueError(
            f"loss_agg_mode {mode!r} on packed (N,) tokens needs cu_seqlens, the (B + 1,) "
            "boundaries of the sequences; or pass (B, T) tensors"
        )
    sequence = sequence_ids(cu_seqlens, mask.shape[0])
    tokens = torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.long, device=mask.device)
    tokens.index_add_(0, sequence, mask.long())
    return tokens.clamp(min=1)[sequence], (tokens > 0).sum().clamp(min=1)


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index (N,) of the packed sequence that each token belongs to."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)


def _check_cu_seqlens(cu_seqlens: Tensor, mask: Tensor) -> None:
    if mask.dim() == 2:
        raise ValueError(
            "cu_seqlens belongs to packed (N,) tokens, but the logits are (B, T, V), whose rows "
            "are the sequences already: leave it None"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens must be integers of shape (B + 1,), got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != mask.device:
        raise ValueError(
            f"cu_seqlens must be on the device of logits, '{mask.device}', got "
            f"'{cu_seqlens.device}'"
        )
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    num_tokens = mask.shape[0]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}; "
            f"got {cu_seqlens.tolist()}"
        )


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token-mean": _token_mean,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
}
