"""The formulas as their definitions read, in 60 digits and without an end of the range (mpmath).

Nothing here comes from kernels/, and nothing is rearranged but one product of an exp beyond any
range: an exp may reach e^20000, and `exp` is for arguments that are themselves such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from mpmath import mp

mp.dps = 60
FAR = 1e5  # a sigmoid is 0 or 1 by then


class Token(NamedTuple):
    """A token's loss: its value, and its derivatives in log r and in logp beside it."""

    loss: mp.mpf
    by_ratio: mp.mpf = mp.zero
    by_logp: mp.mpf = mp.zero
    clipped: bool = False
    size: mp.mpf = mp.zero  # of what is added up to the loss, where it cancels


def sigmoid(x):
    if abs(x) > FAR:
        return mp.mpf(x > 0)
    return 1 / (1 + mp.exp(-x))


def log_sigmoid(x):
    if abs(x) > FAR:
        return min(x, mp.zero)
    return -mp.log1p(mp.exp(-x))


def exp(x):
    """e^x where x may be e^20000 itself: the digits of such a power have no end."""
    return mp.zero if x < -FAR else mp.exp(min(x, FAR))


def _ratio(x, A) -> Token:
    return Token(-A * mp.exp(x), -A * mp.exp(x))


def reinforce(x, logp, old, A):
    return Token(-A * logp, mp.zero, -A)


def ppo_clip(x, logp, old, A, epsilon=0.2, epsilon_high=None, delta=math.inf):
    high = epsilon if epsilon_high is None else epsilon_high
    r = mp.exp(x)
    if A > 0 and r > 1 + high:
        return Token(-A * (1 + high), clipped=True)
    if A < 0 and (r < 1 - epsilon or r > delta):
        return Token(-A * min(max(r, 1 - epsilon), delta), clipped=True)
    return _ratio(x, A)


def ppo_penalty(x, logp, old, A, kl_coef=1.0):
    r = mp.exp(x)
    size = abs((kl_coef - A) * (r - 1)) + abs(A) + abs(kl_coef * x)
    return Token(-A * r + kl_coef * (r - 1 - x), -A * r + kl_coef * (r - 1), size=size)


def cispo(x, logp, old, A, epsilon=0.2, epsilon_high=None):
    high = epsilon if epsilon_high is None else epsilon_high
    weight = min(max(mp.exp(x), 1 - epsilon), 1 + high)
    return Token(-weight * A * logp, mp.zero, -weight * A)


def cispo_abs(x, logp, old, A, epsilon_high):
    weight = min(mp.exp(x), epsilon_high)
    return Token(-weight * A * logp, mp.zero, -weight * A)


def sapo(x, logp, old, A, tau_pos=1.0, tau_neg=1.05):
    tau = tau_pos if A > 0 else tau_neg
    u = tau * (mp.exp(x) - 1)
    up, down = sigmoid(u), sigmoid(-u)
    return Token(-A * 4 / mp.mpf(tau) * up, -4 * A * up * down * mp.exp(x))


def gmpo(x, logp, old, A, epsilon=0.2, epsilon_high=None):
    return _ratio(x, A)


def vespo(x, logp, old, A, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
    k, rate = (k_pos, lambda_pos) if A > 0 else (k_neg, lambda_neg)
    exponent = k * x - rate * mp.expm1(x)
    weight = mp.exp(exponent) if exponent > -FAR else mp.zero
    size = abs(weight * A) * (1 + abs(k * x) + rate * abs(mp.expm1(x)))
    return Token(-weight * A * logp, mp.zero, -weight * A, size=size * max(abs(logp), 1))


def dppo_tv(x, logp, old, A, epsilon=0.2, epsilon_high=None):
    high = epsilon if epsilon_high is None else epsilon_high
    rise = mp.exp(logp) - mp.exp(old)
    if (A > 0 and rise > high) or (A < 0 and -rise > epsilon):
        return Token(mp.zero, clipped=True)
    return _ratio(x, A)


def dppo_kl(x, logp, old, A, epsilon=0.2, epsilon_high=None):
    high = epsilon if epsilon_high is None else epsilon_high
    # as documented, the other tokens keep a probability of 1e-12
    rest, old_rest = (max(-mp.expm1(y), mp.mpf(1e-12)) for y in (logp, old))
    kl = -mp.exp(old) * x + old_rest * mp.log(old_rest / rest)
    if (A > 0 and x > 0 and kl > high) or (A < 0 and x < 0 and kl > epsilon):
        return Token(mp.zero, clipped=True)
    return _ratio(x, A)


def prime_rl(x, logp, old, A, kl_tau=1e-3, **clip):
    tv, pull = dppo_tv(x, logp, old, A, **clip), kl_tau * x
    size = abs(tv.loss) + abs(pull * x) + abs(pull)
    return Token(tv.loss + pull * x, tv.by_ratio + 2 * pull, size=size)


def dro(x, logp, old, A, tau=0.05):
    pull = tau * x
    size = abs(A * logp) + abs(pull * x) + abs(A) + abs(pull)
    return Token(-A * logp + pull * x / 2, mp.zero, pull - A, size=size)


def kl_cov(x, logp, old, A, kl_coef=1.0):
    r = mp.exp(x)
    size = abs(A * r) + abs(kl_coef * x) + abs(kl_coef)
    return Token(-A * r + kl_coef * abs(x), -A * r + kl_coef * mp.sign(x), size=size)


SURROGATES: dict[str, Callable[..., Token]] = {
    f.__name__: f
    for f in (
        prime_rl, dro,
        reinforce, ppo_clip, ppo_penalty, cispo, cispo_abs, sapo, gmpo, vespo,
        dppo_tv, dppo_kl, kl_cov,
    )
}  # fmt: skip


def kl(name: str, x, logp, ref) -> Token:
    """An estimator of KL(pi || pi_ref) at a token with log-ratio x to the sampler."""
    d = ref - logp
    if name == "k1":
        return Token(-d, by_logp=mp.one)
    if name == "k2":
        return Token(d * d / 2, by_logp=-d)
    if name == "k3":
        # as documented, the tangent at 10 from there on
        near = min(d, mp.mpf(10))
        dk3 = mp.expm1(near)
        size = abs(dk3) * (1 + d - near) + abs(near)
        return Token(dk3 - near + dk3 * (d - near), by_logp=-dk3, size=size)
    k3, dk3 = mp.exp(d) - 1 - d, 1 - mp.exp(d)
    r = mp.exp(x)
    return Token(r * k3, r * k3, r * dk3, size=r * (abs(dk3) + abs(d)))


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_value(got: float, want, near: list, size, dtype: torch.dtype, what: str) -> None:
    """`got` is `want` to rounding, or where that lies beyond the dtype anything but NaN.

    near: `want` for inputs that differ by a rounding, and size: of what was added up to it; what
    they make of it is rounding too.
    """
    assert got == got, f"{what} is NaN, right {mp.nstr(want, 8)}"
    if max(map(abs, [want, size, *near])) > torch.finfo(dtype).max * 0.999:
        return
    spread = max((abs(w - want) for w in near), default=mp.zero)
    tolerance = 4 * spread + 16 * eps_of(dtype) * max(abs(want), size)
    # an exp may underflow before coefficients up to 1e4 make it larger
    tolerance += 1e12 * torch.finfo(dtype).tiny
    assert abs(got - want) <= tolerance, f"{what} is {got}, right {mp.nstr(want, 10)}"


def score(divergence: str, x, alpha):
    """f-DPO's score of a log-ratio."""
    alpha = {"reverse_kl": 1, "forward_kl": 0}.get(divergence, alpha)
    if divergence == "js_divergence":
        return mp.log(2) + log_sigmoid(x)
    if abs(alpha - 1) < 1e-6:
        return mp.mpf(x)
    return mp.expm1((mp.mpf(alpha) - 1) * x) / (mp.mpf(alpha) - 1)


class Pair(NamedTuple):
    """A pair's four sums and two lengths."""

    chosen: mp.mpf
    rejected: mp.mpf
    ref_chosen: mp.mpf
    ref_rejected: mp.mpf
    chosen_length: int
    rejected_length: int

    def scores(self, p: dict):
        ratios = (self.chosen - self.ref_chosen, self.rejected - self.ref_rejected)
        return [score(p["f_divergence_type"], x, p["f_alpha_divergence_coef"]) for x in ratios]

    def means(self, *values):
        lengths = (max(self.chosen_length, 1), max(self.rejected_length, 1))
        return [mp.mpf(x) / n for x, n in zip(values, lengths, strict=True)]


def _smoothed(logits, smoothing):
    return -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)


def _margin(pair, p):
    chosen, rejected = pair.scores(p)
    return chosen - rejected


def _mean_margin(pair, p):
    chosen, rejected = pair.means(*pair.scores(p))
    return chosen - rejected


def _exo(pair, p):
    logits, s = p["beta"] * _margin(pair, p), mp.mpf(p["label_smoothing"] or 1e-3)
    win, lose = log_sigmoid(logits), log_sigmoid(-logits)
    return exp(win) * (win - mp.log(1 - s)) + exp(lose) * (lose - mp.log(s))


def _robust(pair, p):
    logits, s = p["beta"] * _margin(pair, p), mp.mpf(p["label_smoothing"])
    return (s * log_sigmoid(-logits) - (1 - s) * log_sigmoid(logits)) / (1 - 2 * s)


def _apart(pair, p):
    return [p["beta"] * (a - b) for a, b in ((pair.chosen, pair.ref_chosen),
                                              (pair.rejected, pair.ref_rejected))]  # fmt: skip


def _nca(pair, p):
    chosen, rejected = _apart(pair, p)
    return -log_sigmoid(chosen) - log_sigmoid(-chosen) / 2 - log_sigmoid(-rejected) / 2


def _bco(pair, p):
    chosen, rejected = _apart(pair, p)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def _sppo(pair, p):
    half = mp.mpf(1) / 2 / p["beta"]
    return (pair.chosen - pair.ref_chosen - half) ** 2 + (
        pair.rejected - pair.ref_rejected + half
    ) ** 2


def _apo_zero(pair, p):
    chosen, rejected = _apart(pair, p)
    return sigmoid(-chosen) + sigmoid(rejected)


def _apo_down(pair, p):
    chosen, rejected = _apart(pair, p)
    return sigmoid(chosen) + sigmoid(rejected - chosen)


def _discopop(pair, p):
    logits = p["beta"] * _margin(pair, p)
    u = logits / mp.mpf(p["discopop_tau"])
    # sigmoid(u) exp(-logits) as one exp: the one may be as small as the other is large
    return sigmoid(-u) * -log_sigmoid(logits) + exp(log_sigmoid(u) - logits)


def _simpo(pair, p):
    chosen, rejected = pair.means(pair.chosen, pair.rejected)
    return _smoothed(p["beta"] * (chosen - rejected) - p["simpo_gamma"], p["label_smoothing"])


def _cpo(pair, p):
    logits = p["beta"] * (pair.chosen - pair.rejected)
    imitation = -pair.means(pair.chosen, pair.rejected)[0]
    return _smoothed(logits, p["label_smoothing"]) + p["cpo_alpha"] * imitation


def _orpo(pair, p):
    chosen, rejected = pair.means(pair.chosen, pair.rejected)
    # as documented: an empty answer has no odds, and 1 - p is 2^-100 at least
    rests = [max(-mp.expm1(x), mp.mpf(2) ** -100) for x in (chosen, rejected)]
    odds = chosen - mp.log(rests[0]) - rejected + mp.log(rests[1])
    if not (pair.chosen_length and pair.rejected_length):
        odds = mp.zero
    return -chosen - p["beta"] * log_sigmoid(odds)


PREFERENCES = {
    "sigmoid": lambda pair, p: _smoothed(p["beta"] * _margin(pair, p), p["label_smoothing"]),
    "sigmoid_norm": lambda pair, p: -log_sigmoid(p["beta"] * _mean_margin(pair, p)),
    "ipo": lambda pair, p: (_margin(pair, p) - mp.mpf(1) / 2 / p["beta"]) ** 2,
    "ipo_avg": lambda pair, p: (_mean_margin(pair, p) - mp.mpf(1) / 2 / p["beta"]) ** 2,
    "hinge": lambda pair, p: max(mp.zero, 1 - p["beta"] * _margin(pair, p)),
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
    "sft": lambda pair, p: -pair.means(pair.chosen, pair.rejected)[0],
}
