"""A head's product with its row statistics in the epilogue: the logits stay in registers.

    per tile of columns:  m = max z,  s = sum exp(z - m),  t = sum exp(z - m) z,  z[target]
    or, with a shift per row (old_lse):  E = exp(z - shift),  s = sum E,  t = 0, and E is stored

Each program makes one (BLOCK_N, BLOCK_V) tile and writes its own partial sums, which are combined
in a fixed order: no atomics, the same bits twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# BLOCK_N, BLOCK_V, BLOCK_H, warps, stages: the largest that spill nothing on sm_90
STATISTICS_TILE = (128, 256, 64, 8, 3)
EXPONENTIALS_TILE = (128, 128, 64, 8, 4)
GROUP = 8  # row tiles that share a tile of the weight while it is in L2


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _head_tile_kernel(
    Hidden,
    Weight,
    Target,
    Shift,
    E,
    Partial,
    tokens,
    vocabulary,
    hidden_size,
    estride,
    EVEN_H: tl.constexpr,
    STORES_E: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_N), tl.cdiv(vocabulary, BLOCK_V)
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + program % (GROUP * column_tiles) % height
    column_tile = program % (GROUP * column_tiles) // height
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_H)
    # beyond the end the last row is read again, and left out below: no mask in the loop
    left_rows = tl.minimum(rows, tokens - 1).to(tl.int64) * hidden_size
    right_rows = tl.minimum(columns, vocabulary - 1).to(tl.int64) * hidden_size
    Left = Hidden + left_rows[:, None] + inner[None, :]
    Right = Weight + right_rows[None, :] + inner[:, None]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        if EVEN_H:
            left, right = tl.load(Left + start), tl.load(Right + start)
        else:
            inside = inner < hidden_size - start
            left = tl.load(Left + start, mask=inside[None, :], other=0.0)
            right = tl.load(Right + start, mask=inside[:, None], other=0.0)
        z = tl.dot(left, right, z, input_precision=PRECISION)
    target = tl.load(Target + rows, mask=rows < tokens, other=-1).to(tl.int32)
    is_target = columns[None, :] == target[:, None]
    chosen = tl.sum(tl.where(is_target, z, 0.0), 1)
    z = tl.where(columns[None, :] < vocabulary, z, float("-inf"))
    row_max = tl.load(Shift + rows, mask=rows < tokens, other=0.0) if STORES_E else tl.max(z, 1)
    e = tl.exp2((z - row_max[:, None]) * LOG2E)
    if STORES_E:
        # without the target's own term, 1 - p is a sum and no difference
        e = tl.where(is_target, 0.0, e)
        # E's rows have room for whole tiles: a mask on the columns would make the stores narrow
        Out = E + rows.to(tl.int64)[:, None] * estride + columns[None, :]
        tl.store(Out, e.to(E.dtype.element_ty), (rows < tokens)[:, None])
        weighted = tl.zeros((BLOCK_N,), tl.float32)
    else:
        weighted = tl.sum(tl.where(e > 0, e * z, 0.0), 1)
    Out = Partial + column_tile.to(tl.int64) * tokens + rows
    plane = column_tiles.to(tl.int64) * tokens
    tl.store(Out, row_max, rows < tokens)
    tl.store(Out + plane, tl.sum(e, 1), rows < tokens)
    tl.store(Out + 2 * plane, weighted, rows < tokens)
    tl.store(Out + 3 * plane, chosen, rows < tokens)


def tile_sums(
    hidden: Tensor, weight: Tensor, target: Tensor, shift: Tensor | None = None,
    e: Tensor | None = None, tile: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """(4, tiles of V, N): max, sum of exponentials, their sum times z, z[target] of each tile.

    With a shift (N,) the exponentials are taken over it and stored in e (N, V), the target's as 0;
    e's memory is from `exponentials_memory`.
    """
    (tokens, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    tile = tile or (STATISTICS_TILE if e is None else EXPONENTIALS_TILE)
    block_n, block_v, block_h, warps, stages = tile
    tiles = triton.cdiv(vocabulary, block_v)
    partial = torch.empty((4, tiles, tokens), dtype=torch.float32, device=hidden.device)
    _head_tile_kernel[(tiles * triton.cdiv(tokens, block_n),)](
        hidden, weight, target, shift, e, partial, tokens, vocabulary, hidden_size,
        0 if e is None else e.stride(0), EVEN_H=hidden_size % block_h == 0,
        STORES_E=e is not None, PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
        GROUP=GROUP, BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_H=block_h, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return partial


def exponentials_memory(tokens: int, vocabulary: int, like: Tensor) -> Tensor:
    """(N, V) in the dtype of `like`, with room behind each row for a whole tile."""
    width = triton.cdiv(vocabulary, EXPONENTIALS_TILE[1]) * EXPONENTIALS_TILE[1]
    return like.new_empty((tokens, width))[:, :vocabulary]


def token_logprob(hidden: Tensor, weight: Tensor, target: Tensor, tile=None):
    """(logp, entropy, lse) of hidden (N, H) and weight (V, H), each (N,), without a gradient."""
    row_max, total, weighted, chosen = tile_sums(hidden, weight, target, tile=tile)
    highest = row_max.amax(0)
    share = (row_max - highest).exp()
    total = (total * share).sum(0)
    lse = highest + total.log()
    return chosen.sum(0) - lse, lse - (weighted * share).sum(0) / total, lse
