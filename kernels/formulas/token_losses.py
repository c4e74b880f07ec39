"""The surrogates' formulas, each in PyTorch and as a jitted twin.

(logp, old_logp, advantage, parameters) -> (loss, dloss/dlogp, clipped), elementwise, with
r = exp(logp - old_logp). clipped is true where a clip holds the gradient at zero. Autograd through
a PyTorch formula gives the same derivative: `known` attaches it to the log-ratio, or to logp where
the ratio is a constant.

A token of advantage 0 has no loss, however large its ratio, and a clipped one no gradient.
"""

from __future__ import annotations

import torch

from ..backend import tl, triton
from ..limits import expm1_, known, log_ratio, log_ratio_, times, times_, times_exp, times_exp_


def nowhere(logp):
    """No token is clipped."""
    return torch.zeros_like(logp, dtype=torch.bool)


def reinforce(logp, old_logp, advantage, parameters):
    """loss = -A log pi(a|s): the policy gradient theorem (Williams 1992, eq. 3; Sutton 2000)."""
    return times(-advantage, logp), -advantage, nowhere(logp)


@triton.jit
def reinforce_(logp, old_logp, advantage, parameters):
    return times_(-advantage, logp), -advantage, logp < logp


def ppo_clip(logp, old_logp, advantage, parameters):
    """loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = pi / pi_old.

    PPO (arXiv:1707.06347) eq. 7; epsilon_high apart from epsilon is clip-higher (DAPO,
    arXiv:2503.14476, eq. 10). For A < 0 the objective is bounded below by delta * A: dual clip
    (arXiv:1912.09729, eq. 5), off where delta is infinite. `bound` stands for the ratio wherever
    the minimum picks it; there the gradient is zero. At sequence level it is GSPO
    (arXiv:2507.18071) eq. 5.
    """
    epsilon, epsilon_high, delta = parameters
    x = log_ratio(logp, old_logp)
    ratio = torch.exp(x.detach())
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    clipped = too_high | too_low | too_bad
    bound = torch.where(too_low, min(1 - epsilon, delta), torch.full_like(x, delta))
    bound = torch.where(too_high, 1 + epsilon_high, bound)
    free = times_exp(-advantage, x)
    slope = torch.where(clipped, 0.0, free)
    return known(torch.where(clipped, -advantage * bound, free), (x, slope)), slope, clipped


@triton.jit
def ppo_clip_(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high, delta = parameters
    x = log_ratio_(logp, old_logp)
    ratio = tl.exp(x)
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    clipped = too_high | too_low | too_bad
    # numbers become the tokens' dtype before two of them meet, which would be in float32
    low, most = tl.full((), 1 - epsilon, x.dtype), tl.full((), delta, x.dtype)
    bound = tl.where(too_low, tl.minimum(low, most), most)
    bound = tl.where(too_high, tl.full((), 1 + epsilon_high, x.dtype), bound)
    free = times_exp_(-advantage, x)
    return tl.where(clipped, -advantage * bound, free), tl.where(clipped, 0.0, free), clipped


def ppo_penalty(logp, old_logp, advantage, parameters):
    """loss = -r A + kl_coef KL(pi_old || pi): PPO (arXiv:1707.06347) eq. 8.

    The KL is estimated from pi_old's own samples, unbiased and positive, by r - 1 - log r
    (Schulman 2020, "Approximating KL divergence"). Summed as (kl_coef - A) (r - 1) - A - kl_coef
    log r, which two infinities of r would not be.
    """
    x, kl_coef = log_ratio(logp, old_logp), parameters[0]
    excess = kl_coef - advantage
    near = excess * torch.expm1(x.detach().clamp(max=1))
    grown = torch.where(x > 1, times_exp(excess, x) - excess, near)
    slope = grown - advantage
    return known(slope - kl_coef * x.detach(), (x, slope)), slope, nowhere(logp)


@triton.jit
def ppo_penalty_(logp, old_logp, advantage, parameters):
    x = log_ratio_(logp, old_logp)
    kl_coef = parameters[0]
    excess = kl_coef - advantage
    near = excess * expm1_(tl.where(x > 1, 1, x))
    grown = tl.where(x > 1, times_exp_(excess, x) - excess, near)
    return grown - advantage - kl_coef * x, grown - advantage, logp < logp


def cispo(logp, old_logp, advantage, parameters):
    """loss = -sg[clip(r, 1 - epsilon, 1 + epsilon_high)] A log pi, sg = no gradient through it.

    CISPO (MiniMax-M1, arXiv:2506.13585) eq. 4 and 5. The clip bounds a token's weight and stops
    no gradient, so `clipped` is false throughout.
    """
    epsilon, epsilon_high = parameters
    slope = _bounded(logp, old_logp, -advantage, 1 - epsilon, 1 + epsilon_high)
    return times(slope, logp), slope, nowhere(logp)


@triton.jit
def cispo_(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    slope = _bounded_(logp, old_logp, -advantage, 1 - epsilon, 1 + epsilon_high)
    return times_(slope, logp), slope, logp < logp


def cispo_abs(logp, old_logp, advantage, parameters):
    """loss = -sg[min(r, epsilon_high)] A log pi: CISPO with the bound on the ratio itself.

    The reading of TRL's loss_type "cispo", as in ScaleRL (arXiv:2510.13786), whose bound is 4 to
    8. A clip of 0.2, sensible elsewhere, would here scale every gradient by 0.2.
    """
    slope = _bounded(logp, old_logp, -advantage, 0.0, parameters[0])
    return times(slope, logp), slope, nowhere(logp)


@triton.jit
def cispo_abs_(logp, old_logp, advantage, parameters):
    slope = _bounded_(logp, old_logp, -advantage, 0.0, parameters[0])
    return times_(slope, logp), slope, logp < logp


def _bounded(logp, old_logp, factor, low, high):
    """factor * clip(r, low, high), without gradient; NaN where r is."""
    x = log_ratio(logp, old_logp)
    ratio = torch.exp(x.detach())
    product = torch.where(ratio < low, factor * low, times_exp(factor, x))
    return torch.where(ratio > high, factor * high, product)


@triton.jit
def _bounded_(logp, old_logp, factor, low, high):
    """The jitted twin of `_bounded`."""
    x = log_ratio_(logp, old_logp)
    ratio = tl.exp(x)
    product = tl.where(ratio < low, factor * low, times_exp_(factor, x))
    return tl.where(ratio > high, factor * high, product)


# exp of more overflows float32; the soft gate has long closed by then
FAR = 80.0


def sapo(logp, old_logp, advantage, parameters):
    """loss = -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg.

    SAPO (arXiv:2511.20347): a soft gate in the place of PPO's clip. On-policy its gradient is
    PPO's; away from r = 1 it fades as 4 p (1 - p), p the sigmoid.
    """
    tau_pos, tau_neg = parameters
    tau = torch.where(advantage > 0, tau_pos, torch.full_like(logp, tau_neg))
    x = log_ratio(logp, old_logp)
    near = x.detach().clamp(max=FAR)
    distance = tau * torch.expm1(near)
    # the smaller of p and 1 - p: the larger loses it in rounding
    tail = torch.sigmoid(-distance.abs())
    gate = torch.where(distance > 0, 1 - tail, tail)
    # the advantage last: it may be large, and the gate all but shut
    slope = -advantage * (4 * tail * (1 - tail) * torch.exp(near))
    return known(-advantage * (4 * gate / tau), (x, slope)), slope, nowhere(logp)


@triton.jit
def sapo_(logp, old_logp, advantage, parameters):
    tau_pos, tau_neg = parameters
    x = log_ratio_(logp, old_logp)
    tau_pos, tau_neg = tl.full((), tau_pos, x.dtype), tl.full((), tau_neg, x.dtype)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    near = tl.where(x > 80.0, 80.0, x)
    distance = tau * expm1_(near)
    shut = tl.exp(-tl.abs(distance))
    tail = shut / (1 + shut)
    gate = tl.where(distance > 0, 1 - tail, tail)
    slope = -advantage * (4 * tail * (1 - tail) * tl.exp(near))
    return -advantage * (4 * gate / tau), slope, logp < logp


def gmpo(logp, old_logp, advantage, parameters):
    """loss = -A (the geometric mean of the sequence's clipped ratios), at sequence level alone.

    GMPO (arXiv:2507.20673). `gmpo_clip` has clipped each token's log-ratio before the mean.
    """
    x = log_ratio(logp, old_logp)
    slope = times_exp(-advantage, x)
    return known(slope, (x, slope)), slope, nowhere(logp)


def vespo(logp, old_logp, advantage, parameters):
    """loss = -sg[w^k exp(lambda (1 - w))] A log pi, w the product of the sequence's ratios.

    VESPO (arXiv:2602.10693): a weight of gamma's shape that is 1 at w = 1 and fades on both sides,
    with a k and a lambda for A > 0 and others for A < 0.
    """
    k_pos, lambda_pos, k_neg, lambda_neg = parameters
    x = log_ratio(logp, old_logp).detach()
    up = advantage > 0
    k = torch.where(up, k_pos, torch.full_like(x, k_neg))
    rate = torch.where(up, lambda_pos, torch.full_like(x, lambda_neg))
    slope = times_exp(-advantage, k * x - rate * torch.expm1(x))
    return times(slope, logp), slope, nowhere(logp)


def gmpo_clip(log_ratio, advantage, parameters):
    """log r to at most epsilon_high where A > 0 and at least -epsilon where A < 0, and where so.

    GMPO's paper takes 0.4 for both, and clips tokens before the mean rather than after it.
    """
    epsilon, epsilon_high = parameters
    too_high = (advantage > 0) & (log_ratio > epsilon_high)
    too_low = (advantage < 0) & (log_ratio < -epsilon)
    held = torch.where(too_low, -epsilon, torch.where(too_high, epsilon_high, log_ratio))
    return held, too_high | too_low
