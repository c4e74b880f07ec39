"""Losses of answers that are good or bad by themselves: formulas on their log-ratios, (B,) -> (B,).

    gain = log pi(answer) - log pi_ref(answer), of a bad answer its negative

Names are TRL's. Differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..limits import sigmoid

# (log-ratio, kl, desirable, beta) -> (B,)
Formula = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class UnpairedFormula:
    """A row of the table: the formula, and whether it has a reference point."""

    formula: Formula
    uses_kl: bool


def kto(log_ratio: Tensor, kl: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306) eq. 7, with lambda_y - v as 1 - sigmoid."""
    gain = log_ratio - kl
    return sigmoid(-beta * torch.where(desirable, gain, -gain))


def apo_zero_unpaired(log_ratio: Tensor, kl: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266) eq. 7, an answer at a time."""
    return sigmoid(-beta * torch.where(desirable, log_ratio, -log_ratio))


UNPAIRED_LOSSES = {
    "kto": UnpairedFormula(kto, uses_kl=True),
    "apo_zero_unpaired": UnpairedFormula(apo_zero_unpaired, uses_kl=False),
}
