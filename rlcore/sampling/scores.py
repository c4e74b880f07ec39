"""What k samples of each prompt say of a model: mean@k, pass@k, and how sure that is.

pass@k = 1 - C(n - c, k) / C(n, k)   of n samples of which c pass   (arXiv:2107.03374, eq. 1)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORMAL_95 = 1.959963984540054  # of a normal distribution 95% lie within so many deviations


class Estimate(NamedTuple):
    """A mean over prompts and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(passed: Tensor, k: int) -> Tensor:
    """The unbiased pass@k of each prompt, (P,) float64.

    Args:
        passed: (P, n) bool, whether each of a prompt's n samples passed.
        k: 1 to n.

    Raises:
        ValueError: k out of that range.
    """
    n = passed.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k takes k from 1 to the {n} samples of a prompt, not {k}")
    failed = (~passed).sum(1, keepdim=True).double()
    # C(failed, k) / C(n, k) as a product of k ratios, 0 where failed < k
    tried = torch.arange(k, dtype=torch.float64, device=passed.device)
    return 1 - ((failed - tried) / (n - tried)).clamp(min=0).prod(1)


def estimate(values: Tensor, is_difference: bool = False) -> Estimate:
    """Their mean over prompts and how far it can be trusted, prompts taken as drawn at random.

    Wilson's interval (1927) where every value is 0 or 1, which says something at 0% and 100% too;
    else the mean and 1.96 standard errors.

    Args:
        values: (P,), one a prompt; NaN: that prompt has none.
        is_difference: of two models' values, in which 0 and 1 are not the ends of a scale.
    """
    values = values[~values.isnan()].double()
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan)
    mean = values.mean().item()
    if not is_difference and bool(((values == 0) | (values == 1)).all()):
        return Estimate(mean, *_wilson(mean, count))
    half = NORMAL_95 * values.std().item() / math.sqrt(count) if count > 1 else math.inf
    return Estimate(mean, mean - half, mean + half)


def _wilson(share: float, count: int) -> tuple[float, float]:
    square = NORMAL_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = NORMAL_95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    # at 0 and 1 the bound is the share itself, which rounding would miss
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)
