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

from . import categorical_reference as reference
from .backend import resolve_backend, takes_short_way, tl, triton
from .blocks import statistics_dtype
from .checks import FLOATS, check_finite, check_per_token, check_positive
from .rows import (
    FLOOR,
    LOG2E,
    ONE_SWEEP_TILE,
    Launch,
    choose_launch,
    gradient_memory,
    last_tile_start,
    load_first_tile,
    load_tile,
    misalignment,
    phase,
    row_offset,
    row_strides,
    store_row_constant,
    with_unit_stride,
)

UNSPECIALIZED = ["vocabulary", "rows_per_batch"]
UNSPECIALIZED += [f"{row}stride_{axis}" for row in ("p_", "q_", "dp_", "dq_") for axis in "bt"]


@triton.jit
def lane_columns(Row, BLOCK: tl.constexpr):
    """A tile's columns, (BLOCK / VECTOR, VECTOR): 16 bytes of a row to a lane."""
    VECTOR: tl.constexpr = 128 // Row.dtype.element_ty.primitive_bitwidth
    lanes = tl.arange(0, BLOCK // VECTOR)
    return lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _kl_update(a, b, p_max, p_sum, u, q_max, q_sum, banned, scale):
    """Takes two tiles into the lanes' state. scale = log2(e) / T.

    With e = exp((a - p_max) / T): p_sum = sum e and u = sum e ((a - p_max) - (b - q_max)), for
    maxima that rise as the sweep goes on. banned: the largest a whose b is banned.
    """
    p_new = tl.maximum(p_max, tl.max(a, 1))
    q_new = tl.maximum(q_max, tl.max(b, 1))
    p_weight = tl.exp2((p_max - p_new) * scale)
    q_weight = tl.exp2((q_max - q_new) * scale)
    rise = (p_new - p_max) - (q_new - q_max)
    above_p = a - p_new[:, None]
    above_q = b - q_new[:, None]
    e = tl.exp2(above_p * scale)
    u = p_weight * (u - p_sum * rise) + tl.sum(e * (above_p - above_q), 1)
    p_sum = p_weight * p_sum + tl.sum(e, 1)
    q_sum = q_weight * q_sum + tl.sum(tl.exp2(above_q * scale), 1)
    banned = tl.maximum(banned, tl.max(tl.where(b > FLOOR, FLOOR, a), 1))
    return p_new, p_sum, u, q_new, q_sum, banned


@triton.jit
def _combine_lanes(p_max, p_sum, u, q_max, q_sum, banned, inv_temperature, scale):
    """(KL, max a, log P, max b, log Q) of the row, P = sum exp((a - max a) / T), Q likewise."""
    p_row_max = tl.max(p_max, 0)
    q_row_max = tl.max(q_max, 0)
    weight = tl.exp2((p_max - p_row_max) * scale)
    p_total = tl.sum(weight * p_sum, 0)
    q_total = tl.sum(tl.exp2((q_max - q_row_max) * scale) * q_sum, 0)
    # a row with no finite logit is no distribution
    p_total = tl.where(p_row_max > FLOOR, p_total, float("nan"))
    q_total = tl.where(q_row_max > FLOOR, q_total, float("nan"))
    rise = (p_row_max - p_max) - (q_row_max - q_max)
    mean = tl.sum(weight * (u - p_sum * rise), 0) / p_total
    kl = mean * inv_temperature + tl.log(q_total / p_total)
    kl = tl.maximum(kl, 0.0, propagate_nan=tl.PropagateNan.ALL)
    kl += tl.where(tl.max(banned, 0) > FLOOR, float("inf"), 0.0)
    return kl, p_row_max, tl.log(p_total), q_row_max, tl.log(q_total)


@triton.jit
def _kl_statistics(P, Q, shift, end, inv_temperature, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One sweep over two rows, each its elements [shift, end): what `_combine_lanes` returns."""
    scale = tl.full((), inv_temperature, DTYPE) * LOG2E
    columns = lane_columns(P, BLOCK)
    lanes: tl.constexpr = columns.shape[0]
    p_max = tl.full((lanes,), FLOOR, DTYPE)
    q_max = tl.full((lanes,), FLOOR, DTYPE)
    banned = tl.full((lanes,), FLOOR, DTYPE)
    p_sum = tl.zeros((lanes,), DTYPE)
    q_sum = tl.zeros((lanes,), DTYPE)
    u = tl.zeros((lanes,), DTYPE)
    a = load_first_tile(P, columns, shift, end, DTYPE)
    b = load_first_tile(Q, columns, shift, end, DTYPE)
    p_max, p_sum, u, q_max, q_sum, banned = _kl_update(
        a, b, p_max, p_sum, u, q_max, q_sum, banned, scale
    )
    last = last_tile_start(end, BLOCK)
    for start in range(BLOCK, last, BLOCK):
        a = load_tile(P, start, columns, end, False, DTYPE)
        b = load_tile(Q, start, columns, end, False, DTYPE)
        p_max, p_sum, u, q_max, q_sum, banned = _kl_update(
            a, b, p_max, p_sum, u, q_max, q_sum, banned, scale
        )
    a = load_tile(P, last, columns, end, True, DTYPE)
    b = load_tile(Q, last, columns, end, True, DTYPE)
    p_max, p_sum, u, q_max, q_sum, banned = _kl_update(
        a, b, p_max, p_sum, u, q_max, q_sum, banned, scale
    )
    return _combine_lanes(p_max, p_sum, u, q_max, q_sum, banned, inv_temperature, scale)


@triton.jit(do_not_specialize=UNSPECIALIZED[:6])
def _categorical_kl_forward_kernel(
    P,
    Q,
    Mask,
    KL,
    PMax,
    PLogSum,
    QMax,
    QLogSum,
    vocabulary,
    rows_per_batch,
    p_stride_b,
    p_stride_t,
    q_stride_b,
    q_stride_t,
    inv_temperature,
    SAME_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    counted = True
    if Mask is not None:
        counted = tl.load(Mask + row) != 0
    if counted:
        P += row_offset(row, rows_per_batch, p_stride_b, p_stride_t)
        Q += row_offset(row, rows_per_batch, q_stride_b, q_stride_t)
        # tiles follow the phase of p; where q has another, its loads are narrow but right
        shift = misalignment(P)
        P = tl.multiple_of(P - shift, 16)
        Q = Q - shift
        if SAME_PHASE:
            Q = tl.multiple_of(Q, 16)
        kl, p_max, p_log_sum, q_max, q_log_sum = _kl_statistics(
            P, Q, shift, shift + vocabulary, inv_temperature, KL.dtype.element_ty, BLOCK
        )
        tl.store(KL + row, kl)
        tl.store(PMax + row, p_max)
        tl.store(PLogSum + row, p_log_sum)
        tl.store(QMax + row, q_max)
        tl.store(QLogSum + row, q_log_sum)
    else:
        tl.store(KL + row, 0.0)
        tl.store(PMax + row, 0.0)
        tl.store(PLogSum + row, 0.0)
        tl.store(QMax + row, 0.0)
        tl.store(QLogSum + row, 0.0)


@triton.jit
def _tile_gradients(
    a, b, p_max, p_log_sum, q_max, q_log_sum, kl, at_p, at_q, inv_temperature
):  # fmt: skip
    """(da, db) of a tile: p (log p - log q - KL) at_p and (q - p) at_q."""
    log_p = (a - p_max) * inv_temperature - p_log_sum
    log_q = (b - q_max) * inv_temperature - q_log_sum
    p = tl.exp2(log_p * LOG2E)
    q = tl.exp2(log_q * LOG2E)
    return p * (log_p - log_q - kl) * at_p, (q - p) * at_q


@triton.jit
def _store_tile(D, start, columns, inside, gradient, BOUNDED: tl.constexpr):
    """Writes a gradient's tile, unless the gradient was not asked for."""
    if D is not None:
        if BOUNDED:
            tl.store(D + start + columns, gradient.to(D.dtype.element_ty), mask=inside)
        else:
            tl.store(D + start + columns, gradient.to(D.dtype.element_ty))


@triton.jit
def _shifted_row(D, row, rows_per_batch, stride_b, stride_t, shift, SAME_PHASE: tl.constexpr):
    """Where a row's tiles begin, `shift` elements before the row; None for None."""
    Row = D
    if D is not None:
        Row = D + row_offset(row, rows_per_batch, stride_b, stride_t) - shift
        if SAME_PHASE:
            Row = tl.multiple_of(Row, 16)
    return Row


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _categorical_kl_backward_kernel(
    P,
    Q,
    Dp,
    Dq,
    Mask,
    KL,
    PMax,
    PLogSum,
    QMax,
    QLogSum,
    Dkl,
    vocabulary,
    rows_per_batch,
    p_stride_b,
    p_stride_t,
    q_stride_b,
    q_stride_t,
    dp_stride_b,
    dp_stride_t,
    dq_stride_b,
    dq_stride_t,
    inv_temperature,
    SAME_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    DTYPE: tl.constexpr = KL.dtype.element_ty
    P += row_offset(row, rows_per_batch, p_stride_b, p_stride_t)
    shift = misalignment(P)
    P = tl.multiple_of(P - shift, 16)
    Q = _shifted_row(Q, row, rows_per_batch, q_stride_b, q_stride_t, shift, SAME_PHASE)
    Dp = _shifted_row(Dp, row, rows_per_batch, dp_stride_b, dp_stride_t, shift, SAME_PHASE)
    Dq = _shifted_row(Dq, row, rows_per_batch, dq_stride_b, dq_stride_t, shift, SAME_PHASE)
    end = shift + vocabulary
    dkl = tl.load(Dkl + row)
    flows = dkl != 0
    if Mask is not None:
        flows &= tl.load(Mask + row) != 0
    if flows:
        kl = tl.load(KL + row)
        p_max = tl.load(PMax + row)
        p_log_sum = tl.load(PLogSum + row)
        q_max = tl.load(QMax + row)
        q_log_sum = tl.load(QLogSum + row)
        at_q = dkl * inv_temperature
        # an infinite KL has no slope in p
        at_p = tl.where(kl == float("inf"), 0.0, at_q)
        kl = tl.where(kl == float("inf"), 0.0, kl)
        columns = tl.arange(0, BLOCK)
        inside = (columns >= shift) & (columns < end)
        a = load_first_tile(P, columns, shift, end, DTYPE)
        b = load_first_tile(Q, columns, shift, end, DTYPE)
        da, db = _tile_gradients(
            a, b, p_max, p_log_sum, q_max, q_log_sum, kl, at_p, at_q, inv_temperature
        )
        _store_tile(Dp, 0, columns, inside, da, True)
        _store_tile(Dq, 0, columns, inside, db, True)
        last = last_tile_start(end, BLOCK)
        for start in range(BLOCK, last, BLOCK):
            a = load_tile(P, start, columns, end, False, DTYPE)
            b = load_tile(Q, start, columns, end, False, DTYPE)
            da, db = _tile_gradients(
                a, b, p_max, p_log_sum, q_max, q_log_sum, kl, at_p, at_q, inv_temperature
            )
            _store_tile(Dp, start, columns, inside, da, False)
            _store_tile(Dq, start, columns, inside, db, False)
        a = load_tile(P, last, columns, end, True, DTYPE)
        b = load_tile(Q, last, columns, end, True, DTYPE)
        da, db = _tile_gradients(
            a, b, p_max, p_log_sum, q_max, q_log_sum, kl, at_p, at_q, inv_temperature
        )
        _store_tile(Dp, last, columns, columns < end - last, da, True)
        _store_tile(Dq, last, columns, columns < end - last, db, True)
    else:
        if Dp is not None:
            store_row_constant(Dp, shift, end, 0.0, BLOCK)
        if Dq is not None:
            store_row_constant(Dq, shift, end, 0.0, BLOCK)


def same_phase(*tensors: Tensor | None) -> bool:
    """Whether rows of all tensors start at the same distance from a 16-byte boundary."""
    return len({(t.element_size(), phase(t)) for t in tensors if t is not None}) == 1


def launch_values(*tensors: Tensor) -> Launch:
    """Tiles for a sweep over rows of several tensors: the widest element counts."""
    itemsize = max(t.element_size() for t in tensors)
    return choose_launch(tensors[0].shape[-1], itemsize, ONE_SWEEP_TILE)


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return max((statistics_dtype(t) for t in tensors), key=lambda dtype: dtype.itemsize)


def _launch_forward(p_logits, q_logits, mask, temperature):
    """(KL, max a, log P, max b, log Q)."""
    p_logits, q_logits = with_unit_stride(p_logits), with_unit_stride(q_logits)
    dtype = accumulator_dtype(p_logits, q_logits)
    results = [
        torch.empty(p_logits.shape[:-1], dtype=dtype, device=p_logits.device) for _ in range(5)
    ]
    if results[0].numel():
        _categorical_kl_forward_kernel[(results[0].numel(),)](
            p_logits, q_logits, mask, *results, p_logits.shape[-1], *row_strides(p_logits),
            *row_strides(q_logits)[1:], 1.0 / temperature,
            SAME_PHASE=same_phase(p_logits, q_logits),
            **launch_values(p_logits, q_logits).options(),
        )  # fmt: skip
    return results


def _launch_backward(p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, temperature):
    p_logits, q_logits = with_unit_stride(p_logits), with_unit_stride(q_logits)
    if kl.numel():
        strides = [s for d in (dp, dq) for s in ((0, 0) if d is None else row_strides(d)[1:])]
        _categorical_kl_backward_kernel[(kl.numel(),)](
            p_logits, q_logits, dp, dq, mask, kl, *row_statistics, dkl.contiguous(),
            p_logits.shape[-1], *row_strides(p_logits), *row_strides(q_logits)[1:], *strides,
            1.0 / temperature, SAME_PHASE=same_phase(p_logits, q_logits, dp, dq),
            **launch_values(p_logits, q_logits).options(),
        )  # fmt: skip


def _forward(p_logits, q_logits, mask, temperature, backend):
    """(KL, max a, log P, max b, log Q); the last four are None from the torch backend."""
    if backend == "triton":
        return _launch_forward(p_logits, q_logits, mask, temperature)
    dtype = accumulator_dtype(p_logits, q_logits)
    kl = reference.categorical_kl_forward(p_logits, q_logits, mask, temperature, dtype)
    return [kl, None, None, None, None]


def _backward(backend, p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, temperature):
    """Writes the gradients into dp and dq, of which either may be None."""
    given = (p_logits, q_logits, dp, dq, mask, kl)
    if backend == "triton":
        _launch_backward(*given, row_statistics, dkl, temperature)
    else:
        reference.categorical_kl_backward(*given, dkl, temperature)


class _CategoricalKL(torch.autograd.Function):
    """The short way of eager mode."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, mask, temperature, backend):
        kl, *row_statistics = _forward(p_logits, q_logits, mask, temperature, backend)
        ctx.save_for_backward(p_logits, q_logits, mask, kl, *row_statistics)
        ctx.temperature, ctx.backend = temperature, backend
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        p_logits, q_logits, mask, kl, *row_statistics = ctx.saved_tensors
        dp, dq = (
            _gradient_memory(ctx.backend, logits) if needed else None
            for logits, needed in zip((p_logits, q_logits), ctx.needs_input_grad, strict=False)
        )
        _backward(
            ctx.backend, p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, ctx.temperature
        )
        return dp, dq, None, None, None


def _gradient_memory(backend: str, logits: Tensor) -> Tensor:
    """Memory for a gradient, laid out as the backend likes it."""
    if backend == "triton":
        return gradient_memory(logits, False)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("rlcore::categorical_kl", mutates_args=())
def categorical_kl_op(
    p_logits: Tensor, q_logits: Tensor, mask: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(KL, max a, log P, max b, log Q); the last four are empty from the torch backend."""
    parts = _forward(p_logits, q_logits, mask, temperature, backend)
    return tuple(parts[0].new_empty(0) if part is None else part for part in parts)


@categorical_kl_op.register_fake
def _(p_logits, q_logits, mask, temperature, backend):
    shapes = [p_logits.shape[:-1]] + [p_logits.shape[:-1] if backend == "triton" else (0,)] * 4
    dtype = accumulator_dtype(p_logits, q_logits)
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
    _backward(
        backend, p_logits, q_logits, dp if needs[0] else None, dq if needs[1] else None, mask, kl,
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


def check_logits(name: str, logits: Tensor) -> None:
    """One floating point row a token."""
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{name} must have shape (N, V) or (B, T, V), got {tuple(logits.shape)}: reshape them"
        )
    if logits.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got {tuple(logits.shape)}")


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
    if mask is not None:
        check_per_token("mask", mask, p_logits)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}: pass mask.bool()")
        mask = mask.contiguous()
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    backend = resolve_backend(backend, p_logits)
    if takes_short_way(p_logits, q_logits, mask):
        return _CategoricalKL.apply(p_logits, q_logits, mask, temperature, backend)
    return categorical_kl_op(p_logits, q_logits, mask, temperature, backend)[0]
