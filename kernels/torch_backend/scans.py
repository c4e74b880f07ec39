"""The reverse scans in plain PyTorch, without a loop over time: the CPU path and the spec.

The value entering token t from its right, N_t = P_next(t), follows one linear recurrence
    P_t = x_t + c_t N_t,   x_t = (1 - lam) V_t + lam r_t,   c_t = gamma lam (0 where terminated)
with (c, x) = (1, 0) at masked tokens and P = last_value past the row's end. It gives both results:
    returns_t = r_t + gamma N_t,   advantage_t = returns_t - V_t       (gamma 0 where terminated).

Blocks of BLOCK tokens are scanned side by side, then their heads by the same rule, so that a
rounding passes through about 2 log_32(T) blocks, not T tokens. Where c is one number, as in rows
without holes, a block is a product with a triangular matrix of its powers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formulas.kl import KL_ESTIMATORS

BLOCK = 32
CACHED_TOKENS = 1 << 18  # tokens of the rows that are worked on at a time


@functools.lru_cache(maxsize=64)
def _powers(
    coefficient: float, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(to_head (K,), within (K, K), from_right (K,)): what blocks of K tokens are multiplied by.

    x @ to_head is what the block adds to P at its head; (x @ within)_t what its tokens add to N_t,
    and from_right_t scales what enters the block.
    """
    powers = torch.tensor([coefficient**k for k in range(size)], dtype=torch.float64)
    token = torch.arange(size)
    distance = token[:, None] - token[None, :] - 1
    within = torch.where(distance >= 0, powers[distance.clamp(min=0)], 0.0)
    return tuple(part.to(device, dtype) for part in (powers, within, powers.flip(0)))


SAME_SIZE = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits set where true, none where false, in integers of the size of `dtype`."""
    return keep.to(SAME_SIZE[dtype]).neg_()


def _select(x: Tensor, bits: Tensor) -> Tensor:
    """Zeroes x in place, NaN too, where no bit is set; masked_fill_ takes 8 to 25 times as long."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def _split(length: int) -> tuple[int, int, int]:
    """(tokens put before the row's start, blocks, tokens of a block)."""
    if length <= BLOCK:
        return 0, 1, max(length, 1)
    return -length % BLOCK, -(-length // BLOCK), BLOCK


def _scan_constant(
    x: Tensor, coefficient: float, carry: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """N (B, T) for x (B, T), one coefficient for all and carry (B,) past the rows' ends (None: 0).

    `out` (B, T), other memory than x, may be used for the result.
    """
    rows, length = x.shape
    pad, blocks, size = _split(length)
    if pad:
        x, out = torch.nn.functional.pad(x, (pad, 0)), None
    to_head, within, from_right = _powers(coefficient, size, x.dtype, x.device)
    x = x.reshape(rows * blocks, size)
    if blocks > 1:
        heads = torch.mv(x, to_head).view(rows, blocks)
        carry = _scan_constant(heads, coefficient**size, carry).reshape(-1)
    if out is not None:
        out = out.view(rows * blocks, size)
    if carry is None:
        following = torch.mm(x, within, out=out)
    else:
        following = torch.outer(carry, from_right, out=out).addmm_(x, within)
    following = following.view(rows, blocks * size)
    return following[:, pad:] if pad else following


def _scan(x: Tensor, c: Tensor, carry: Tensor) -> Tensor:
    """N (B, T) for x and coefficients c (B, T), and carry (B,) past the rows' ends."""
    rows, length = x.shape
    pad, blocks, size = _split(length)
    if pad:
        x, c = (torch.nn.functional.pad(part, (pad, 0)) for part in (x, c))
    # (K, blocks): a step of all blocks works on neighbours in memory
    x, c = (part.reshape(rows * blocks, size).t() for part in (x, c))
    c = c.contiguous()
    # what the block from t on adds to P_t, and the coefficient of what enters the block
    span = torch.empty((size, 2, rows * blocks), dtype=x.dtype, device=x.device)
    span[:, 0], span[:-1, 1], span[-1, 1] = x, 0, c[-1]
    steps = list(zip(span.unbind(), c.unbind(), strict=True))
    for (left, coefficient), (right, _) in zip(steps[-2::-1], steps[:0:-1], strict=True):
        left.addcmul_(coefficient, right)
    if blocks > 1:
        heads, coefficients = span[0].view(2, rows, blocks)
        carry = _scan(heads, coefficients, carry).reshape(-1)
    following = torch.empty_like(c)
    following[-1] = carry
    torch.addcmul(span[1:, 0], span[1:, 1], carry, out=following[:-1])
    return following.t().reshape(rows, blocks * size)[:, pad:]


def _has_holes(mask: Tensor) -> bool:
    """Whether some row's counted tokens are not all next to each other."""
    starts = torch.gt(mask[:, 1:], mask[:, :-1]).view(torch.int8)
    count = starts.sum(1, dtype=torch.int32) + mask[:, 0]
    return bool((count > 1).any())


def last_counted(mask: Tensor) -> Tensor:
    """Marks each row's last counted token, (B, T) bool."""
    mask = mask.contiguous()
    place = mask.view(torch.int8).flip(1).argmax(1, keepdim=True)
    marked = torch.zeros_like(mask).scatter_(1, mask.shape[1] - 1 - place, True)
    return marked & mask


def _coefficients(
    coefficient: float, mask: Tensor, goes_on: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """c (B, T): 1 where masked, else the coefficient, 0 where counted and not going on.

    Composed of bits, as two torch.where take five times as long.
    """
    one, given = torch.tensor([1.0, coefficient], dtype=dtype).view(SAME_SIZE[dtype]).tolist()
    bits = _bits(mask, dtype).bitwise_and_(one ^ given).bitwise_xor_(one)
    if goes_on is not None:
        bits.bitwise_and_(_bits(goes_on | ~mask, dtype))
    return bits.view(dtype)


def _next_values(
    x: Tensor,
    coefficient: float,
    mask: Tensor | None,
    goes_on: Tensor | None,
    carry: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """N (B, T), by the closed form where every counted token but a row's last goes on."""
    if mask is None:
        return _scan_constant(x, coefficient, carry, out)
    if goes_on is not None:
        ends = last_counted(mask)
        if torch.equal(goes_on | ends, mask):
            if carry is not None:
                carry = torch.where((ends & ~goes_on).any(1), 0, carry)
            goes_on = None
    if goes_on is None and not _has_holes(mask):
        if carry is not None:
            # what enters the last counted token stands right after it; at the row's end it is carry
            after = torch.gt(mask[:, :-1], mask[:, 1:])
            x[:, 1:] = torch.where(after, carry[:, None], x[:, 1:])
            carry = torch.where(mask[:, -1], carry, 0)
        return _scan_constant(x, coefficient, carry, out)
    c = _coefficients(coefficient, mask, goes_on, x.dtype)
    return _scan(x, c, x.new_zeros(len(x)) if carry is None else carry)


def gae_into(
    advantage: Tensor | None,
    returns: Tensor,
    reward: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    last_value: Tensor | None,
    gamma: float,
    lam: float,
) -> None:
    """Fills advantage and returns, (b, T) of their dtype; value None: discounted rewards alone.

    Until they are filled their memory holds x and N, so that no other is touched.
    """
    dtype = returns.dtype
    reward = reward.to(dtype)
    if value is None:
        x = returns.copy_(reward)
    else:
        x = torch.lerp(value.to(dtype), reward, lam, out=returns)
    if terminated is not None and mask is None:
        mask = torch.ones_like(terminated)
    goes_on = None if terminated is None else mask & ~terminated
    if mask is not None:
        counted = _bits(mask, dtype)
        _select(x, counted)
    carry = None if last_value is None else last_value.to(dtype)
    following = _next_values(x, gamma * lam, mask, goes_on, carry, advantage)
    if goes_on is not None:
        _select(following, _bits(goes_on, dtype))
    torch.add(reward, following, alpha=gamma, out=returns)
    if value is not None:
        torch.sub(returns, value, out=advantage)
    if mask is not None:
        _select(returns, counted)
        if value is not None:
            _select(advantage, counted)


def gae(reward, value, mask, terminated, last_value, gamma, lam, dtype) -> tuple[Tensor, Tensor]:
    """(advantage, returns), each (B, T), by a cacheful of rows; no value, no advantage: empty."""
    returns = torch.empty(reward.shape, dtype=dtype, device=reward.device)
    advantage = None if value is None else torch.empty_like(returns)
    given = (advantage, returns, reward, value, mask, terminated, last_value)
    size = max(CACHED_TOKENS // max(reward.shape[1], 1), 1)
    if returns.numel() > 0 and len(reward) <= size:
        gae_into(*given, gamma, lam)
    elif returns.numel():
        for start in range(0, len(reward), size):
            rows = slice(start, start + size)
            gae_into(*(None if part is None else part[rows] for part in given), gamma, lam)
    return returns.new_empty(0) if advantage is None else advantage, returns


def shaped_reward(score, logp, ref_logp, mask, beta, kl_estimator, dtype) -> Tensor:
    """-beta KL_t, and the score on each row's last counted token; (B, T)."""
    kl, _ = KL_ESTIMATORS[kl_estimator](logp.to(dtype), ref_logp.to(dtype))
    # an infinite KL costs nothing at a weight of 0
    reward = torch.where(mask, -beta * kl, 0) if beta else torch.zeros_like(kl)
    if reward.numel():
        reward += torch.where(last_counted(mask), score.to(dtype)[:, None], 0)
    return reward


def moments(advantage: Tensor, mask: Tensor) -> Tensor:
    """(3, B): each row's count, mean and sum of squared deviations of its counted entries."""
    count = mask.sum(1).to(advantage.dtype)
    mean = advantage.sum(1) / count.clamp(min=1)
    deviation = torch.where(mask, advantage - mean[:, None], 0)
    return torch.stack([count, mean, deviation.square().sum(1)])


def gae_from_scores(
    score,
    logp,
    ref_logp,
    value,
    mask,
    terminated,
    last_value,
    beta,
    kl_estimator,
    gamma,
    lam,
    dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantage, returns, moments of the advantage)."""
    reward = shaped_reward(score, logp, ref_logp, mask, beta, kl_estimator, dtype)
    advantage, returns = gae(reward, value, mask, terminated, last_value, gamma, lam, dtype)
    return advantage, returns, moments(advantage, mask)
