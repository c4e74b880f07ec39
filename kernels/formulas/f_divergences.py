"""What an f-divergence scores a pair's answers by (f-DPO: Wang et al. 2023, arXiv:2309.16240).

(chosen, rejected, a, b, alpha) -> a score(chosen) - b score(rejected), from log-ratios (B,)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limits import known, times_exp

Divergence = Callable[[Tensor, Tensor, "Tensor | float", "Tensor | float", float], Tensor]


def _reverse_kl(chosen, rejected, a, b, alpha):
    return a * chosen - b * rejected


def _forward_kl(chosen, rejected, a, b, alpha):
    """1 - 1 / ratio."""
    return _alpha_divergence(chosen, rejected, a, b, 0.0)


def _js_divergence(chosen, rejected, a, b, alpha):
    """log(2 ratio / (1 + ratio))."""
    win, lose = (math.log(2) + F.logsigmoid(x) for x in (chosen, rejected))
    return a * win - b * lose


def _alpha_divergence(chosen, rejected, a, b, alpha):
    """(ratio^(alpha - 1) - 1) / (alpha - 1)."""
    k = alpha - 1
    if abs(k) < 1e-6:
        return _reverse_kl(chosen, rejected, a, b, alpha)
    u, v = k * chosen.detach(), k * rejected.detach()
    slopes = (chosen, times_exp(a, u)), (rejected, -times_exp(b, v))
    return known(_difference_of_expm1(a, u, b, v) / k, *slopes)


def _difference_of_expm1(a, u: Tensor, b, v: Tensor) -> Tensor:
    """a (e^u - 1) - b (e^v - 1), infinite only where the difference is."""
    pivot = torch.maximum(u, v)
    near = a * torch.expm1(u.clamp(max=1)) - b * torch.expm1(v.clamp(max=1))
    far = times_exp(a * torch.exp(u - pivot) - b * torch.exp(v - pivot), pivot) - (a - b)
    return torch.where(pivot > 1, far, near)


# f'(pi / pi_ref), up to a constant that cancels (f-DPO: Wang et al. 2023, arXiv:2309.16240)
F_DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
