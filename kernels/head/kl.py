"""The exact KL between two heads' distributions from their hidden states, without the logits.

    KL(p || q) = sum_j p_j (log p_j - log q_j),   p = softmax(a / T),   q = softmax(b / T)
    a = head_p(p_hidden),   b = head_q(q_hidden),   dhidden = ds W,   dW = ds^T hidden

A chunk of tokens makes both heads' logits (fp32); one row kernel turns them into the KL, or into
both gradients at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import statistics_dtype
from ..checks import checks_types
from ..implementation import implementation
from .kl_passes import kl_backward, kl_pass, scale_unit_gradients
from .two_heads import HeadPair, empty_gradients, op_runs, prepare_pair, runs_of


class _LinearCategoricalKL(torch.autograd.Function):
    """The short way of eager mode."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, runs, jsd_beta = arguments
        statistics, saved = kl_pass(*tensors, runs, jsd_beta)
        ctx.save_for_backward(*tensors, *statistics, *saved)
        ctx.runs, ctx.jsd_beta = runs, jsd_beta
        return statistics[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        given = ctx.saved_tensors
        tensors, statistics, saved = given[:7], given[7:12], given[12:]
        if ctx.runs[0].plan.strategy == "unit-gradient":
            gradients = scale_unit_gradients(saved, tensors[6], dkl)
        else:
            gradients = kl_backward(*tensors, statistics, saved, dkl, ctx.runs, ctx.jsd_beta)
        return *gradients, None, None, None


@torch.library.custom_op("rlcore::linear_categorical_kl", mutates_args=())
def linear_categorical_kl_op(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    mask: Tensor,
    temperature: float,
    p_softcap: float | None,
    p_logit_scale: float,
    q_softcap: float | None,
    q_logit_scale: float,
    chunk_bytes: int | None,
    jsd_beta: float | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(KL, max a, log P, max b, log Q), the last four empty from the torch backend.

    With a jsd_beta the Jensen-Shannon divergence, and nothing else.
    """
    options = (temperature, p_softcap, p_logit_scale, q_softcap, q_logit_scale)
    options += (chunk_bytes, jsd_beta, needs, backend)
    runs = op_runs(p_hidden, p_weight, q_hidden, q_weight, options)
    tensors = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask)
    (kl, *rest), _ = kl_pass(*tensors, runs, jsd_beta)
    return kl, *(kl.new_empty(0) if part is None else part for part in rest)


@linear_categorical_kl_op.register_fake
def _(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask, *options):
    dtype = statistics_dtype(p_hidden, q_hidden)
    by_rows = implementation(options[-1]).KEEPS_SOFTMAX and options[-3] is None
    shapes = [mask.shape] + [mask.shape if by_rows else (0,)] * 4
    return tuple(torch.empty(shape, dtype=dtype, device=mask.device) for shape in shapes)


@torch.library.custom_op("rlcore::linear_categorical_kl_backward", mutates_args=())
def linear_categorical_kl_backward_op(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    mask: Tensor,
    statistics: list[Tensor],
    dkl: Tensor,
    temperature: float,
    p_softcap: float | None,
    p_logit_scale: float,
    q_softcap: float | None,
    q_logit_scale: float,
    chunk_bytes: int | None,
    jsd_beta: float | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of p's hidden, weight and bias, then of q's; empty where unneeded."""
    options = (temperature, p_softcap, p_logit_scale, q_softcap, q_logit_scale)
    options += (chunk_bytes, jsd_beta, needs, backend)
    runs = op_runs(p_hidden, p_weight, q_hidden, q_weight, options)
    tensors = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask)
    statistics = [s if s.numel() == mask.numel() else None for s in statistics]
    gradients = kl_backward(*tensors, statistics, (None, None), dkl, runs, jsd_beta)
    return tuple(dkl.new_empty(0) if g is None else g for g in gradients)


@linear_categorical_kl_backward_op.register_fake
def _(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask, statistics, dkl, *options):
    inputs = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias)
    return empty_gradients(inputs, options[-2], dkl)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _op_backward(ctx, dkl, *_):
    needs = ctx.options[-2]
    given = ctx.saved_tensors
    gradients = linear_categorical_kl_backward_op(*given[:7], given[7:], dkl, *ctx.options)
    given = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *given, *(None,) * 10


linear_categorical_kl_op.register_autograd(_op_backward, setup_context=_setup_context)


@checks_types
def linear_categorical_kl(
    p_hidden: Tensor,
    p_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    p_softcap: float | None = None,
    q_softcap: float | None = None,
    p_logit_scale: float = 1.0,
    q_logit_scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`categorical_kl` of two heads' logits, from their inputs, without the logits.

    KL(p || q) over the full vocabulary, p = softmax(z / temperature) with z the logits that
    `linear_token_logprob` describes, from p_hidden, p_weight, p_bias, p_softcap and p_logit_scale;
    q likewise. So a policy's exact KL to its reference (arXiv:1909.08593 eq. 2), or a student's
    to its teacher, takes the memory of a chunk.

    With N counted tokens and H the sum of both hidden sizes, the forward takes 2 N H V operations.
    Where nothing needs a gradient that is all. Where hidden states alone do (frozen heads), their
    gradients are made in the forward, up to each token's factor. Otherwise the backward makes the
    logits of both again, 2 N H V, unless all fit `chunk_bytes`. Each gradient of a side's hidden
    or weight takes 2 N V times that side's hidden size; a side without gradients, a frozen
    reference's, has no such product and no memory for a gradient.

    Args:
        p_hidden, q_hidden: (N, H) or (B, T, H), float32, bfloat16, float16 or float64, of the
            same leading shape; the two sides may differ in H and in dtype.
        p_weight, q_weight: (V, H), the heads' weights, of the same V.
        p_bias, q_bias: (V,) or None.
        p_softcap, q_softcap, p_logit_scale, q_logit_scale: positive; a softcap None = none.
        temperature: positive; divides the logits of both.
        mask: bool (N,) or (B, T), true = the token counts; others give 0, cost no product, and
            may hold anything. None = every token counts.
        chunk_bytes: budget for the logits and their gradients that exist at one time; None = 64
            MiB on a CPU, 768 MiB elsewhere; below one token's, one token at a time.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        (N,) or (B, T), in nats, float32 (float64 where either hidden is), differentiable once in
        hidden, weight and bias of both sides. A bias of -inf bans a token as in `categorical_kl`.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device or range; a layer in the
            place of its weight.
    """
    p = ("p_", p_hidden, p_weight, p_bias, p_softcap, p_logit_scale)
    q = ("q_", q_hidden, q_weight, q_bias, q_softcap, q_logit_scale)
    return divergence_of_heads(prepare_pair(p, q, temperature, mask, backend), chunk_bytes)


def divergence_of_heads(
    pair: HeadPair, chunk_bytes: int | None, jsd_beta: float | None = None
) -> Tensor:
    """KL(p || q), or with a jsd_beta the Jensen-Shannon divergence, of each token."""
    if not pair.is_plain:
        divergence = linear_categorical_kl_op(
            *pair.tensors, *pair.options(chunk_bytes, jsd_beta), pair.needs_of_both, pair.backend
        )[0]
        return divergence.view(pair.shape)
    runs = runs_of(pair, chunk_bytes)
    return _LinearCategoricalKL.apply(*pair.tensors, runs, jsd_beta).view(pair.shape)
