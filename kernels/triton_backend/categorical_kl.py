"""The Triton kernels of the categorical KL, and their launches.

Lanes hold 16 bytes of a row each, so that a lane's maxima and sums are scalars of one thread.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import tl, triton
from ..blocks import statistics_dtype
from .launch import number, row_strides, same_phase, with_unit_stride
from .sweep import FLOOR, LOG2E, row_offset
from .tiles import (
    ONE_SWEEP_TILE,
    Launch,
    choose_launch,
    last_tile_start,
    load_first_tile,
    load_tile,
    misalignment,
    shifted_row,
    store_row_constant,
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
def categorical_kl_forward_kernel(
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def categorical_kl_backward_kernel(
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
    Q = shifted_row(Q, row, rows_per_batch, q_stride_b, q_stride_t, shift, SAME_PHASE)
    Dp = shifted_row(Dp, row, rows_per_batch, dp_stride_b, dp_stride_t, shift, SAME_PHASE)
    Dq = shifted_row(Dq, row, rows_per_batch, dq_stride_b, dq_stride_t, shift, SAME_PHASE)
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


def _launch_values(*tensors: Tensor) -> Launch:
    """Tiles for a sweep over rows of several tensors: the widest element counts."""
    itemsize = max(t.element_size() for t in tensors)
    return choose_launch(tensors[0].shape[-1], itemsize, ONE_SWEEP_TILE)


def categorical_kl_forward(p_logits, q_logits, mask, temperature):
    """[KL(p || q), max a, log P, max b, log Q], zeros where the mask is false."""
    p_logits, q_logits = with_unit_stride(p_logits), with_unit_stride(q_logits)
    dtype = statistics_dtype(p_logits, q_logits)
    results = [p_logits.new_empty(p_logits.shape[:-1], dtype=dtype) for _ in range(5)]
    if results[0].numel():
        categorical_kl_forward_kernel[(results[0].numel(),)](
            p_logits, q_logits, mask, *results, p_logits.shape[-1], *row_strides(p_logits),
            *row_strides(q_logits)[1:], number(1.0 / temperature, dtype),
            SAME_PHASE=same_phase(p_logits, q_logits),
            **_launch_values(p_logits, q_logits).options(),
        )  # fmt: skip
    return results


def categorical_kl_backward(
    p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, temperature
) -> None:
    """Writes the gradients into dp and dq, of which either may be None."""
    p_logits, q_logits = with_unit_stride(p_logits), with_unit_stride(q_logits)
    if kl.numel():
        strides = [s for d in (dp, dq) for s in ((0, 0) if d is None else row_strides(d)[1:])]
        categorical_kl_backward_kernel[(kl.numel(),)](
            p_logits, q_logits, dp, dq, mask, kl, *row_statistics, dkl.contiguous(),
            p_logits.shape[-1], *row_strides(p_logits), *row_strides(q_logits)[1:], *strides,
            number(1.0 / temperature, row_statistics[0].dtype),
            SAME_PHASE=same_phase(p_logits, q_logits, dp, dq),
            **_launch_values(p_logits, q_logits).options(),
        )  # fmt: skip
