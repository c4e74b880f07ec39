"""Scores and log-probabilities to KL-shaped rewards, and on to GAE, in Triton.

    r_t = -beta KL_t + (score at the row's last counted token),  then the recurrence of scan.py

A row is swept from its end by one program, which sees the last counted token before all others,
and keeps the count, mean and squared deviations of the advantages, for whitening them.
"""

from __future__ import annotations

from ..backend import tl, triton
from ..formulas.kl import token_kl
from .scan import (
    UNSPECIALIZED,
    entering,
    load_mask,
    load_row,
    program_rows,
    row_start,
    summarise,
    tile_places,
)


@triton.jit
def _last_counted(counted, time, ended):
    """Marks each row's last counted token, unless the row's `ended` tells that it came before."""
    candidates = tl.where(counted, time, -1)
    latest = tl.max(tl.max(candidates, 2), 1)
    marked = (time == latest[:, None, None]) & counted & ((ended == 0)[:, None, None])
    return marked, tl.maximum(ended, (latest >= 0).to(tl.int32))


@triton.jit
def _shaped(
    Logp,
    RefLogp,
    offset,
    inside,
    counted,
    marked,
    score,
    beta,
    KL_ESTIMATOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """-beta KL_t, and the score on the row's last counted token."""
    logp = tl.load(Logp + offset, mask=inside, other=0).to(DTYPE)
    ref_logp = tl.load(RefLogp + offset, mask=inside, other=0).to(DTYPE)
    kl, _ = token_kl(logp, ref_logp, KL_ESTIMATOR)
    # an infinite KL costs nothing at a weight of 0
    cost = tl.where(beta == 0, 0.0, beta * kl)
    return tl.where(counted, tl.where(marked, score[:, None, None], 0) - cost, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shaped_reward_kernel(
    Score,
    Logp,
    RefLogp,
    Mask,
    Reward,
    rows,
    length,
    tiles,
    beta,
    KL_ESTIMATOR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    DTYPE: tl.constexpr = Reward.dtype.element_ty
    beta = tl.full((), beta, DTYPE)
    row = program_rows(1, ROWS)
    score = load_row(Score, row, rows, 0, DTYPE)
    ended = tl.zeros((ROWS,), tl.int32)
    for tile in range(0, tiles):
        time, inside = tile_places(tile, tiles, length, LANES, ALIGNED)
        inside = inside & (row < rows)
        offset = row_start(row, length, ALIGNED) + time
        counted = load_mask(Mask, offset, inside)
        marked, ended = _last_counted(counted, time, ended)
        reward = _shaped(
            Logp, RefLogp, offset, inside, counted, marked, score, beta, KL_ESTIMATOR, DTYPE
        )
        tl.store(Reward + offset, reward, mask=inside)


@triton.jit
def _merge_moments(count, mean, square, counted, x):
    """Takes a tile's counted x into each row's count, mean and sum of squared deviations."""
    more = tl.sum(tl.sum(counted.to(x.dtype), 2), 1)
    total = count + more
    tile_mean = tl.sum(tl.sum(tl.where(counted, x, 0), 2), 1) / tl.maximum(more, 1)
    deviation = tl.where(counted, x - tile_mean[:, None, None], 0)
    shift = tile_mean - mean
    share = more / tl.maximum(total, 1)
    square += tl.sum(tl.sum(deviation * deviation, 2), 1) + shift * shift * count * share
    return total, mean + shift * share, square


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gae_from_scores_kernel(
    Score,
    Logp,
    RefLogp,
    Value,
    Mask,
    Terminated,
    LastValue,
    Advantage,
    Returns,
    Moments,
    rows,
    length,
    tiles,
    beta,
    gamma,
    lam,
    KL_ESTIMATOR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    DTYPE: tl.constexpr = Returns.dtype.element_ty
    beta, gamma, lam = tl.full((), beta, DTYPE), tl.full((), gamma, DTYPE), tl.full((), lam, DTYPE)
    row = program_rows(1, ROWS)
    score = load_row(Score, row, rows, 0, DTYPE)
    carry = load_row(LastValue, row, rows, 0, DTYPE)
    ended = tl.zeros((ROWS,), tl.int32)
    count = tl.zeros((ROWS,), DTYPE)
    mean = tl.zeros((ROWS,), DTYPE)
    square = tl.zeros((ROWS,), DTYPE)
    for tile in range(0, tiles):
        time, inside = tile_places(tile, tiles, length, LANES, ALIGNED)
        inside = inside & (row < rows)
        offset = row_start(row, length, ALIGNED) + time
        counted = load_mask(Mask, offset, inside)
        goes_on = counted
        if Terminated is not None:
            goes_on = counted & (tl.load(Terminated + offset, mask=inside, other=0) == 0)
        marked, ended = _last_counted(counted, time, ended)
        reward = _shaped(
            Logp, RefLogp, offset, inside, counted, marked, score, beta, KL_ESTIMATOR, DTYPE
        )
        value = tl.load(Value + offset, mask=inside, other=0).to(DTYPE)
        x = tl.where(counted, (1 - lam) * value + lam * reward, 0)
        c = tl.where(counted, tl.where(goes_on, gamma * lam, 0), 1).to(DTYPE)
        c_in, x_in, c_tile, x_tile = summarise(c, x)
        following = entering(c, x, c_in, x_in, carry)
        returns = reward + tl.where(goes_on, gamma * following, 0)
        advantage = tl.where(counted, returns - value, 0)
        tl.store(Returns + offset, tl.where(counted, returns, 0), mask=inside)
        tl.store(Advantage + offset, advantage, mask=inside)
        count, mean, square = _merge_moments(count, mean, square, counted, advantage)
        carry = x_tile + c_tile * carry
    row = tl.reshape(row, (ROWS,))
    exists = row < rows
    tl.store(Moments + row, count, mask=exists)
    tl.store(Moments + rows + row, mean, mask=exists)
    tl.store(Moments + 2 * rows + row, square, mask=exists)
