"""Divergences of two heads over the whole vocabulary from their hidden states, without the logits.

    forward_kl = KL(q || p),   reverse_kl = KL(p || q),
    jsd = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

The passes are those of linear_categorical_kl; the rows are categorical_divergence's. A mean's
derivative by each token is known in the forward, which then makes the gradients: one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import statistics_dtype
from ..checks import check_denominators, checks_types
from ..rows.categorical_divergence import check_kind
from .autograd import scaled
from .kl import divergence_of_heads
from .kl_passes import kl_pass
from .two_heads import HeadPair, empty_gradients, op_runs, prepare_pair, runs_of


class _LinearDivergenceLoss(torch.autograd.Function):
    """The forward makes the gradients, the backward scales and hands them out."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, scale, runs, jsd_beta = arguments
        (divergence, *_), gradients = kl_pass(*tensors, runs, jsd_beta, scale)
        ctx.save_for_backward(*gradients)
        return divergence.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *scaled(ctx.saved_tensors, dloss), *(None,) * 4


@torch.library.custom_op("rlcore::linear_divergence_loss", mutates_args=())
def linear_divergence_loss_op(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    temperature: float,
    p_softcap: float | None,
    p_logit_scale: float,
    q_softcap: float | None,
    q_logit_scale: float,
    chunk_bytes: int | None,
    jsd_beta: float | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the six tensors, empty where unneeded."""
    options = (temperature, p_softcap, p_logit_scale, q_softcap, q_logit_scale)
    options += (chunk_bytes, jsd_beta, needs, backend)
    runs = op_runs(p_hidden, p_weight, q_hidden, q_weight, options)
    tensors = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask)
    (divergence, *_), gradients = kl_pass(*tensors, runs, jsd_beta, scale)
    loss = divergence.sum() * scale
    return loss, *(loss.new_empty(0) if g is None else g for g in gradients)


@linear_divergence_loss_op.register_fake
def _(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, mask, scale, *options):
    loss = mask.new_empty((), dtype=statistics_dtype(p_hidden, q_hidden))
    inputs = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias)
    return loss, *empty_gradients(inputs, options[-2], loss)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.needs, ctx.rest = inputs[-2], len(inputs) - 6


def _op_backward(ctx, dloss, *_):
    gradients = (
        g * dloss.reshape(1).to(g.dtype) if need else None
        for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *gradients, *(None,) * ctx.rest


linear_divergence_loss_op.register_autograd(_op_backward, setup_context=_setup_context)


@checks_types
def linear_categorical_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    kind: str = "reverse_kl",
    jsd_beta: float = 0.5,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    other_logit_scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`categorical_divergence` of two heads' logits, from their inputs, without the logits.

    p = softmax(z / temperature) is the student, with z the logits that `linear_token_logprob`
    describes, from hidden, weight, bias, softcap and logit_scale; q likewise the teacher, from the
    others. "reverse_kl" is KL(p || q), "forward_kl" KL(q || p), "jsd" the generalised
    Jensen-Shannon divergence jsd_beta KL(q || m) + (1 - jsd_beta) KL(p || m), m = jsd_beta q +
    (1 - jsd_beta) p (GKD: Agarwal et al. 2023, arXiv:2306.13649 eq. 1).

    A frozen teacher has neither products nor memory for a gradient, and logits are held for a chunk
    of tokens. With `num_items` the logits are made once, 2 N V H of both sides and each gradient's
    2 N V H; for a divergence a token the operations are those of `linear_categorical_kl`.

    Args:
        hidden, other_hidden: (N, H) or (B, T, H), float32, bfloat16, float16 or float64, of the
            same leading shape; the two sides may differ in H and in dtype.
        weight, other_weight: (V, H), the heads' weights, of the same V.
        kind: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: in (0, 1); at 0.5 both sides count alike. Other kinds have no use for it.
        bias, other_bias: (V,) or None.
        softcap, other_softcap, logit_scale, other_logit_scale: positive; a softcap None = none.
        temperature: positive; divides the logits of both.
        mask: bool (N,) or (B, T), true = the token counts; others give 0, cost no product, and
            may hold anything. None = every token counts.
        num_items: the loss's denominator; None = no loss, but a divergence a token.
        chunk_bytes: as of `linear_categorical_kl`.
        backend: "triton", "torch", or None: see `use_backend`. The jsd's rows are PyTorch's on
            either.

    Returns:
        (N,) or (B, T), in nats, never below 0, float32 (float64 where either hidden is),
        differentiable once in hidden, weight and bias of both sides; with `num_items` their sum
        over it, a scalar.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device, range, kind or jsd_beta; a
            layer in the place of its weight.
    """
    check_kind(kind, jsd_beta)
    check_denominators(num_items=num_items)
    this = ("", hidden, weight, bias, softcap, logit_scale)
    other = ("other_", other_hidden, other_weight, other_bias, other_softcap, other_logit_scale)
    beta = jsd_beta if kind == "jsd" else None
    if kind == "forward_kl":
        this, other = other, this
    pair = prepare_pair(this, other, temperature, mask, backend)
    if num_items is None:
        return divergence_of_heads(pair, chunk_bytes, beta)
    return _loss(pair, num_items, chunk_bytes, beta)


def _loss(
    pair: HeadPair, num_items: int | float | Tensor, chunk_bytes: int | None, beta: float | None
) -> Tensor:
    """The summed divergence over num_items."""
    p_hidden, q_hidden = pair.tensors[0], pair.tensors[3]
    dtype = statistics_dtype(p_hidden, q_hidden)
    scale = 1 / torch.as_tensor(num_items, dtype=dtype, device=p_hidden.device).detach().reshape(())
    # float16's unit is that of the largest divergence, which is not known before the end
    in_pieces = torch.float16 in (p_hidden.dtype, q_hidden.dtype) or not any(pair.needs_of_both)
    if pair.is_plain and not in_pieces:
        runs = runs_of(pair, chunk_bytes)
        if runs[0].plan.strategy == "recompute":
            return _LinearDivergenceLoss.apply(*pair.tensors, scale, runs, beta)
    if pair.is_plain or in_pieces:
        return divergence_of_heads(pair, chunk_bytes, beta).sum() * scale
    return linear_divergence_loss_op(
        *pair.tensors, scale, *pair.options(chunk_bytes, beta), pair.needs_of_both, pair.backend
    )[0]
