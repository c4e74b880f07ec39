"""Two rows of logits to the exact KL of their distributions, differentiably in both.

    KL(p || q) = sum_j p_j (log p_j - log q_j),   p = softmax(a / T),   q = softmax(b / T)
    da_j = p_j (log p_j - log q_j - KL) / T,      db_j = (q_j - p_j) / T

Floors: the forward reads every logit once; the backward reads every logit once and writes each
gradient that is asked for once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import resolve_backend, takes_short_way
from ..blocks import statistics_dtype
from ..checks import FLOATS, check_finite, check_per_token, check_positive, checks_types
from ..implementation import implementation


class _CategoricalKL(torch.autograd.Function):
    """The short way of eager mode."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, mask, temperature, backend):
        kl, *row_statistics = implementation(backend).categorical_kl_forward(
            p_logits, q_logits, mask, temperature
        )
        ctx.save_for_backward(p_logits, q_logits, mask, kl, *row_statistics)
        ctx.temperature, ctx.backend = temperature, backend
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        p_logits, q_logits, mask, kl, *row_statistics = ctx.saved_tensors
        run = implementation(ctx.backend)
        dp, dq = (
            run.gradient_memory(logits, False) if needed else None
            for logits, needed in zip((p_logits, q_logits), ctx.needs_input_grad, strict=False)
        )
        run.categorical_kl_backward(
            p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, ctx.temperature
        )
        return dp, dq, None, None, None


@torch.library.custom_op("rlcore::categorical_kl", mutates_args=())
def categorical_kl_op(
    p_logits: Tensor, q_logits: Tensor, mask: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(KL, max a, log P, max b, log Q); the last four are empty from the torch backend."""
    parts = implementation(backend).categorical_kl_forward(p_logits, q_logits, mask, temperature)
    return tuple(parts[0].new_empty(0) if part is None else part for part in parts)


@categorical_kl_op.register_fake
def _(p_logits, q_logits, mask, temperature, backend):
    keeps = implementation(backend).KEEPS_SOFTMAX
    shapes = [p_logits.shape[:-1]] + [p_logits.shape[:-1] if keeps else (0,)] * 4
    dtype = statistics_dtype(p_logits, q_logits)
    return tuple(torch.empty(shape, dtype=dtype, device=p_logits.device) for shape in shapes)


@torch.library.custom_op("rlcore::categorical_kl_backward", mutates_args=())
def categorical_kl_backward_op(
    p_logits: Tensor,
    q_logits: Tensor,
    mask: Tensor | None,
    kl: Tensor,
    p_max: Tensor,
    p_log_sum: Tensor,
    q_max: Tensor,
    q_log_sum: Tensor,
    dkl: Tensor,
    temperature: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of p_logits and q_logits, contiguous; empty where `needs` is false."""
    dp, dq = _empty_gradients(p_logits, q_logits, needs)
    implementation(backend).categorical_kl_backward(
        p_logits, q_logits, dp if needs[0] else None, dq if needs[1] else None, mask, kl,
        (p_max, p_log_sum, q_max, q_log_sum), dkl, temperature,
    )  # fmt: skip
    return dp, dq


@categorical_kl_backward_op.register_fake
def _(p_logits, q_logits, mask, kl, p_max, p_log_sum, q_max, q_log_sum, dkl, temperature, needs, _):
    return _empty_gradients(p_logits, q_logits, needs)


def _empty_gradients(p_logits: Tensor, q_logits: Tensor, needs: list[bool]) -> tuple:
    return tuple(
        torch.empty(z.shape if needed else (0,), dtype=z.dtype, device=z.device)
        for z, needed in zip((p_logits, q_logits), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    p_logits, q_logits, mask, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(p_logits, q_logits, mask, *output)


def _op_backward(ctx, dkl, *_):
    needs = list(ctx.needs_input_grad[:2])
    gradients = categorical_kl_backward_op(
        *ctx.saved_tensors, dkl, ctx.temperature, needs, ctx.backend
    )
    dp, dq = (d if needed else None for d, needed in zip(gradients, needs, strict=True))
    return dp, dq, None, None, None


categorical_kl_op.register_autograd(_op_backward, setup_context=_setup_context)


def check_logits(name: str, logits: Tensor, width: str = "V") -> None:
    """One floating point row a token, `width` wide."""
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{name} must have shape (N, {width}) or (B, T, {width}), got {tuple(logits.shape)}: "
            "reshape them"
        )
    if logits.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got {tuple(logits.shape)}")


def check_mask(mask: Tensor | None, rows: Tensor, name: str) -> Tensor | None:
    """The mask, contiguous, if it is a bool a token of the rows, which are the argument `name`."""
    if mask is None:
        return None
    check_per_token("mask", mask, rows, name)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}: pass mask.bool()")
    return mask.contiguous()


def check_pair(name: str, other: Tensor, logits_name: str, logits: Tensor) -> None:
    """`other` has the shape and the device of the logits."""
    check_logits(logits_name, logits)
    check_logits(name, other)
    if other.shape != logits.shape:
        raise ValueError(
            f"{name} must have the shape of {logits_name}, {tuple(logits.shape)}, got "
            f"{tuple(other.shape)}"
        )
    if other.device != logits.device:
        raise ValueError(
            f"{name} must be on the device of {logits_name}, '{logits.device}', got "
            f"'{other.device}'"
        )


@checks_types
def categorical_kl(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact KL(p || q) over the full vocabulary, p = softmax(p_logits / temperature), q likewise.

    KL(p || q) = sum_j p_j (log p_j - log q_j), never below 0. With p the policy and q the
    reference it is the reverse KL of RLHF (arXiv:1909.08593 eq. 2), without sampling error; with
    p the old policy and q the new it is the trust region's (arXiv:1502.05477 eq. 12).

    Args:
        p_logits, q_logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, any
            strides; the two may differ in dtype. May hold -inf (banned tokens): a token that p
            bans contributes 0, and a token that q bans and p does not makes the KL inf.
        temperature: positive; divides both before everything else.
        mask: bool (N,) or (B, T), true = the token counts. Elsewhere the result and both
            gradients are 0, whatever stands in the logits. None = every token counts.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        (N,) or (B, T), in nats, float32 (float64 where either is float64), differentiable once
        in both arguments. Where the KL is inf the gradient in p_logits is 0, since no small step
        makes it finite, and the one in q_logits is (q - p) / T, as everywhere. A row without a
        finite logit, or with a NaN, gives NaN. Sums run in float32 in a fixed order.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device or temperature.
    """
    check_pair("q_logits", q_logits, "p_logits", p_logits)
    mask = check_mask(mask, p_logits, "p_logits")
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    backend = resolve_backend(backend, p_logits)
    if takes_short_way(p_logits, q_logits, mask):
        return _CategoricalKL.apply(p_logits, q_logits, mask, temperature, backend)
    return categorical_kl_op(p_logits, q_logits, mask, temperature, backend)[0]
