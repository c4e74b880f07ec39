"""Logits to the chosen token's log-probability, the entropy and the log-sum-exp, differentiably.

    logp = z_target - lse,   lse = log sum_j exp z_j,   H = -sum_j p_j log p_j,   z = logits / T
    dlogits_j = (dlogp (1[target] - p_j) + dlse p_j - dH p_j (log p_j + H)) / T

Floors: the forward reads every logit once; the backward reads and writes every logit once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import resolve_backend, takes_short_way
from ..blocks import RowGradients, RowStatistics, statistics_dtype
from ..checks import check_inplace, check_rows, check_targets_in_range, checks_types
from ..implementation import implementation


class TokenLogprob(NamedTuple):
    """What `token_logprob` returns: each of the targets' shape, float32 (float64 for float64)."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor


def _forward(logits, target, mask, temperature, with_entropy, backend) -> RowStatistics:
    check_targets_in_range(target, mask, logits.shape[-1], backend)
    return implementation(backend).token_logprob_forward(
        logits, target, mask, temperature, with_entropy
    )


class _TokenLogprob(torch.autograd.Function):
    """The short way of eager mode: (logp, entropy | None, lse)."""

    @staticmethod
    def forward(ctx, logits, target, mask, temperature, with_entropy, inplace_backward, backend):
        statistics = _forward(logits, target, mask, temperature, with_entropy, backend)
        logp, entropy, lse, row_max, log_sum = statistics
        ctx.save_for_backward(logits, target, mask, entropy, row_max, log_sum)
        ctx.temperature, ctx.inplace, ctx.backend = temperature, inplace_backward, backend
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dlse):
        logits, target, mask, entropy, row_max, log_sum = ctx.saved_tensors
        run = implementation(ctx.backend)
        dlogits = run.gradient_memory(logits, ctx.inplace)
        statistics = RowStatistics(None, entropy, None, row_max, log_sum)
        gradients = RowGradients(dlogp, dentropy, dlse)
        run.token_logprob_backward(
            logits, dlogits, target, mask, statistics, gradients, ctx.temperature
        )
        return dlogits, None, None, None, None, None, None


@torch.library.custom_op("rlcore::token_logprob", mutates_args=())
def token_logprob_op(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, row_max, log_sum); what a call does without is an empty tensor."""
    parts = _forward(logits, target, mask, temperature, with_entropy, backend)
    return tuple(parts[0].new_empty(0) if part is None else part for part in parts)


@token_logprob_op.register_fake
def _(logits, target, mask, temperature, with_entropy, backend):
    keeps = implementation(backend).KEEPS_SOFTMAX
    present = RowStatistics(True, with_entropy, True, keeps, keeps)
    dtype = statistics_dtype(logits)
    return tuple(
        torch.empty(target.shape if is_present else (0,), dtype=dtype, device=logits.device)
        for is_present in present
    )


@torch.library.custom_op("rlcore::token_logprob_backward", mutates_args=())
def token_logprob_backward_op(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    row_max: Tensor | None,
    log_sum: Tensor | None,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    """The logits' gradient, contiguous."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    statistics = RowStatistics(None, entropy, None, row_max, log_sum)
    gradients = RowGradients(dlogp, dentropy, dlse)
    implementation(backend).token_logprob_backward(
        logits, dlogits, target, mask, statistics, gradients, temperature
    )
    return dlogits


@token_logprob_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, target, mask, ctx.temperature, ctx.with_entropy, ctx.backend = inputs
    _, entropy, _, row_max, log_sum = output
    ctx.save_for_backward(logits, target, mask, entropy, row_max, log_sum)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dlogp, dentropy, dlse, *_):
    logits, target, mask, entropy, row_max, log_sum = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = dentropy = None
    dlogits = token_logprob_backward_op(
        logits, target, mask, entropy, row_max, log_sum, dlogp, dlse, dentropy,
        ctx.temperature, ctx.backend,
    )  # fmt: skip
    return dlogits, None, None, None, None, None


token_logprob_op.register_autograd(_op_backward, setup_context=_setup_context)


@checks_types
def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> TokenLogprob:
    """Log-probability of the targets, entropy and log-sum-exp of every row of logits.

    With z = logits / temperature: logp = z[target] - lse(z), H = -sum p log p, p = softmax(z).

    Args:
        logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, any strides; may hold
            -inf (banned tokens: probability, entropy contribution and gradient 0).
        target: integers (N,) or (B, T) in [0, V).
        temperature: positive; divides the logits before everything else.
        mask: bool (N,) or (B, T), true = the token counts. Elsewhere the results and the
            gradient are 0, whatever stands in logits and target. None = every token counts.
        entropy: False leaves the entropy out, uncomputed and None.
        inplace_backward: permits the backward pass to write the gradient into the logits' own
            storage, which saves an (N, V) tensor; the logits are then used up. Under
            torch.compile the graph plans its own memory and makes no use of the permission.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        TokenLogprob(logp, entropy, lse), each of target's shape, in nats, float32 (float64 for
        float64 logits), all three differentiable once. Sums run in float32 in an order that
        follows from where a row begins after a 16-byte boundary: a row that begins at one gives
        the same bits whatever else is in the batch.

    Raises:
        ValueError: a wrong shape, dtype, device or temperature; a target out of range at a
            counted position (on a GPU only under RLCORE_CHECK=1: there the row becomes NaN).
    """
    check_rows(logits, target, mask=mask, temperature=temperature)
    check_inplace(logits, inplace_backward)
    backend = resolve_backend(backend, logits)
    mask = None if mask is None else mask.contiguous()
    if takes_short_way(logits, target, mask):
        return TokenLogprob(
            *_TokenLogprob.apply(
                logits, target, mask, temperature, entropy, inplace_backward, backend
            )
        )
    logp, entropies, lse, _, _ = token_logprob_op(
        logits, target, mask, temperature, entropy, backend
    )
    return TokenLogprob(logp, entropies if entropy else None, lse)
