"""Divergences of two rows of logits over the whole vocabulary, differentiable in both.

    forward_kl = KL(q || p),   reverse_kl = KL(p || q),
    jsd = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

The KLs are categorical_kl's, on either backend; the jsd is PyTorch's on either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import resolve_backend, takes_short_way
from ..blocks import statistics_dtype
from ..checks import check_finite, check_name, check_numbers, check_positive, checks_types
from ..implementation import implementation
from ..torch_backend.divergences import jsd_backward, jsd_forward
from .categorical_kl import categorical_kl, check_mask, check_pair

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def rows_forward(p_logits, q_logits, temperature, backend, jsd_beta: float | None) -> list:
    """[divergence, *row statistics]: KL(p || q), or with a jsd_beta the jsd, which has none."""
    if jsd_beta is None:
        run = implementation(backend)
        return run.categorical_kl_forward(p_logits, q_logits, None, temperature)
    dtype = statistics_dtype(p_logits, q_logits)
    return [jsd_forward(p_logits, q_logits, None, temperature, jsd_beta, dtype), *(None,) * 4]


def rows_backward(backend, p_logits, q_logits, dp, dq, row, d, temperature, jsd_beta) -> None:
    """Writes the gradients of what rows_forward gave as `row` into dp and dq, or one of them."""
    if jsd_beta is None:
        kl, *statistics = row
        implementation(backend).categorical_kl_backward(
            p_logits, q_logits, dp, dq, None, kl, statistics, d, temperature
        )
    else:
        jsd_backward(p_logits, q_logits, dp, dq, None, d, temperature, jsd_beta)


class _JSD(torch.autograd.Function):
    """The short way of eager mode."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, mask, temperature, beta):
        ctx.save_for_backward(p_logits, q_logits, mask)
        ctx.numbers = temperature, beta
        dtype = statistics_dtype(p_logits, q_logits)
        return jsd_forward(p_logits, q_logits, mask, temperature, beta, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, djsd):
        needs = list(ctx.needs_input_grad[:2])
        given = _gradients(*ctx.saved_tensors, djsd, *ctx.numbers, needs)
        dp, dq = (d if needed else None for d, needed in zip(given, needs, strict=True))
        return dp, dq, None, None, None


def _empty(p_logits: Tensor, q_logits: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.empty(z.shape if needed else (0,), dtype=z.dtype, device=z.device)
        for z, needed in zip((p_logits, q_logits), needs, strict=True)
    )


def _gradients(p_logits, q_logits, mask, djsd, temperature, beta, needs) -> tuple[Tensor, Tensor]:
    """The gradients of p_logits and q_logits, contiguous; empty where `needs` is false."""
    dp, dq = _empty(p_logits, q_logits, needs)
    wanted = dp if needs[0] else None, dq if needs[1] else None
    jsd_backward(p_logits, q_logits, *wanted, mask, djsd, temperature, beta)
    return dp, dq


@torch.library.custom_op("rlcore::categorical_jsd", mutates_args=())
def categorical_jsd_op(
    p_logits: Tensor, q_logits: Tensor, mask: Tensor | None, temperature: float, beta: float
) -> Tensor:
    dtype = statistics_dtype(p_logits, q_logits)
    return jsd_forward(p_logits, q_logits, mask, temperature, beta, dtype)


@categorical_jsd_op.register_fake
def _(p_logits, q_logits, mask, temperature, beta):
    return p_logits.new_empty(p_logits.shape[:-1], dtype=statistics_dtype(p_logits, q_logits))


@torch.library.custom_op("rlcore::categorical_jsd_backward", mutates_args=())
def categorical_jsd_backward_op(
    p_logits: Tensor,
    q_logits: Tensor,
    mask: Tensor | None,
    djsd: Tensor,
    temperature: float,
    beta: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return _gradients(p_logits, q_logits, mask, djsd, temperature, beta, needs)


@categorical_jsd_backward_op.register_fake
def _(p_logits, q_logits, mask, djsd, temperature, beta, needs):
    return _empty(p_logits, q_logits, needs)


def _setup_context(ctx, inputs, output):
    *tensors, temperature, beta = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = temperature, beta


def _op_backward(ctx, djsd):
    needs = list(ctx.needs_input_grad[:2])
    given = categorical_jsd_backward_op(*ctx.saved_tensors, djsd, *ctx.numbers, needs)
    dp, dq = (d if needed else None for d, needed in zip(given, needs, strict=True))
    return dp, dq, None, None, None


categorical_jsd_op.register_autograd(_op_backward, setup_context=_setup_context)


def check_kind(kind: str, jsd_beta: float) -> None:
    """Raise ValueError for a kind that is none, or a jsd_beta that it cannot have."""
    check_name("kind", kind, DIVERGENCES)
    check_numbers(jsd_beta=jsd_beta)
    if kind != "jsd" and jsd_beta != 0.5:
        raise ValueError(f"kind {kind!r} has no use for jsd_beta: leave it out, or take 'jsd'")
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must be between 0 and 1, got {jsd_beta}: at the ends take kind "
            "'forward_kl' or 'reverse_kl'"
        )


@checks_types
def categorical_divergence(
    logits: Tensor,
    other_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """How far two distributions over the vocabulary are apart, exactly: for distillation.

    p = softmax(logits / temperature) is the student, q of other_logits the teacher. "reverse_kl"
    is KL(p || q), "forward_kl" KL(q || p), "jsd" the generalised Jensen-Shannon divergence
    jsd_beta KL(q || m) + (1 - jsd_beta) KL(p || m), m = jsd_beta q + (1 - jsd_beta) p (GKD: Agarwal
    et al. 2023, arXiv:2306.13649 eq. 1).

    Args:
        logits, other_logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, any
            strides; the two may differ in dtype. May hold -inf (banned tokens): a KL is inf where
            its second distribution bans what its first does not, a jsd never.
        kind: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: in (0, 1); at 0.5 both sides count alike. Other kinds have no use for it.
        temperature: positive; divides both before everything else.
        mask: bool (N,) or (B, T), true = the token counts. Elsewhere the result and both
            gradients are 0, whatever stands in the logits. None = every token counts.
        backend: "triton", "torch", or None: see `use_backend`. The jsd is PyTorch's, by blocks of
            rows, on either.

    Returns:
        (N,) or (B, T), in nats, never below 0, float32 (float64 where either is float64),
        differentiable once in both arguments; a side without requires_grad costs nothing more. A
        row without a finite logit, or with a NaN, gives NaN.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device, temperature, kind or
        jsd_beta.
    """
    check_kind(kind, jsd_beta)
    check_pair("other_logits", other_logits, "logits", logits)
    mask = check_mask(mask, logits, "logits")
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    if kind != "jsd":
        first, second = (logits, other_logits)[:: 1 if kind == "reverse_kl" else -1]
        return categorical_kl(first, second, temperature=temperature, mask=mask, backend=backend)
    resolve_backend(backend, logits)
    call = _JSD.apply if takes_short_way(logits, other_logits, mask) else categorical_jsd_op
    return call(logits, other_logits, mask, temperature, jsd_beta)
