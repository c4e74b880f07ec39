"""Per-token estimators of KL(pi || pi_ref) from a sampled token, with their derivatives.

With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
(Schulman 2020, http://joschu.net/blog/kl-approx.html). A policy loss, which knows who sampled the
token, has k3_ratio = r k3 too, r = exp(logp - old_logp), with the gradient of both: r d.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import tl, triton


def k1(logp, ref_logp):
    """Unbiased, may be negative. As a loss its gradient is zero in expectation on-policy."""
    return logp - ref_logp, torch.ones_like(logp)


def k2(logp, ref_logp):
    """Biased, low variance. As a loss its on-policy gradient is that of KL(pi || pi_ref)."""
    difference = logp - ref_logp
    return 0.5 * difference * difference, difference


def k3(logp, ref_logp):
    """Unbiased and positive. As a loss its on-policy gradient is that of KL(pi_ref || pi)."""
    difference = ref_logp - logp
    excess = torch.expm1(difference)
    return excess - difference, -excess


# name -> (logp, ref_logp) -> (kl, dkl/dlogp)
KL_ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"k1": k1, "k2": k2, "k3": k3}

# those of a policy loss: "k3_ratio" needs the policy that sampled
POLICY_KL_ESTIMATORS = (*KL_ESTIMATORS, "k3_ratio")


def policy_kl_terms(logp, old_logp, ref_logp, kl_estimator: str) -> tuple[Tensor, Tensor]:
    """(kl, dkl/dlogp) of an estimator in POLICY_KL_ESTIMATORS.

    k3_ratio is unbiased for the samples of old_logp, and so is its gradient as a loss, of
    KL(pi || pi_ref) (DeepSeek-V3.2, arXiv:2512.02556, "Unbiased KL Estimate").
    """
    if kl_estimator in KL_ESTIMATORS:
        return KL_ESTIMATORS[kl_estimator](logp, ref_logp)
    kl, _ = k3(logp, ref_logp)
    ratio = torch.exp(logp - old_logp)
    return ratio * kl, ratio * (logp - ref_logp)


@triton.jit
def token_kl(logp, ref_logp, ESTIMATOR: tl.constexpr):
    """The jitted twin of KL_ESTIMATORS[ESTIMATOR]."""
    difference = logp - ref_logp
    if ESTIMATOR == "k1":
        kl, dkl = difference, difference * 0 + 1
    elif ESTIMATOR == "k2":
        kl, dkl = 0.5 * difference * difference, difference
    else:
        tl.static_assert(ESTIMATOR == "k3")
        excess = expm1(-difference)
        kl, dkl = excess + difference, -excess
    return kl, dkl


@triton.jit
def policy_kl(logp, old_logp, ref_logp, ESTIMATOR: tl.constexpr):
    """The jitted twin of policy_kl_terms."""
    if ESTIMATOR == "k3_ratio":
        ratio = tl.exp(logp - old_logp)
        kl, _ = token_kl(logp, ref_logp, "k3")
        kl, dkl = ratio * kl, ratio * (logp - ref_logp)
    else:
        kl, dkl = token_kl(logp, ref_logp, ESTIMATOR)
    return kl, dkl


@triton.jit
def expm1(x):
    # exp(x) - 1 cancels for small x, where a Taylor series does not
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(tl.abs(x) < 0.125, series, tl.exp(x) - 1)
