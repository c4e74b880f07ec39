"""Surrogates that hold pi near pi_old by a divergence of the sampled token, and their twins.

As in token_losses.py: (logp, old_logp, advantage, parameters) -> (loss, dloss/dlogp, clipped),
with r = exp(logp - old_logp).
"""

from __future__ import annotations

import torch

from ..backend import tl, triton
from ..limits import (
    expm1_,
    held,
    held_,
    known,
    log_ratio,
    log_ratio_,
    times,
    times_,
    times_exp,
    times_exp_,
)
from .token_losses import nowhere


def dppo_tv(logp, old_logp, advantage, parameters):
    """loss = -r A where the policies are near, 0 where the update would part them further.

    DPPO (arXiv:2602.04879) with the binary total variation |pi - pi_old| of the sampled token: a
    token is dropped where A > 0 and pi - pi_old > epsilon_high, or A < 0 and pi_old - pi > epsilon.
    """
    epsilon, epsilon_high = parameters
    x = log_ratio(logp, old_logp)
    # pi - pi_old as the larger times the share that the other lacks
    lacks = -torch.expm1(-x.detach().abs()) * x.detach().sign()
    rise = times_exp(lacks, torch.maximum(logp, old_logp))
    dropped = ((advantage > 0) & (rise > epsilon_high)) | ((advantage < 0) & (rise < -epsilon))
    loss = torch.where(dropped, 0.0, times_exp(-advantage, x))
    return known(loss, (x, loss)), loss, dropped


@triton.jit
def dppo_tv_(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    x = log_ratio_(logp, old_logp)
    lacks = -expm1_(-tl.abs(x)) * _sign(x)
    rise = times_exp_(lacks, tl.maximum(logp, old_logp))
    dropped = ((advantage > 0) & (rise > epsilon_high)) | ((advantage < 0) & (rise < -epsilon))
    loss = tl.where(dropped, 0.0, times_exp_(-advantage, x))
    return loss, loss, dropped


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


def prime_rl(logp, old_logp, advantage, parameters):
    """loss = dppo_tv + kl_tau (log r)^2: the default of prime-rl, pi_old the policy that sampled.

    The penalty holds dropped tokens too, so no gradient is held at zero: `clipped` is false.
    """
    x = log_ratio(logp, old_logp)
    free = held(dppo_tv(logp, old_logp, advantage, parameters[:2])[0].detach())
    pull = parameters[2] * x.detach()
    slope = free + held(2 * pull)
    return known(free + held(pull * x.detach()), (x, slope)), slope, nowhere(logp)


@triton.jit
def prime_rl_(logp, old_logp, advantage, parameters):
    x = log_ratio_(logp, old_logp)
    free, _, _ = dppo_tv_(logp, old_logp, advantage, (parameters[0], parameters[1]))
    free = held_(free)
    pull = x * parameters[2]
    return free + held_(pull * x), free + held_(2 * pull), logp < logp


def dro(logp, old_logp, advantage, parameters):
    """loss = -A log pi + (tau / 2) (log r)^2: DRO (arXiv:2405.19107), with a baseline in A.

    Kimi k1.5 (arXiv:2501.12599) eq. 3 has the same gradient. Off-policy samples need no importance
    ratio: the loss is least where log r = A / tau, whoever sampled.
    """
    x = log_ratio(logp, old_logp).detach()
    pull = parameters[0] * x
    loss = held(times(-advantage, logp.detach())) + held(0.5 * pull * x)
    return known(loss, (logp, pull - advantage)), pull - advantage, nowhere(logp)


@triton.jit
def dro_(logp, old_logp, advantage, parameters):
    x = log_ratio_(logp, old_logp)
    pull = x * parameters[0]
    loss = held_(times_(-advantage, logp)) + held_(0.5 * pull * x)
    return loss, pull - advantage, logp < logp


# stands for the probability of all other tokens where rounding leaves none of it
LEAST = 1e-12


def dppo_kl(logp, old_logp, advantage, parameters):
    """As "dppo_tv", by the binary KL(pi_old || pi) of the sampled token against all others.

    DPPO (arXiv:2602.04879): q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = pi_old, p = pi,
    bounded by epsilon_high where A > 0 and p > q, and by epsilon where A < 0 and p < q.
    """
    epsilon, epsilon_high = parameters
    x = log_ratio(logp, old_logp)
    rest, old_rest = (-torch.expm1(y).clamp(max=-LEAST) for y in (logp, old_logp))
    kl = times_exp(-x.detach(), old_logp) + old_rest * torch.log(old_rest / rest)
    too_high = (advantage > 0) & (x > 0) & (kl > epsilon_high)
    too_low = (advantage < 0) & (x < 0) & (kl > epsilon)
    loss = torch.where(too_high | too_low, 0.0, times_exp(-advantage, x))
    return known(loss, (x, loss)), loss, too_high | too_low


@triton.jit
def dppo_kl_(logp, old_logp, advantage, parameters):
    epsilon, epsilon_high = parameters
    x = log_ratio_(logp, old_logp)
    rest = _rest(logp)
    old_rest = _rest(old_logp)
    kl = times_exp_(-x, old_logp) + old_rest * tl.log(old_rest / rest)
    too_high = (advantage > 0) & (x > 0) & (kl > epsilon_high)
    too_low = (advantage < 0) & (x < 0) & (kl > epsilon)
    loss = tl.where(too_high | too_low, 0.0, times_exp_(-advantage, x))
    return loss, loss, too_high | too_low


@triton.jit
def _rest(logp):
    """1 - exp(logp), at least LEAST."""
    rest = -expm1_(logp)
    return tl.where(rest < 1e-12, 1e-12, rest)


def kl_cov(logp, old_logp, advantage, parameters):
    """loss = -r A + kl_coef |log r|, for the tokens that `rl.kl_cov_mask` picks.

    KL-Cov (arXiv:2505.22617): the others go unpenalized, by "ppo_clip" with epsilon infinite.
    """
    x = log_ratio(logp, old_logp)
    free = times_exp(-advantage, x)
    slope = free + parameters[0] * x.detach().sign()
    loss = free + parameters[0] * x.detach().abs()
    return known(loss, (x, slope)), slope, nowhere(logp)


@triton.jit
def kl_cov_(logp, old_logp, advantage, parameters):
    x = log_ratio_(logp, old_logp)
    free = times_exp_(-advantage, x)
    return free + parameters[0] * tl.abs(x), free + parameters[0] * _sign(x), logp < logp
