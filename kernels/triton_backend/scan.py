"""Reverse scans in Triton: a row from its end to its start, each input read once.

The value entering token t from its right, N_t = P_next(t), follows one linear recurrence
    P_t = x_t + c_t N_t,   x_t = (1 - lam) V_t + lam r_t,   c_t = gamma lam (0 where terminated)
with (c, x) = (1, 0) at masked tokens and P = last_value past the row's end. It gives both results:
    returns_t = r_t + gamma N_t,   advantage_t = returns_t - V_t       (gamma 0 where terminated).

A tile is (rows, lanes, 4 tokens of 16 bytes), its lanes in reverse order of time, so that a forward
scan over lanes runs backwards in time. A row longer than a tile is split: every tile publishes its
own (c, x) as one 64-bit word and folds the words to its right, in an order that is always the same.
"""

from __future__ import annotations

from ..backend import tl, triton

VECTOR = tl.constexpr(4)  # neighbouring tokens of a lane
PENDING = tl.constexpr(-1)  # no summary: its coefficient would be a NaN, which no product gives


@triton.jit
def _compose(c_right, x_right, d_right, y_right, c, x, d, y):
    """Two neighbouring spans in one; (c, x) maps across the span, (d, y) stops before its start."""
    return c * c_right, x + c * x_right, d * c_right, y + d * x_right


@triton.jit
def _fold(c_right, x_right, c, x):
    return c * c_right, x + c * x_right


@triton.jit
def _vector_parts(x):
    """(rows, lanes, 4) to the four (rows, lanes) of equal place in their lane."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def summarise(c, x):
    """(c_in, x_in) from the tile's right edge to each lane's, and (c, x) of the whole tile."""
    c0, c1, c2, c3 = _vector_parts(c)
    x0, x1, x2, x3 = _vector_parts(x)
    c_left, x_left = _fold(c1, x1, c0, x0)
    c_right, x_right = _fold(c3, x3, c2, x2)
    c_lane, x_lane = _fold(c_right, x_right, c_left, x_left)
    c_all, x_all, c_in, x_in = tl.associative_scan(
        (c_lane, x_lane, tl.full(c_lane.shape, 1, c.dtype), tl.zeros_like(x_lane)), 1, _compose
    )
    is_last = tl.arange(0, x.shape[1])[None, :] == x.shape[1] - 1
    c_tile = tl.sum(tl.where(is_last, c_all, 0), 1)
    x_tile = tl.sum(tl.where(is_last, x_all, 0), 1)
    return c_in, x_in, c_tile, x_tile


@triton.jit
def entering(c, x, c_in, x_in, carry):
    """N: what enters each token of the tile, (rows, lanes, 4), given what enters the tile."""
    _, c1, c2, c3 = _vector_parts(c)
    _, x1, x2, x3 = _vector_parts(x)
    n3 = x_in + c_in * carry[:, None]
    n2 = x3 + c3 * n3
    n1 = x2 + c2 * n2
    n0 = x1 + c1 * n1
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), x.shape)


@triton.jit
def _publish(Word, c, x):
    """A tile's (c, x), each (1,) float32, as one word: whoever sees one half sees the other."""
    high = c.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(Word + tl.arange(0, 1), high | low)


@triton.jit
def _look_back(Words, count, carry, WIDTH: tl.constexpr):
    """What leaves the first `count` tiles of a row, the row's end first, once all are published."""
    place = tl.arange(0, WIDTH)
    # The wait ends: programs start in the order of their ids, and tiles to the right come first.
    word = tl.load(Words + place, mask=place < count, other=0, volatile=True)
    while tl.max((word == PENDING).to(tl.int32), 0) > 0:
        word = tl.load(Words + place, mask=place < count, other=0, volatile=True)
    c = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    x = word.to(tl.int32).to(tl.float32, bitcast=True)
    # A scan, as a reduction does not promise the order of its operands.
    c, x = tl.associative_scan((tl.where(place < count, c, 1), x), 0, _fold)
    c = tl.sum(tl.where(place == WIDTH - 1, c, 0), 0)
    x = tl.sum(tl.where(place == WIDTH - 1, x, 0), 0)
    return x + c * carry


@triton.jit
def program_rows(programs, ROWS: tl.constexpr):
    """This program's rows, (ROWS, 1, 1), where `programs` share a row."""
    return (tl.program_id(0) // programs) * ROWS + tl.arange(0, ROWS)[:, None, None]


@triton.jit
def tile_places(tile, tiles, length, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Times (1, LANES, 4) of a tile, and which lie inside the row; tile 0 is the row's last."""
    lane = LANES - 1 - tl.arange(0, LANES)[None, :, None]
    first = (tiles - 1 - tile) * (LANES * VECTOR) + lane * VECTOR
    time = first + tl.arange(0, VECTOR)[None, None, :]
    # With a length that 4 divides a lane's tokens exist together, which keeps its accesses wide.
    return time, (first + tl.zeros_like(time) if ALIGNED else time) < length


@triton.jit
def row_start(row, length, ALIGNED: tl.constexpr):
    """Tokens before the row; the compiler sees that 4 divides them where it does."""
    if ALIGNED:
        length = length // VECTOR * VECTOR
    return row.to(tl.int64) * length


@triton.jit
def load_mask(Mask, offset, inside):
    """Whether a token counts; without a mask every token that exists does."""
    # one return: Triton compiles what stands after a return inside an `if`
    if Mask is None:  # noqa: SIM108
        counted = inside
    else:
        counted = tl.load(Mask + offset, mask=inside, other=0) != 0
    return counted


@triton.jit
def load_row(Row, row, rows, fallback, DTYPE: tl.constexpr):
    """One number a row, (ROWS,), `fallback` where there is no tensor."""
    row = tl.reshape(row, (row.shape[0],))
    if Row is None:
        numbers = tl.full((row.shape[0],), fallback, DTYPE)
    else:
        numbers = tl.load(Row + row, mask=row < rows, other=fallback).to(DTYPE)
    return numbers


UNSPECIALIZED = ["rows", "length", "tiles"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gae_kernel(
    Reward,
    Value,
    Mask,
    Terminated,
    LastValue,
    Words,
    Advantage,
    Returns,
    rows,
    length,
    tiles,
    gamma,
    lam,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    DTYPE: tl.constexpr = Returns.dtype.element_ty
    gamma, lam = tl.full((), gamma, DTYPE), tl.full((), lam, DTYPE)
    # (tiles to sweep here, first of them): one tile a program where tiles share their summaries
    programs = tiles if Words is not None else 1
    tile = tl.program_id(0) % programs
    row = program_rows(programs, ROWS)
    carry = load_row(LastValue, row, rows, 0, DTYPE)
    while tile < tiles:
        time, inside = tile_places(tile, tiles, length, LANES, ALIGNED)
        inside = inside & (row < rows)
        offset = row_start(row, length, ALIGNED) + time
        counted = load_mask(Mask, offset, inside)
        reward = tl.load(Reward + offset, mask=inside, other=0).to(DTYPE)
        goes_on = counted
        if Terminated is not None:
            goes_on = counted & (tl.load(Terminated + offset, mask=inside, other=0) == 0)
        x = reward
        if Value is not None:
            value = tl.load(Value + offset, mask=inside, other=0).to(DTYPE)
            x = (1 - lam) * value + lam * reward
        x = tl.where(counted, x, 0)
        c = tl.where(counted, tl.where(goes_on, gamma * lam, 0), 1).to(DTYPE)
        c_in, x_in, c_tile, x_tile = summarise(c, x)
        if Words is not None:
            Row = Words + (tl.program_id(0) // tiles).to(tl.int64) * tiles
            _publish(Row + tile, c_tile, x_tile)
            carry = _look_back(Row, tile, carry, WIDTH)
        following = entering(c, x, c_in, x_in, carry)
        returns = reward + tl.where(goes_on, gamma * following, 0)
        tl.store(Returns + offset, tl.where(counted, returns, 0), mask=inside)
        if Value is not None:
            tl.store(Advantage + offset, tl.where(counted, returns - value, 0), mask=inside)
        carry = x_tile + c_tile * carry
        tile += programs
