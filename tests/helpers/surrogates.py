"""The surrogates' definitions for the oracle, and options under which each shows all its sides."""

from __future__ import annotations

import torch
from torch import Tensor

INFINITE = float("inf")


def _never(logp: Tensor) -> Tensor:
    return torch.zeros_like(logp, dtype=torch.bool)


def ppo_penalty(ratio, logp, advantage, *, surrogate_params=None):
    """-r A + c (r - 1 - log r)."""
    coefficient = (surrogate_params or {"kl_coef": 1.0})["kl_coef"]
    return -ratio * advantage + coefficient * (ratio - 1 - ratio.log()), _never(logp)


def cispo(ratio, logp, advantage, *, epsilon=0.2, epsilon_high=None):
    """-clip(r) A log pi, the clip a number."""
    high = epsilon if epsilon_high is None else epsilon_high
    return -ratio.detach().clamp(1 - epsilon, 1 + high) * advantage * logp, _never(logp)


def cispo_abs(ratio, logp, advantage, *, epsilon_high):
    """-min(r, epsilon_high) A log pi, the minimum a number."""
    bound = torch.full_like(ratio, epsilon_high)
    return -torch.minimum(ratio.detach(), bound) * advantage * logp, _never(logp)


def sapo(ratio, logp, advantage, *, surrogate_params=None):
    """-(4 / tau) A / (1 + exp(-tau (r - 1)))."""
    params = {"tau_pos": 1.0, "tau_neg": 1.05} | (surrogate_params or {})
    up, down = (
        4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
        for tau in (params["tau_pos"], params["tau_neg"])
    )
    return -advantage * torch.where(advantage > 0, up, down), _never(logp)


def gmpo(ratio, logp, advantage, **_):
    """-A times a ratio whose tokens were clipped before the mean."""
    return -ratio * advantage, _never(logp)


def gmpo_clip(log_ratio, advantage, *, epsilon=0.2, epsilon_high=None):
    """The tokens' part of GMPO, as its paper's code: min of sgn(A) log r and its clip."""
    high = epsilon if epsilon_high is None else epsilon_high
    sign = torch.where(advantage > 0, 1.0, -1.0)
    least = torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-epsilon, high))
    held = (log_ratio > high) & (advantage > 0) | (log_ratio < -epsilon) & (advantage < 0)
    return torch.where(advantage == 0, log_ratio, sign * least), held


def vespo(ratio, logp, advantage, *, surrogate_params=None):
    """-w^k e^(lambda (1 - w)) A log pi, its weight a number."""
    params = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    params |= surrogate_params or {}
    w = ratio.detach()
    up, down = (
        w ** params[f"k_{side}"] * torch.exp(params[f"lambda_{side}"] * (1 - w))
        for side in ("pos", "neg")
    )
    return -torch.where(advantage > 0, up, down) * advantage * logp, _never(logp)


def dppo_tv(ratio, logp, advantage, *, epsilon=0.2, epsilon_high=None):
    """-r A, dropped where the sampled token's probability has gone too far."""
    high = epsilon if epsilon_high is None else epsilon_high
    rise = logp.exp() - logp.exp() / ratio
    dropped = torch.where(advantage > 0, rise > high, (advantage < 0) & (-rise > epsilon))
    return -ratio * advantage * ~dropped, dropped


def dppo_kl(ratio, logp, advantage, *, epsilon=0.2, epsilon_high=None):
    """-r A, dropped where the KL of two Bernoulli distributions is too large."""
    high = epsilon if epsilon_high is None else epsilon_high
    old, new = logp.exp() / ratio, logp.exp()
    kl = old * (old / new).log() + (1 - old) * ((1 - old) / (1 - new)).log()
    further = torch.where(
        advantage > 0, (ratio > 1) & (kl > high), (advantage < 0) & (ratio < 1) & (kl > epsilon)
    )
    return -ratio * advantage * ~further, further


def prime_rl(ratio, logp, advantage, *, surrogate_params=None, **clip):
    """dppo_tv's loss and tau (log r)^2."""
    tau = (surrogate_params or {"kl_tau": 1e-3})["kl_tau"]
    loss, _ = dppo_tv(ratio, logp, advantage, **clip)
    return loss + tau * ratio.log().square(), _never(logp)


def dro(ratio, logp, advantage, *, surrogate_params=None):
    """-A log pi + tau / 2 (log r)^2."""
    tau = (surrogate_params or {"tau": 0.05})["tau"]
    return -advantage * logp + tau / 2 * ratio.log().square(), _never(logp)


def kl_cov(ratio, logp, advantage, *, surrogate_params=None):
    """-r A + c |log r|."""
    coefficient = (surrogate_params or {"kl_coef": 1.0})["kl_coef"]
    return -ratio * advantage + coefficient * ratio.log().abs(), _never(logp)


FORMULAS = {
    "ppo_penalty": ppo_penalty,
    "cispo": cispo,
    "cispo_abs": cispo_abs,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "prime_rl": prime_rl,
    "dro": dro,
    "kl_cov": kl_cov,
}

# whose ratio of a sequence is the product of its tokens'
PRODUCTS = ("vespo",)

# Where the ratios of `cases.RATIOS` and small vocabularies lie on either side of every bound.
OPTIONS: dict[str, dict] = {
    "reinforce": {},
    "ppo_clip": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    "ppo_penalty": {"surrogate_params": {"kl_coef": 0.7}},
    "cispo": {"epsilon": 0.1, "epsilon_high": 0.3},
    "cispo_abs": {"epsilon_high": 1.3},
    "sapo": {"surrogate_params": {"tau_pos": 0.8, "tau_neg": 1.6}},
    "gmpo": {"epsilon": 0.1, "epsilon_high": 0.3},
    "vespo": {
        "surrogate_params": {"k_pos": 1.5, "lambda_pos": 0.8, "k_neg": 2.5, "lambda_neg": 0.6}
    },
    "dppo_tv": {"epsilon": 0.004, "epsilon_high": 0.012},
    "dppo_kl": {"epsilon": 0.001, "epsilon_high": 0.004},
    "prime_rl": {"epsilon": 0.004, "epsilon_high": 0.012, "surrogate_params": {"kl_tau": 0.3}},
    "dro": {"surrogate_params": {"tau": 0.7}},
    "kl_cov": {"surrogate_params": {"kl_coef": 0.7}},
}
