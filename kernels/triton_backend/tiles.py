"""Jitted helpers for kernels that sweep several rows at a time: tiles with masked ends.

A row starts anywhere in memory, and its tiles start at the 16-byte boundary at or before it: tile
k holds columns [k * BLOCK - shift, (k + 1) * BLOCK - shift). The first tile and the last are
masked, those between them are not, so that their loads and stores are 16 bytes wide at every V.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend import tl, triton
from .launch import ALIGNMENT
from .sweep import FLOOR, row_offset

# Bytes of a tile. One sweep: small blocks, several rows in flight on a multiprocessor. Two sweeps:
# one row in flight, so that the second finds it in L2.
ONE_SWEEP_TILE, TWO_SWEEP_TILE = 8192, 16384


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
def last_tile_start(end, BLOCK: tl.constexpr):
    """Where the masked last tile begins: a multiple of BLOCK, at least BLOCK."""
    return tl.maximum((end - 1) // BLOCK, 1) * BLOCK


@triton.jit
def shifted_row(D, row, rows_per_batch, stride_b, stride_t, shift, SAME_PHASE: tl.constexpr):
    """Where a row's tiles begin, `shift` elements before the row; None for None."""
    Row = D
    if D is not None:
        Row = D + row_offset(row, rows_per_batch, stride_b, stride_t) - shift
        if SAME_PHASE:
            Row = tl.multiple_of(Row, 16)
    return Row


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
