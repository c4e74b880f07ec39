"""Jitted helpers for kernels that sweep rows of logits: aligned tiles, online log-sum-exp.

A row starts anywhere in memory, and its tiles start at the 16-byte boundary at or before it: tile
k holds columns [k * BLOCK - shift, (k + 1) * BLOCK - shift). The first tile and the last are
masked, those between them are not, so that their loads and stores are 16 bytes wide at every V.

The online log-sum-exp keeps, per lane, the running maximum m, s = sum exp((x - m) / T) and
t = sum exp((x - m) / T) (x - m); lanes meet once, at the end of the row. Then
    log Z - max/T = log S,    logp = (x_target - max)/T - log S,    H = log S - (T_sum/S)/T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import tl, triton

ALIGNMENT = 16  # bytes of the widest load
# Bytes of a tile. One sweep: small blocks, several rows in flight on a multiprocessor. Two sweeps:
# one row in flight, so that the second finds it in L2 (132 rows x 304 KB are 40 of 50 MB).
ONE_SWEEP_TILE, TWO_SWEEP_TILE = 8192, 16384

# Logits at or below FLOOR have probability 0; finite, so that differences of two never make NaN,
# and a power of two, so that float32 and float64 hold the same number.
FLOOR = tl.constexpr(-(2.0**100))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offset(row, rows_per_batch, stride_b, stride_t):
    """Elements from the base to row (b, t) = divmod(row, rows_per_batch)."""
    batch = row // rows_per_batch
    return batch.to(tl.int64) * stride_b + (row - batch * rows_per_batch).to(tl.int64) * stride_t


@triton.jit
def misalignment(Row):
    """Elements by which a row starts after a 16-byte boundary."""
    ITEMSIZE: tl.constexpr = Row.dtype.element_ty.primitive_bitwidth // 8
    return ((Row.to(tl.int64) % 16) // ITEMSIZE).to(tl.int32)


@triton.jit
def load_tile(Row, start, columns, end, BOUNDED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile in the accumulator's dtype; NaN stays NaN, -inf and padding become FLOOR."""
    if BOUNDED:
        x = tl.load(Row + start + columns, mask=columns < end - start, other=float("-inf"))
    else:
        x = tl.load(Row + start + columns)
    return tl.maximum(x.to(DTYPE), FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_first_tile(Row, columns, shift, end, DTYPE: tl.constexpr):
    """The row's first tile, whose lanes before `shift` lie before the row."""
    inside = (columns >= shift) & (columns < end)
    x = tl.load(Row + columns, mask=inside, other=float("-inf"))
    return tl.maximum(x.to(DTYPE), FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def online_update(x, m, s, t, scale, WITH_T: tl.constexpr):
    """Takes a tile into the lanes' (m, s, t); one exponential an element. scale = log2(e) / T."""
    d = x - m
    e = tl.exp2(-tl.abs(d) * scale)
    rises = d > 0
    if WITH_T:
        t = tl.where(rises, e * (t - d * s), t + e * d)
    s = tl.where(rises, s * e + 1, s + e)
    return tl.maximum(x, m), s, t


@triton.jit
def combine_lanes(m, s, t, scale, WITH_T: tl.constexpr):
    """(max, S, T_sum) of the row from its lanes. A row with no finite logit gives S = NaN."""
    row_max = tl.max(m, 0)
    weight = tl.exp2((m - row_max) * scale)
    total = tl.sum(s * weight, 0)
    total = tl.where(row_max > FLOOR, total, float("nan"))
    moment = total
    if WITH_T:
        moment = tl.sum(weight * (t + s * (m - row_max)), 0)
    return row_max, total, moment


@triton.jit
def row_statistics(
    Row, shift, end, inv_temperature, BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    """One sweep over a row: (max, log S, entropy, last tile).

    Row points at the 16-byte boundary, the row is its elements [shift, end). The last tile comes
    back so that a second sweep need not load it again; it holds only FLOOR where the first tile
    is the whole row.
    """
    DTYPE: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.full((), inv_temperature, DTYPE) * LOG2E
    columns = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), FLOOR, DTYPE)
    s = tl.zeros((BLOCK,), DTYPE)
    t = tl.zeros((BLOCK,), DTYPE)
    x = load_first_tile(Row, columns, shift, end, DTYPE)
    m, s, t = online_update(x, m, s, t, scale, WITH_ENTROPY)
    last = last_tile_start(end, BLOCK)
    for start in range(BLOCK, last, BLOCK):
        x = load_tile(Row, start, columns, end, False, DTYPE)
        m, s, t = online_update(x, m, s, t, scale, WITH_ENTROPY)
    x = load_tile(Row, last, columns, end, True, DTYPE)
    m, s, t = online_update(x, m, s, t, scale, WITH_ENTROPY)
    row_max, total, moment = combine_lanes(m, s, t, scale, WITH_ENTROPY)
    log_sum = tl.log(total)
    entropy = log_sum
    if WITH_ENTROPY:
        entropy = log_sum - inv_temperature * (moment / total)
    return row_max, log_sum, entropy, x


@triton.jit
def last_tile_start(end, BLOCK: tl.constexpr):
    """Where the masked last tile begins: a multiple of BLOCK, at least BLOCK."""
    return tl.maximum((end - 1) // BLOCK, 1) * BLOCK


@triton.jit
def load_target_logit(Row, shift, end, target, DTYPE: tl.constexpr):
    """The target's logit, NaN where the target is no column of the row (and nothing is read)."""
    inside = (target >= 0) & (target < end - shift)
    return tl.load(Row + shift + target, mask=inside, other=float("nan")).to(DTYPE)


@triton.jit
def tile_gradient(
    x,
    is_target,
    row_max,
    log_sum,
    entropy,
    at_target,
    at_softmax,
    at_entropy,
    inv_temperature,
    WITH_ENTROPY: tl.constexpr,
):
    """dz = (at_target 1[target] + p (at_softmax - at_entropy (log p + H))) / T."""
    logp = (x - row_max) * inv_temperature - log_sum
    factor = at_softmax
    if WITH_ENTROPY:
        factor = at_softmax - at_entropy * (logp + entropy)
    gradient = tl.exp2(logp * LOG2E) * factor
    return tl.where(is_target, gradient + at_target, gradient) * inv_temperature


@triton.jit
def store_row_gradient(
    Row,
    Drow,
    x_last,
    shift,
    end,
    target,
    row_max,
    log_sum,
    entropy,
    at_target,
    at_softmax,
    at_entropy,
    inv_temperature,
    HAVE_LAST: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second sweep over a row: writes its gradient, last tile first, while the tail is in cache.

    Row and Drow may be the same memory: every tile is read before it is written.
    """
    DTYPE: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    columns = tl.arange(0, BLOCK)
    label = target + shift
    last = last_tile_start(end, BLOCK)
    if not HAVE_LAST:
        x_last = load_tile(Row, last, columns, end, True, DTYPE)
    dx = tile_gradient(
        x_last, columns + last == label, row_max, log_sum, entropy,
        at_target, at_softmax, at_entropy, inv_temperature, WITH_ENTROPY,
    )  # fmt: skip
    tl.store(Drow + last + columns, dx.to(Drow.dtype.element_ty), mask=columns < end - last)
    for done in range(BLOCK, last, BLOCK):
        start = last - done
        x = load_tile(Row, start, columns, end, False, DTYPE)
        dx = tile_gradient(
            x, columns + start == label, row_max, log_sum, entropy,
            at_target, at_softmax, at_entropy, inv_temperature, WITH_ENTROPY,
        )  # fmt: skip
        tl.store(Drow + start + columns, dx.to(Drow.dtype.element_ty))
    x = load_first_tile(Row, columns, shift, end, DTYPE)
    dx = tile_gradient(
        x, columns == label, row_max, log_sum, entropy,
        at_target, at_softmax, at_entropy, inv_temperature, WITH_ENTROPY,
    )  # fmt: skip
    inside = (columns >= shift) & (columns < end)
    tl.store(Drow + columns, dx.to(Drow.dtype.element_ty), mask=inside)


@triton.jit
def store_row_constant(Drow, shift, end, value, BLOCK: tl.constexpr):
    """Fills a row's gradient with one value: 0 where no gradient flows."""
    columns = tl.arange(0, BLOCK)
    filled = tl.full((BLOCK,), value, Drow.dtype.element_ty)
    tl.store(Drow + columns, filled, mask=(columns >= shift) & (columns < end))
    last = last_tile_start(end, BLOCK)
    for start in range(BLOCK, last, BLOCK):
        tl.store(Drow + start + columns, filled)
    tl.store(Drow + last + columns, filled, mask=columns < end - last)


@dataclass(frozen=True)
class Launch:
    """Launch values of a row kernel, as keyword arguments of the launch."""

    BLOCK: int
    num_warps: int

    def compiler_options(self) -> dict[str, object]:
        # FP fusion is asked for by name: its default changes between Triton versions
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def options(self) -> dict[str, object]:
        return {"BLOCK": self.BLOCK, **self.compiler_options()}


def choose_launch(vocabulary: int, itemsize: int, tile_bytes: int) -> Launch:
    """Tiles of `tile_bytes`, or of a row that is shorter; 16 elements a thread."""
    needed = triton.next_power_of_2(vocabulary + ALIGNMENT // itemsize - 1)
    block = max(min(tile_bytes // itemsize, needed), 32)
    return Launch(BLOCK=block, num_warps=max(block // 512, 1))


def row_strides(rows: Tensor) -> tuple[int, int, int]:
    """(rows per batch, batch stride, row stride) of (N, V) or (B, T, V), in elements."""
    if rows.dim() == 2:
        return max(rows.shape[0], 1), 0, rows.stride(0)
    return max(rows.shape[1], 1), rows.stride(0), rows.stride(1)


def with_unit_stride(logits: Tensor) -> Tensor:
    """The logits themselves where their last stride is 1, else a contiguous copy."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def phase(rows: Tensor) -> tuple[int, ...]:
    """What must agree between two tensors for their rows to share tile boundaries."""
    _, *strides = row_strides(rows)
    itemsize = rows.element_size()
    offsets = (rows.data_ptr() % ALIGNMENT, *(s * itemsize % ALIGNMENT for s in strides))
    # rows that all start at a boundary share it whatever their dtype
    return (*offsets, itemsize) if any(offsets) else offsets


def gradient_memory(logits: Tensor, inplace: bool) -> Tensor:
    """Where a gradient goes: the logits' own storage where permitted and possible, else new memory.

    Autograd then refuses any later use of logits that it had saved.
    """
    if not inplace or logits.stride(-1) != 1:
        return _empty_gradient(with_unit_stride(logits))
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised memory for a gradient whose rows start at the same phase as the logits'.

    Contiguous wherever contiguous rows have that phase, as they have for contiguous logits.
    """
    lanes = ALIGNMENT // logits.element_size()
    *leading, vocabulary = logits.shape
    rows_per_batch, stride_b, stride_t = row_strides(logits)
    row = vocabulary + (stride_t - vocabulary) % lanes
    batch = rows_per_batch * row
    batch += (stride_b - batch) % lanes if logits.dim() == 3 else 0
    offset = logits.data_ptr() % ALIGNMENT // logits.element_size()
    size = offset + (batch if logits.dim() == 2 else leading[0] * batch)
    strides = (row, 1) if logits.dim() == 2 else (batch, row, 1)
    return torch.empty(size, dtype=logits.dtype, device=logits.device).as_strided(
        logits.shape, strides, offset
    )
