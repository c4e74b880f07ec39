"""The Triton kernel of the softmax Fisher product, and its launch.

Floor: one read of the logits, one of the tangent, one write. A row's second sweep comes from
registers and L2.
"""

from __future__ import annotations

import torch

from ..backend import tl, triton
from .categorical_kl import lane_columns
from .launch import number, row_strides, same_phase, with_unit_stride
from .sweep import FLOOR, LOG2E, row_offset
from .tiles import (
    TWO_SWEEP_TILE,
    choose_launch,
    last_tile_start,
    load_first_tile,
    load_tile,
    misalignment,
)

UNSPECIALIZED = ["vocabulary", "rows_per_batch", "stride_b", "stride_t"]
UNSPECIALIZED += ["tangent_stride_b", "tangent_stride_t", "product_stride_b", "product_stride_t"]


@triton.jit
def _moment_update(x, v, m, s, t, scale):
    """Takes a tile into m = max x, s = sum exp((x - m) / T), t = sum exp((x - m) / T) v."""
    risen = tl.maximum(m, tl.max(x, 1))
    weight = tl.exp2((m - risen) * scale)
    e = tl.exp2((x - risen[:, None]) * scale)
    return risen, weight * s + tl.sum(e, 1), weight * t + tl.sum(e * v, 1)


@triton.jit
def _load_tangent(Tangent, x, start, columns, inside, BOUNDED: tl.constexpr):
    """A tile of the tangent, 0 outside the row and where a token is banned."""
    if BOUNDED:
        v = tl.load(Tangent + start + columns, mask=inside, other=0.0)
    else:
        v = tl.load(Tangent + start + columns)
    return tl.where(x > FLOOR, v.to(x.dtype), 0.0)


@triton.jit
def _product_tile(x, v, row_max, mean, scale, factor):
    return tl.exp2((x - row_max) * scale) * factor * (v - mean)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fisher_vector_product_kernel(
    Logits,
    Tangent,
    Product,
    vocabulary,
    rows_per_batch,
    stride_b,
    stride_t,
    tangent_stride_b,
    tangent_stride_t,
    product_stride_b,
    product_stride_t,
    inv_temperature,
    DTYPE: tl.constexpr,
    SAME_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    Logits += row_offset(row, rows_per_batch, stride_b, stride_t)
    shift = misalignment(Logits)
    Logits = tl.multiple_of(Logits - shift, 16)
    Tangent += row_offset(row, rows_per_batch, tangent_stride_b, tangent_stride_t) - shift
    Product += row_offset(row, rows_per_batch, product_stride_b, product_stride_t) - shift
    if SAME_PHASE:
        Tangent = tl.multiple_of(Tangent, 16)
        Product = tl.multiple_of(Product, 16)
    end = shift + vocabulary
    last = last_tile_start(end, BLOCK)
    columns = lane_columns(Logits, BLOCK)
    lanes: tl.constexpr = columns.shape[0]
    in_first = (columns >= shift) & (columns < end)
    in_last = columns < end - last
    scale = tl.full((), inv_temperature, DTYPE) * LOG2E
    m = tl.full((lanes,), FLOOR, DTYPE)
    s = tl.zeros((lanes,), DTYPE)
    t = tl.zeros((lanes,), DTYPE)
    x = load_first_tile(Logits, columns, shift, end, DTYPE)
    v = _load_tangent(Tangent, x, 0, columns, in_first, True)
    m, s, t = _moment_update(x, v, m, s, t, scale)
    for start in range(BLOCK, last, BLOCK):
        x = load_tile(Logits, start, columns, end, False, DTYPE)
        v = _load_tangent(Tangent, x, start, columns, in_last, False)
        m, s, t = _moment_update(x, v, m, s, t, scale)
    x = load_tile(Logits, last, columns, end, True, DTYPE)
    v = _load_tangent(Tangent, x, last, columns, in_last, True)
    m, s, t = _moment_update(x, v, m, s, t, scale)

    row_max = tl.max(m, 0)
    weight = tl.exp2((m - row_max) * scale)
    total = tl.sum(weight * s, 0)
    # a row with no finite logit is no distribution
    total = tl.where(row_max > FLOOR, total, float("nan"))
    mean = tl.sum(weight * t, 0) / total
    factor = tl.full((), inv_temperature, DTYPE) * inv_temperature / total

    # back from the last tile, which is still in registers, while the tail of the row is in cache
    y = _product_tile(x, v, row_max, mean, scale, factor)
    tl.store(Product + last + columns, y.to(Product.dtype.element_ty), mask=in_last)
    for done in range(BLOCK, last, BLOCK):
        start = last - done
        x = load_tile(Logits, start, columns, end, False, DTYPE)
        v = _load_tangent(Tangent, x, start, columns, in_last, False)
        y = _product_tile(x, v, row_max, mean, scale, factor)
        tl.store(Product + start + columns, y.to(Product.dtype.element_ty))
    # another spelling of in_first: the same one would stay in registers, which then spill
    in_first = (columns - shift).to(tl.uint32, bitcast=True) < vocabulary.to(tl.uint32)
    x = tl.load(Logits + columns, mask=in_first, other=float("-inf"))
    x = tl.maximum(x.to(DTYPE), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    v = _load_tangent(Tangent, x, 0, columns, in_first, True)
    y = _product_tile(x, v, row_max, mean, scale, factor)
    tl.store(Product + columns, y.to(Product.dtype.element_ty), mask=in_first)


def fisher_vector_product(logits, tangent, product, temperature, dtype) -> None:
    """Writes F tangent into product."""
    logits, tangent = with_unit_stride(logits), with_unit_stride(tangent)
    count = logits.shape[:-1].numel()
    if not count:
        return
    itemsize = max(logits.element_size(), tangent.element_size())
    launch = choose_launch(logits.shape[-1], itemsize, TWO_SWEEP_TILE)
    fisher_vector_product_kernel[(count,)](
        logits, tangent, product, logits.shape[-1], *row_strides(logits),
        *row_strides(tangent)[1:], *row_strides(product)[1:], number(1.0 / temperature, dtype),
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        SAME_PHASE=same_phase(logits, tangent, product), **launch.options(),
    )  # fmt: skip
