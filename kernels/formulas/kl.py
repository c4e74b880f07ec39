"""Per-token estimators of KL(pi || pi_ref) from a sampled token, with their derivatives.

With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
(Schulman 2020, http://joschu.net/blog/kl-approx.html). A policy loss, which knows who sampled the
token, has k3_ratio = r k3 too, r = exp(logp - old_logp), with the gradient of both: r d.

Where -d is beyond KL_BOUND, k3 goes on as its tangent there: otherwise one token that the
reference finds e^50 times as likely as the policy would outweigh every other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import tl, triton
from ..limits import (
    FARTHEST,
    difference,
    difference_,
    expm1_,
    known,
    log_ratio,
    log_ratio_,
    times,
    times_exp,
    times_exp_,
)

# of ref_logp - logp: k3's slope is e^10 - 1 at most
KL_BOUND = 10.0


def k1(logp, ref_logp):
    """Unbiased, may be negative. As a loss its gradient is zero in expectation on-policy."""
    return difference(logp, ref_logp), torch.ones_like(logp)


def k2(logp, ref_logp):
    """Biased, low variance. As a loss its on-policy gradient is that of KL(pi || pi_ref)."""
    d = difference(logp, ref_logp)
    return known(0.5 * d.detach() * d.detach(), (d, d)), d


def k3(logp, ref_logp, bound=KL_BOUND):
    """Unbiased and positive. As a loss its on-policy gradient is that of KL(pi_ref || pi).

    Beyond `bound`, with d = ref_logp - logp and b the bound: e^b - 1 - b + (e^b - 1) (d - b).
    """
    d = difference(ref_logp, logp)
    near = d.detach().clamp(max=bound)
    beyond = torch.where(d > bound, d.detach() - bound, 0.0).clamp(max=FARTHEST)
    slope = torch.expm1(near)
    return known(slope - near.clamp(max=FARTHEST) + times(slope, beyond), (d, slope)), -slope


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
    x, d = log_ratio(logp, old_logp), log_ratio(ref_logp, logp)
    # far out r k3 = pi_ref / pi_old (1 - (1 + d) e^-d), where r may be 0 and k3 infinite
    far, near = d.detach().clamp(min=1), d.detach().clamp(max=1)
    both = log_ratio(ref_logp, old_logp)
    kl = torch.where(
        d > 1,
        times_exp(1 - (1 + far) * torch.exp(-far), both),
        times_exp(torch.expm1(near) - near, x),
    )
    dkl_dd = torch.where(
        d > 1, times_exp(-torch.expm1(-far), both), times_exp(torch.expm1(near), x)
    )
    return known(kl, (x, kl), (d, dkl_dd)), times_exp(-d.detach(), x)


@triton.jit
def token_kl(logp, ref_logp, ESTIMATOR: tl.constexpr):
    """The jitted twin of KL_ESTIMATORS[ESTIMATOR]."""
    d = difference_(logp, ref_logp)
    if ESTIMATOR == "k1":
        kl, dkl = d, tl.zeros_like(d) + 1
    elif ESTIMATOR == "k2":
        kl, dkl = 0.5 * d * d, d
    else:
        tl.static_assert(ESTIMATOR == "k3")
        near = tl.where(d < -10.0, 10.0, -d)  # KL_BOUND
        beyond = tl.where(d < -10.0, -d - 10.0, 0.0)
        slope = expm1_(near)
        kl, dkl = slope - near + slope * tl.where(beyond > 1e30, 1e30, beyond), -slope
    return kl, dkl


@triton.jit
def policy_kl(logp, old_logp, ref_logp, ESTIMATOR: tl.constexpr):
    """The jitted twin of policy_kl_terms."""
    if ESTIMATOR == "k3_ratio":
        x = log_ratio_(logp, old_logp)
        d = log_ratio_(ref_logp, logp)
        both = log_ratio_(ref_logp, old_logp)
        near = tl.where(d > 1, 1, d)
        kl = tl.where(
            d > 1,
            times_exp_(1 - (1 + d) * tl.exp(-d), both),
            times_exp_(expm1_(near) - near, x),
        )
        dkl = times_exp_(-d, x)
    else:
        kl, dkl = token_kl(logp, ref_logp, ESTIMATOR)
    return kl, dkl
