"""Adaptive coefficients of a KL penalty: from the KL that was measured to the next coefficient.

proportional   c' = c (1 + gain clip(KL / target - 1, -0.2, 0.2))      (Ziegler et al. 2019)
ppo            c' = c / 2 where KL < target / 1.5, 2 c where KL > 1.5 target    (PPO)
"""

from __future__ import annotations

import math

from rlcore.kernels.checks import checks_types


@checks_types
def proportional_kl_coef(
    kl_coef: float, kl: float, *, target: float, gain: float = 0.1, bound: float = 0.2
) -> float:
    """The coefficient after an iteration, in proportion to the error (arXiv:1909.08593, 2.2).

    Args:
        kl_coef: the present coefficient, positive (their beta_t).
        kl: the mean KL(pi || ref) of the iteration, in nats a completion or a token, as target.
        target: the KL to hold, positive.
        gain: their K_beta, not negative; steps / horizon where a horizon is given instead.
        bound: the relative error counts for at most this much, so that gain * bound < 1 must hold.

    Returns:
        The next coefficient, positive.

    Raises:
        ValueError: an argument out of range; a KL that is no finite number.
    """
    _check(kl_coef, kl, target)
    if not (gain >= 0 and bound > 0 and gain * bound < 1):
        raise ValueError(
            f"gain must be >= 0, bound > 0 and their product below 1, got {gain} and {bound}"
        )
    error = min(max(kl / target - 1, -bound), bound)
    return kl_coef * (1 + gain * error)


@checks_types
def ppo_kl_coef(
    kl_coef: float, kl: float, *, target: float, tolerance: float = 1.5, factor: float = 2.0
) -> float:
    """The coefficient after a policy update, by PPO's rule (arXiv:1707.06347, section 4).

    For the kl_coef of "ppo_penalty".

    Args:
        kl_coef: the present coefficient, positive (their beta).
        kl: the mean KL(pi_old || pi) that the update made.
        target: their d_targ, positive.
        tolerance: the KL may be off by this factor, 1 or more, before the coefficient moves.
        factor: by which it moves then, above 1.

    Returns:
        The next coefficient, positive.

    Raises:
        ValueError: an argument out of range; a KL that is no finite number.
    """
    _check(kl_coef, kl, target)
    if not (tolerance >= 1 and factor > 1):
        raise ValueError(
            f"tolerance must be at least 1 and factor above 1, got {tolerance} and {factor}"
        )
    if kl < target / tolerance:
        return kl_coef / factor
    return kl_coef * factor if kl > target * tolerance else kl_coef


def _check(kl_coef: float, kl: float, target: float) -> None:
    if not (kl_coef > 0 and math.isfinite(kl_coef)):
        raise ValueError(f"kl_coef must be positive and finite, got {kl_coef}")
    if not (target > 0 and math.isfinite(target)):
        raise ValueError(f"target must be positive and finite, got {target}")
    if not math.isfinite(kl):
        raise ValueError(f"kl must be a finite number, got {kl}")
