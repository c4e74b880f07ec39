"""Rewards to returns and advantages: GAE, discounted returns and KL-shaped rewards.

    delta_t = r_t + gamma V_next(t) - V_t,   A_t = delta_t + gamma lam A_next(t)
    returns_t = A_t + V_t,                   G_t = r_t + gamma G_next(t)

next(t) is the next token that counts. Floor: every input read once, every output written once.
The results are targets and weights, not part of a loss: no gradient flows through them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import resolve_backend, takes_short_way
from ..checks import check_finite, check_name, checks_types
from ..formulas.kl import KL_ESTIMATORS
from . import ops as scan_ops
from .checks import check_fraction, check_sequences


class GAE(NamedTuple):
    """What `gae` returns, each (B, T), detached."""

    advantage: Tensor
    returns: Tensor


class GAEFromScores(NamedTuple):
    """What `gae_from_scores` returns: (B, T), (B, T), and two scalars, all detached."""

    advantage: Tensor
    returns: Tensor
    mean: Tensor
    variance: Tensor


def _call(name: str, *arguments):
    """Runs an operator on detached tensors: directly in eager mode, else through its dispatcher."""
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    if takes_short_way(*(a for a in arguments if isinstance(a, Tensor))):
        with torch.no_grad():
            return getattr(scan_ops, f"run_{name}")(*arguments)
    return getattr(scan_ops, f"{name}_op")(*arguments)


@checks_types
def gae(
    reward: Tensor,
    value: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    last_value: Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    """Generalised advantage estimates and the returns that a value function is fitted to.

    A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al.
    2016, arXiv:1506.02438, equations 11 and 16); returns = A + V, the TD(lam) return.

    Args:
        reward, value: (B, T), float32, bfloat16, float16 or float64, any strides (a copy is made
            of what is not contiguous).
        gamma, lam: in [0, 1]; the triton backend takes them in float32.
        mask: bool (B, T), true = the token counts. Others (padding on either side, tool tokens)
            are skipped: the recursion carries across them, they get 0, and what stands there, NaN
            too, has no effect. None = every token counts.
        terminated: bool (B, T), true = the episode ends with this token: nothing after it enters.
            Ignored where masked. Cuts inside a row allow packed episodes.
        last_value: (B,), the value after each row's last counted token, where the episode was
            truncated and not ended. None = 0.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        GAE(advantage, returns), each (B, T), float32 (float64 where an input is), detached: no
        gradient flows to reward or value. The triton backend adds in an order that depends on T
        alone, so a row gets the same bits whatever else is in the batch. A NaN in a counted token
        spoils its row.

    Raises:
        ValueError: a wrong shape, dtype or device; gamma or lam outside [0, 1].
    """
    check_fraction(gamma=gamma, lam=lam)
    check_sequences(
        "reward", reward, value=value, mask=mask, terminated=terminated, last_value=last_value
    )
    backend = resolve_backend(backend, reward)
    return GAE(*_call("gae", reward, value, mask, terminated, last_value, gamma, lam, backend))


@checks_types
def discounted_return(
    reward: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    terminated: Tensor | None = None,
    last_value: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The rewards to go, G_t = r_t + gamma G_next(t), with G = last_value past a row's end.

    Arguments and errors are those of `gae`. Returns (B, T), float32 (float64 where an input is),
    0 where masked, detached.
    """
    check_fraction(gamma=gamma)
    check_sequences("reward", reward, mask=mask, terminated=terminated, last_value=last_value)
    backend = resolve_backend(backend, reward)
    return _call("gae", reward, None, mask, terminated, last_value, gamma, 1.0, backend)[1]


@checks_types
def shaped_reward(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kl_estimator: str = "k1",
    backend: str | None = None,
) -> Tensor:
    """Per-token rewards of RLHF: -beta KL_t, and the score on each row's last counted token.

    (Ziegler et al. 2019, arXiv:1909.08593, equation 2; Ouyang et al. 2022, arXiv:2203.02155.)

    Args:
        score: (B,), one number for each completion.
        logp, ref_logp: (B, T), log-probabilities of the tokens under the policy that sampled them
            and under the reference.
        mask: bool (B, T), true = the token counts. Elsewhere the reward is 0, whatever stands in
            logp and ref_logp. The score of a row without a counted token goes nowhere.
        beta: weight of the KL, finite.
        kl_estimator: "k1", "k2" or "k3", see `token_kl`.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        (B, T), float32 (float64 where an input is), detached.

    Raises:
        ValueError: a wrong shape, dtype or device; an unknown kl_estimator; beta not finite.
    """
    check_finite(beta=beta)
    check_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_sequences("logp", logp, score=score, ref_logp=ref_logp, mask=mask)
    backend = resolve_backend(backend, logp)
    return _call("shaped_reward", score, logp, ref_logp, mask, beta, kl_estimator, backend)


@checks_types
def gae_from_scores(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    terminated: Tensor | None = None,
    last_value: Tensor | None = None,
    backend: str | None = None,
) -> GAEFromScores:
    """`gae` of `shaped_reward` and what whitening its advantages takes, in one pass.

    The rewards are never stored. Arguments and errors are those of the two functions.

    Returns:
        GAEFromScores(advantage (B, T), returns (B, T), mean, variance), detached; mean and
        unbiased variance of the advantages over all counted tokens, so that
        torch.where(mask, (advantage - mean) * (variance + 1e-8).rsqrt(), 0) whitens them.
        variance is 0 for fewer than two counted tokens, mean for none.
    """
    check_finite(beta=beta)
    check_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_fraction(gamma=gamma, lam=lam)
    check_sequences(
        "value", value, score=score, logp=logp, ref_logp=ref_logp, mask=mask,
        terminated=terminated, last_value=last_value,
    )  # fmt: skip
    advantage, returns, moments = _call(
        "gae_from_scores", score, logp, ref_logp, value, mask, terminated, last_value,
        beta, kl_estimator, gamma, lam, resolve_backend(backend, value),
    )  # fmt: skip
    return GAEFromScores(advantage, returns, *_merge(*moments))


def _merge(count: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased variance) over all rows, from each row's count, mean and deviations."""
    total = count.sum()
    center = (count * mean).sum() / total.clamp(min=1)
    square = square.sum() + (count * (mean - center).square()).sum()
    return center, square / (total - 1).clamp(min=1)
