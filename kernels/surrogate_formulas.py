"""The surrogates' formulas, each in PyTorch and as a jitted twin.

(logp, old_logp, advantage, parameters) -> (loss, dloss/dlogp, clipped), elementwise, with
r = exp(logp - old_logp). clipped is true where a clip holds the gradient at zero. Autograd through
a PyTorch formula gives the same derivative: what is a constant to it is detached.
"""

from __future__ import annotations

import torch

from .backend import tl, triton
from .kl import expm1, k3, token_kl


def _nowhere(logp):
    return torch.zeros_like(logp, dtype=torch.bool)


def reinforce(logp, old_logp, advantage, parameters):
    """loss = -A log pi(a|s): the policy gradient theorem (Williams 1992, eq. 3; Sutton 2000)."""
    return -advantage * logp, -advantage, _nowhere(logp)


@triton.jit
def _reinforce(logp, old_logp, advantage, parameters):
    return -advantage * logp, -advantage, logp < logp


def ppo_clip(logp, old_logp, advantage, parameters):
    """loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = pi / pi_old.

    PPO (arXiv:1707.06347) eq. 7; epsilon_high apart from epsilon is clip-higher (DAPO,
    arXiv:2503.14476, eq. 10). For A < 0 the objective is bounded below by delta * A: dual clip
    (arXiv:1912.09729, eq. 5), off where delta is infinite. `held` is the ratio, or the constant
    wherever the minimum picks it; there the gradient is zero. At sequence level it is GSPO
    (arXiv:2507.18071) eq. 5.
    """
    epsilon, epsilon_high, delta = parameters
    ratio = torch.exp(logp - old_logp)
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    held = torch.where(too_bad, delta, ratio)
    held = torch.where(too_low, 1 - epsilon, held)
    held = torch.where(too_high, 1 + epsilon_high, held)
    clipped = too_high | too_low | too_bad
    return -advantage * held, torch.where(clipped, 0.0, -advantage * ratio), clipped


@triton.jit
def _ppo_clip(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high, delta = parameters
    ratio = tl.exp(logp - old_logp)
    too_high = (advantage > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantage < 0) & (ratio < 1 - epsilon)
    too_bad = (advantage < 0) & (ratio > delta)
    held = tl.where(too_bad, delta, ratio)
    held = tl.where(too_low, 1 - epsilon, held)
    held = tl.where(too_high, 1 + epsilon_high, held)
    clipped = too_high | too_low | too_bad
    return -advantage * held, tl.where(clipped, 0.0, -advantage * ratio), clipped


def ppo_penalty(logp, old_logp, advantage, parameters):
    """loss = -r A + kl_coef KL(pi_old || pi): PPO (arXiv:1707.06347) eq. 8.

    The KL is estimated from pi_old's own samples, unbiased and positive, by r - 1 - log r
    (Schulman 2020, "Approximating KL divergence"); its derivative is r - 1.
    """
    ratio = torch.exp(logp - old_logp)
    # k3's own derivative belongs to its first argument, the policy that sampled
    kl, minus_dkl = k3(old_logp, logp)
    loss = -advantage * ratio + parameters[0] * kl
    return loss, -advantage * ratio - parameters[0] * minus_dkl, _nowhere(logp)


@triton.jit
def _ppo_penalty(logp, old_logp, advantage, parameters):
    ratio = tl.exp(logp - old_logp)
    kl, minus_dkl = token_kl(old_logp, logp, "k3")
    loss = -advantage * ratio + parameters[0] * kl
    return loss, -advantage * ratio - parameters[0] * minus_dkl, logp < logp


def cispo(logp, old_logp, advantage, parameters):
    """loss = -sg[clip(r, 1 - epsilon, 1 + epsilon_high)] A log pi, sg = no gradient through it.

    CISPO (MiniMax-M1, arXiv:2506.13585) eq. 4 and 5. The clip bounds a token's weight and stops
    no gradient, so `clipped` is false throughout.
    """
    epsilon, epsilon_high = parameters
    weight = torch.exp(logp - old_logp).detach().clamp(1 - epsilon, 1 + epsilon_high)
    return -weight * advantage * logp, -weight * advantage, _nowhere(logp)


@triton.jit
def _cispo(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    weight = tl.exp(logp - old_logp)
    # comparisons, unlike minimum and maximum, leave a NaN what it is
    weight = tl.where(weight < 1 - epsilon, 1 - epsilon, weight)
    weight = tl.where(weight > 1 + epsilon_high, 1 + epsilon_high, weight)
    return -weight * advantage * logp, -weight * advantage, logp < logp


def cispo_abs(logp, old_logp, advantage, parameters):
    """loss = -sg[min(r, epsilon_high)] A log pi: CISPO with the bound on the ratio itself.

    The reading of TRL's loss_type "cispo", as in ScaleRL (arXiv:2510.13786), whose bound is 4 to
    8. A clip of 0.2, sensible elsewhere, would here scale every gradient by 0.2.
    """
    weight = torch.exp(logp - old_logp).detach().clamp(max=parameters[0])
    return -weight * advantage * logp, -weight * advantage, _nowhere(logp)


@triton.jit
def _cispo_abs(logp, old_logp, advantage, parameters):
    weight = tl.exp(logp - old_logp)
    weight = tl.where(weight > parameters[0], parameters[0], weight)
    return -weight * advantage * logp, -weight * advantage, logp < logp


# exp of more overflows float32; the soft gate has long closed by then
FAR = 80.0


def sapo(logp, old_logp, advantage, parameters):
    """loss = -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg.

    SAPO (arXiv:2511.20347): a soft gate in the place of PPO's clip. On-policy its gradient is
    PPO's; away from r = 1 it fades as 4 p (1 - p), p the sigmoid.
    """
    tau_pos, tau_neg = parameters
    tau = torch.where(advantage > 0, tau_pos, torch.full_like(logp, tau_neg))
    ratio = torch.exp((logp - old_logp).clamp(max=FAR))
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = 4 * gate * torch.sigmoid(tau * (1 - ratio))
    return -advantage * gate * (4 / tau), -advantage * slope * ratio, _nowhere(logp)


@triton.jit
def _sapo(logp, old_logp, advantage, parameters):
    tau_pos, tau_neg = parameters
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    log_ratio = logp - old_logp
    ratio = tl.exp(tl.where(log_ratio > 80.0, 80.0, log_ratio))
    shut = tl.exp(tau * (1 - ratio))
    gate = 1 / (1 + shut)
    slope = 4 * gate * shut * gate
    return -advantage * gate * (4 / tau), -advantage * slope * ratio, logp < logp


def dppo_tv(logp, old_logp, advantage, parameters):
    """loss = -r A where the policies are near, 0 where the update would part them further.

    DPPO (arXiv:2602.04879) with the binary total variation |pi - pi_old| of the sampled token: a
    token is dropped where A > 0 and pi - pi_old > epsilon_high, or A < 0 and pi_old - pi > epsilon.
    """
    epsilon, epsilon_high = parameters
    ratio = torch.exp(logp - old_logp)
    rise = torch.exp(logp) - torch.exp(old_logp)
    dropped = ((advantage > 0) & (rise > epsilon_high)) | ((advantage < 0) & (rise < -epsilon))
    loss = torch.where(dropped, 0.0, -advantage * ratio)
    return loss, loss, dropped


@triton.jit
def _dppo_tv(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    ratio = tl.exp(logp - old_logp)
    rise = tl.exp(logp) - tl.exp(old_logp)
    dropped = ((advantage > 0) & (rise > epsilon_high)) | ((advantage < 0) & (rise < -epsilon))
    loss = tl.where(dropped, 0.0, -advantage * ratio)
    return loss, loss, dropped


# stands for the probability of all other tokens where rounding leaves none of it
LEAST = 1e-12


def dppo_kl(logp, old_logp, advantage, parameters):
    """As "dppo_tv", by the binary KL(pi_old || pi) of the sampled token against all others.

    DPPO (arXiv:2602.04879): q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = pi_old, p = pi,
    bounded by epsilon_high where A > 0 and p > q, and by epsilon where A < 0 and p < q.
    """
    epsilon, epsilon_high = parameters
    ratio = torch.exp(logp - old_logp)
    rest, old_rest = (-torch.expm1(x).clamp(max=-LEAST) for x in (logp, old_logp))
    kl = torch.exp(old_logp) * (old_logp - logp) + old_rest * torch.log(old_rest / rest)
    too_high = (advantage > 0) & (logp > old_logp) & (kl > epsilon_high)
    too_low = (advantage < 0) & (logp < old_logp) & (kl > epsilon)
    loss = torch.where(too_high | too_low, 0.0, -advantage * ratio)
    return loss, loss, too_high | too_low


@triton.jit
def _dppo_kl(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    ratio = tl.exp(logp - old_logp)
    rest = _rest(logp)
    old_rest = _rest(old_logp)
    kl = tl.exp(old_logp) * (old_logp - logp) + old_rest * tl.log(old_rest / rest)
    too_high = (advantage > 0) & (logp > old_logp) & (kl > epsilon_high)
    too_low = (advantage < 0) & (logp < old_logp) & (kl > epsilon)
    loss = tl.where(too_high | too_low, 0.0, -advantage * ratio)
    return loss, loss, too_high | too_low


@triton.jit
def _rest(logp):
    """1 - exp(logp), at least LEAST."""
    rest = -expm1(logp)
    return tl.where(rest < 1e-12, 1e-12, rest)


def kl_cov(logp, old_logp, advantage, parameters):
    """loss = -r A + kl_coef |log r|, for the tokens that `rl.kl_cov_mask` picks.

    KL-Cov (arXiv:2505.22617): the others go unpenalized, by "ppo_clip" with epsilon infinite.
    """
    log_ratio = logp - old_logp
    ratio = torch.exp(log_ratio)
    loss = -advantage * ratio + parameters[0] * log_ratio.abs()
    return loss, -advantage * ratio + parameters[0] * log_ratio.sign(), _nowhere(logp)


@triton.jit
def _kl_cov(logp, old_logp, advantage, parameters):
    log_ratio = logp - old_logp
    ratio = tl.exp(log_ratio)
    sign = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, 0.0))
    loss = -advantage * ratio + parameters[0] * tl.abs(log_ratio)
    return loss, -advantage * ratio + parameters[0] * sign, logp < logp


def gmpo(logp, old_logp, advantage, parameters):
    """loss = -A (the geometric mean of the sequence's clipped ratios), at sequence level alone.

    GMPO (arXiv:2507.20673). `gmpo_clip` has clipped each token's log-ratio before the mean.
    """
    ratio = torch.exp(logp - old_logp)
    return -advantage * ratio, -advantage * ratio, _nowhere(logp)


def gmpo_clip(log_ratio, advantage, parameters):
    """log r to at most epsilon_high where A > 0 and at least -epsilon where A < 0, and where so.

    GMPO's paper takes 0.4 for both, and clips tokens before the mean rather than after it.
    """
    epsilon, epsilon_high = parameters
    too_high = (advantage > 0) & (log_ratio > epsilon_high)
    too_low = (advantage < 0) & (log_ratio < -epsilon)
    held = torch.where(too_low, -epsilon, torch.where(too_high, epsilon_high, log_ratio))
    return held, too_high | too_low
