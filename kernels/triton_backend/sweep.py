"""Jitted helpers for kernels that sweep a row of logits: online log-sum-exp, gradient of a row.

A row is a body of whole 16-byte vectors, from the first 16-byte boundary in it, and an edge of the
few elements before and after. A tile is THREADS vectors, one a thread, so that loads and stores
are 16 bytes wide at every V; only the last tile is masked, vector by vector. The edge is one small
masked load.

The online log-sum-exp keeps, per thread, the largest logit m so far and, with exponents in base 2,
    z = (x - m) log2(e) / T,   s = sum 2^z,   t = sum 2^z z.
Threads and edge meet once, at the end of the row, at its largest logit. Then
    log Z - max/T = log S,    logp = (x_target - max)/T - log S,    H = log S - ln 2 T_sum / S.
"""

from __future__ import annotations

from ..backend import tl, triton
from ..limits import held_

# Logits at or below FLOOR have probability 0; finite, so that differences of two never make NaN,
# and a power of two, so that float32 and float64 hold the same number.
FLOOR = tl.constexpr(-(2.0**100))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_offset(row, rows_per_batch, stride_b, stride_t):
    """Elements from the base to row (b, t) = divmod(row, rows_per_batch)."""
    batch = row // rows_per_batch
    return batch.to(tl.int64) * stride_b + (row - batch * rows_per_batch).to(tl.int64) * stride_t


@triton.jit
def body_of(Row, vocabulary):
    """(first, vectors, head): the body's offset in the row, its length, elements before it."""
    ITEMSIZE: tl.constexpr = Row.dtype.element_ty.primitive_bitwidth // 8
    LANES: tl.constexpr = 16 // ITEMSIZE
    first = (LANES - ((Row.to(tl.int64) % 16) // ITEMSIZE).to(tl.int32)) % LANES
    # a row of a few elements may end before the boundary
    head = tl.minimum(first, vocabulary)
    return first, (vocabulary - head) // LANES, head


@triton.jit
def tile_offsets(Row, THREADS: tl.constexpr):
    """(THREADS, LANES) offsets of a tile's elements."""
    LANES: tl.constexpr = 128 // Row.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, THREADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def edge_of(Row, vectors, head, vocabulary):
    """(columns, whether they are in the row) of what stands before and after the body."""
    LANES: tl.constexpr = 128 // Row.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, 2 * LANES)
    before = i < LANES
    columns = tl.where(before, i, head + (vectors - 1) * LANES + i)
    return columns, columns < tl.where(before, head, vocabulary)


@triton.jit
def exponents(x, largest, scale):
    """z = (x - largest) scale. Far below any probability it stays finite, so that 0 z is 0."""
    FAR: tl.constexpr = -2000.0 if x.dtype == tl.float64 else -200.0
    return tl.maximum((x - largest) * scale, FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def online_update(x, m, s, t, scale, WITH_T: tl.constexpr):
    """Takes a tile into the threads' (m, s, t): one maximum and one rescale a thread."""
    risen = tl.maximum(m, tl.max(x, 1))
    fall = (m - risen) * scale
    weight = tl.exp2(fall)
    if WITH_T:
        z = exponents(x, risen[:, None], scale)
        e = tl.exp2(z)
        t = weight * (t + fall * s) + tl.sum(e * z, 1)
    else:
        e = tl.exp2((x - risen[:, None]) * scale)
    return risen, weight * s + tl.sum(e, 1), t


@triton.jit
def row_statistics(
    Row,
    vocabulary,
    inv_temperature,
    WITH_ENTROPY: tl.constexpr,
    EVICT: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One sweep over a row: (max, log S, entropy).

    Two tiles are loaded before the first is used. A row with no finite logit gives S = NaN.
    """
    DTYPE: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.full((), inv_temperature, DTYPE) * LOG2E
    first, vectors, head = body_of(Row, vocabulary)
    Body = tl.multiple_of(Row + first, 16)
    offsets = tile_offsets(Row, THREADS)
    TILE: tl.constexpr = offsets.numel
    columns, inside = edge_of(Row, vectors, head, vocabulary)
    edge = tl.load(Row + columns, mask=inside, other=float("-inf")).to(DTYPE)
    m = tl.full((THREADS,), FLOOR, DTYPE)
    s = tl.zeros((THREADS,), DTYPE)
    t = tl.zeros((THREADS,), DTYPE)
    pairs = vectors // (2 * THREADS) * 2
    for k in range(0, pairs, 2):
        Tile = Body + k * TILE
        x = tl.load(Tile + offsets, eviction_policy=EVICT)
        y = tl.load(Tile + TILE + offsets, eviction_policy=EVICT)
        m, s, t = online_update(x.to(DTYPE), m, s, t, scale, WITH_ENTROPY)
        m, s, t = online_update(y.to(DTYPE), m, s, t, scale, WITH_ENTROPY)
    for k in range(pairs, tl.cdiv(vectors, THREADS)):
        whole = (k * THREADS + tl.arange(0, THREADS) < vectors)[:, None]
        x = tl.load(Body + k * TILE + offsets, mask=whole, other=float("-inf"))
        m, s, t = online_update(x.to(DTYPE), m, s, t, scale, WITH_ENTROPY)

    row_max = tl.maximum(tl.max(m, 0), tl.max(edge, 0))
    fall = (m - row_max) * scale
    weight = tl.exp2(fall)
    z = exponents(edge, row_max, scale)
    e = tl.exp2(z)
    total = tl.sum(s * weight, 0) + tl.sum(e, 0)
    total = tl.where(row_max > FLOOR, total, float("nan"))
    log_sum = tl.log(total)
    entropy = log_sum
    if WITH_ENTROPY:
        moment = tl.sum(weight * (t + s * fall), 0) + tl.sum(e * z, 0)
        entropy = log_sum - (moment / total) * LN2
    return row_max, log_sum, entropy


@triton.jit
def target_logit(Row, vocabulary, target, DTYPE: tl.constexpr):
    """The target's logit, NaN where the target is no column of the row (and nothing is read)."""
    inside = (target >= 0) & (target < vocabulary)
    return tl.load(Row + target, mask=inside, other=float("nan")).to(DTYPE)


@triton.jit
def softmax_gradient(x, row_max, scale, constant, slope, WITH_ENTROPY: tl.constexpr):
    """2^z (constant - slope z): a gradient by the logits, away from the target."""
    if WITH_ENTROPY:
        z = exponents(x, row_max, scale)
        return tl.exp2(z) * (constant - slope * z)
    return tl.exp2((x - row_max) * scale) * constant


@triton.jit
def store_row_gradient(
    Row,
    Drow,
    vocabulary,
    target,
    chosen,
    row_max,
    log_sum,
    entropy,
    at_target,
    at_softmax,
    at_entropy,
    inv_temperature,
    SAME_PHASE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    EVICT: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Writes a row's gradient, last tile first, while the tail is in cache:

        dx = (at_target 1[target] + p (at_softmax - at_entropy (log p + H))) / T.

    With p = 2^z / S and log p = ln 2 z - log S this is 2^z (constant - slope z); the target's term
    is added in its column alone, at the end. chosen is the target's logit. Row and Drow may be the
    same memory: every element is read before it is written.
    """
    DTYPE: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    OUT: tl.constexpr = Drow.dtype.element_ty
    scale = tl.full((), inv_temperature, DTYPE) * LOG2E
    over = tl.exp(-log_sum)
    constant = at_softmax * over
    slope = constant
    if WITH_ENTROPY:
        constant = (at_softmax - at_entropy * (entropy - log_sum)) * over
        slope = held_(at_entropy * LN2 * over * inv_temperature)
    # held: 1/T may take it out of range, and infinity times a probability of 0 is NaN
    constant = held_(constant * inv_temperature)
    at_target = held_(at_target * inv_temperature)
    first, vectors, head = body_of(Row, vocabulary)
    Body = tl.multiple_of(Row + first, 16)
    Dbody = Drow + first
    if SAME_PHASE:
        Dbody = tl.multiple_of(Dbody, 16)
    offsets = tile_offsets(Row, THREADS)
    TILE: tl.constexpr = offsets.numel
    columns, inside = edge_of(Row, vectors, head, vocabulary)
    edge = tl.load(Row + columns, mask=inside, other=float("-inf")).to(DTYPE)
    whole_tiles = vectors // THREADS
    whole = (whole_tiles * THREADS + tl.arange(0, THREADS) < vectors)[:, None]
    last = whole_tiles * TILE + offsets
    x = tl.load(Body + last, mask=whole, other=float("-inf"), eviction_policy=EVICT).to(DTYPE)
    dx = softmax_gradient(x, row_max, scale, constant, slope, WITH_ENTROPY)
    tl.store(Dbody + last, dx.to(OUT), mask=whole)
    for done in range(0, whole_tiles):
        start = (whole_tiles - 1 - done) * TILE
        x = tl.load(Body + start + offsets, eviction_policy=EVICT).to(DTYPE)
        dx = softmax_gradient(x, row_max, scale, constant, slope, WITH_ENTROPY)
        tl.store(Dbody + start + offsets, dx.to(OUT))
    dx = softmax_gradient(edge, row_max, scale, constant, slope, WITH_ENTROPY)
    tl.store(Drow + columns, dx.to(OUT), mask=inside)
    # another thread may have written the target's column: its own value comes after
    tl.debug_barrier()
    dx = at_target + softmax_gradient(chosen, row_max, scale, constant, slope, WITH_ENTROPY)
    tl.store(Drow + target, dx.to(OUT), mask=(target >= 0) & (target < vocabulary))


@triton.jit
def store_row_constant(Drow, vocabulary, value, THREADS: tl.constexpr):
    """Fills a row's gradient with one value: 0 where no gradient flows."""
    OUT: tl.constexpr = Drow.dtype.element_ty
    first, vectors, head = body_of(Drow, vocabulary)
    Dbody = tl.multiple_of(Drow + first, 16)
    offsets = tile_offsets(Drow, THREADS)
    TILE: tl.constexpr = offsets.numel
    filled = tl.full(offsets.shape, value, OUT)
    for k in range(0, tl.cdiv(vectors, THREADS)):
        whole = (k * THREADS + tl.arange(0, THREADS) < vectors)[:, None]
        tl.store(Dbody + k * TILE + offsets, filled, mask=whole)
    columns, inside = edge_of(Drow, vectors, head, vocabulary)
    tl.store(Drow + columns, tl.full(columns.shape, value, OUT), mask=inside)
