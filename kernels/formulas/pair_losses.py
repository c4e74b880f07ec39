"""The preference losses: each a formula on the log-ratios of B pairs, (B,) -> (B,).

    chosen   = log pi(chosen) - log pi_ref(chosen)        rejected likewise
    margin   = score(chosen) - score(rejected), where score is the f-divergence's, by default the
               log-ratio itself

Differentiated by autograd: a pair is a handful of numbers. Names and parameters are TRL's. An
answer without a token has log-probability 0, and so has its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limits import held, known, times, times_exp
from ..limits import sigmoid as _sigmoid
from .f_divergences import Divergence

# stands for the probability of all other answers where rounding leaves none of it
LEAST = 2.0**-100


@dataclass(frozen=True)
class Pairs:
    """What a formula may ask about B pairs, (B,) each; reference-free losses leave ratios alone."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen: Tensor  # log-ratios to the reference
    rejected: Tensor
    chosen_length: Tensor | None  # counted tokens
    rejected_length: Tensor | None
    divergence: Divergence
    alpha: float
    chosen_share: Tensor | float = 1.0  # what the scores are multiplied by
    rejected_share: Tensor | float = 1.0

    @property
    def margin(self) -> Tensor:
        return self.divergence(
            self.chosen, self.rejected, self.chosen_share, self.rejected_share, self.alpha
        )

    def logits(self, beta: float) -> Tensor:
        """beta times the margin, finite, and so is the margin's gradient: an answer's may be 0."""
        margin = self.margin
        return known(held(beta * margin.detach()), (margin, torch.full_like(margin, beta)))

    def averaged(self) -> Pairs:
        """The same with everything divided by the answers' lengths."""
        chosen, rejected = self.chosen_length.clamp(min=1), self.rejected_length.clamp(min=1)
        return replace(
            self,
            chosen_logp=self.chosen_logp / chosen,
            rejected_logp=self.rejected_logp / rejected,
            chosen_share=1 / chosen,
            rejected_share=1 / rejected,
        )


@dataclass(frozen=True)
class Parameters:
    """The numbers in the formulas: arguments of every preference loss, by these names."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0


POSITIVE = ("beta", "discopop_tau")  # of the parameters
Formula = Callable[[Pairs, Parameters], Tensor]


@dataclass(frozen=True)
class PreferenceFormula:
    """A row of the table: the formula, and what it needs besides."""

    formula: Formula
    uses_reference: bool = True
    uses_lengths: bool = False
    uses_scores: bool = False  # an f-divergence other than the reverse KL changes it
    couples_pairs: bool = False  # a pair's loss depends on the others
    smooths: bool = False  # takes label_smoothing
    averages: bool = False  # without a reference: the reward is the mean over tokens, not the sum


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid with a share of the labels flipped."""
    if not smoothing:
        return -F.logsigmoid(logits)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _square(x: Tensor) -> Tensor:
    return known(x.detach().square(), (x, 2 * x))


def sigmoid(pairs: Pairs, p: Parameters) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; smoothed labels: cDPO (Mitchell 2023)."""
    return _smoothed(pairs.logits(p.beta), p.label_smoothing)


def sigmoid_norm(pairs: Pairs, p: Parameters) -> Tensor:
    """DPO on log-ratios averaged over the answers' tokens (Tulu 3, arXiv:2411.15124)."""
    return -F.logsigmoid(pairs.averaged().logits(p.beta))


def ipo(pairs: Pairs, p: Parameters) -> Tensor:
    """IPO on summed log-ratios, Azar et al. 2023 (arXiv:2310.12036) eq. 17; beta is its tau."""
    return _square(pairs.margin - 1 / (2 * p.beta))


def ipo_avg(pairs: Pairs, p: Parameters) -> Tensor:
    """IPO on log-ratios averaged over the answers' tokens: TRL's "ipo"."""
    return ipo(pairs.averaged(), p)


def hinge(pairs: Pairs, p: Parameters) -> Tensor:
    """SLiC's hinge, Zhao et al. 2023 (arXiv:2305.10425), on DPO's log-ratios."""
    return F.relu(1 - pairs.logits(p.beta))


def robust(pairs: Pairs, p: Parameters) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409): unbiased under flipped labels."""
    logits, flipped = pairs.logits(p.beta), p.label_smoothing
    loss = flipped * F.logsigmoid(-logits) - (1 - flipped) * F.logsigmoid(logits)
    return loss / (1 - 2 * flipped)


def exo_pair(pairs: Pairs, p: Parameters) -> Tensor:
    """EXO on pairs, Ji et al. 2024 (arXiv:2402.00856) eq. 16: the reverse KL to smoothed labels."""
    logits, smoothing = pairs.logits(p.beta), p.label_smoothing or 1e-3
    x, prior = logits.detach(), math.log1p(-smoothing) - math.log(smoothing)
    win, lose = torch.sigmoid(x), torch.sigmoid(-x)
    against_win = win * (F.logsigmoid(x) - math.log1p(-smoothing))
    against_lose = lose * (F.logsigmoid(-x) - math.log(smoothing))
    return known(against_win + against_lose, (logits, win * lose * (x - prior)))


def nca_pair(pairs: Pairs, p: Parameters) -> Tensor:
    """NCA on pairs, Chen et al. 2024 (arXiv:2402.05369)."""
    chosen, rejected = p.beta * pairs.chosen, p.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, p: Parameters) -> Tensor:
    """BCO on pairs, Jung et al. 2024 (arXiv:2404.04656), without its running reward shift."""
    return -F.logsigmoid(p.beta * pairs.chosen) - F.logsigmoid(-p.beta * pairs.rejected)


def sppo_hard(pairs: Pairs, p: Parameters) -> Tensor:
    """SPPO with win rates 1 and 0, Wu et al. 2024 (arXiv:2405.00675) eq. 4.7."""
    half = 0.5 / p.beta
    return _square(pairs.chosen - half) + _square(pairs.rejected + half)


def aot(pairs: Pairs, p: Parameters) -> Tensor:
    """Distributional alignment, Melnyk et al. 2024 (arXiv:2406.05882), on paired data."""
    policy = pairs.chosen_logp - pairs.rejected_logp
    reference = (policy - pairs.chosen + pairs.rejected).detach()
    delta = policy.sort().values - reference.sort().values
    return _smoothed(p.beta * delta, p.label_smoothing)


def aot_unpaired(pairs: Pairs, p: Parameters) -> Tensor:
    """Distributional alignment, Melnyk et al. 2024 (arXiv:2406.05882), on unpaired data."""
    delta = pairs.chosen.sort().values - pairs.rejected.sort().values
    return _smoothed(p.beta * delta, p.label_smoothing)


def apo_zero(pairs: Pairs, p: Parameters) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266) eq. 7: chosen up, rejected down."""
    return _sigmoid(-p.beta * pairs.chosen) + _sigmoid(p.beta * pairs.rejected)


def apo_down(pairs: Pairs, p: Parameters) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv:2408.06266) eq. 8: both down, rejected more."""
    closer = _sigmoid(p.beta * (pairs.rejected - pairs.chosen))
    return _sigmoid(p.beta * pairs.chosen) + closer


def discopop(pairs: Pairs, p: Parameters) -> Tensor:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414) eq. 5: logistic and exponential, mixed."""
    logits, tau = pairs.logits(p.beta), p.discopop_tau
    logistic = _sigmoid(-logits / tau) * -F.logsigmoid(logits)
    # sigmoid(l / tau) e^-l: for l < 0 as e^(l / tau - l) sigmoid(-l / tau), lest 0 meet infinity
    x = logits.detach()
    up, rest = torch.sigmoid(x / tau), torch.sigmoid(-x / tau)
    mixed = torch.where(x < 0, times_exp(rest, x * (1 / tau - 1)), up * torch.exp(-x))
    return logistic + known(mixed, (logits, times(rest / tau - 1, mixed)))


def simpo(pairs: Pairs, p: Parameters) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv:2405.14734): no reference, averages, a target margin."""
    averages = pairs.averaged()
    margin = averages.chosen_logp - averages.rejected_logp - p.simpo_gamma / p.beta
    return _smoothed(p.beta * margin, p.label_smoothing)


def cpo(pairs: Pairs, p: Parameters) -> Tensor:
    """CPO, Xu et al. 2024 (arXiv:2401.08417): DPO without a reference, imitation beside it."""
    margin = pairs.chosen_logp - pairs.rejected_logp
    imitation = -pairs.averaged().chosen_logp
    return _smoothed(p.beta * margin, p.label_smoothing) + p.cpo_alpha * imitation


def orpo(pairs: Pairs, p: Parameters) -> Tensor:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691): imitation and an odds ratio, no reference.

    An answer without a token has no odds: its pair's log odds ratio is 0. Of a sure answer
    (p = 1) 1 - p counts as LEAST.
    """
    averages = pairs.averaged()
    empty = torch.minimum(pairs.chosen_length, pairs.rejected_length) < 1
    return p.beta * _odds_loss(averages.chosen_logp, averages.rejected_logp, empty) - (
        averages.chosen_logp
    )


def _odds_loss(chosen: Tensor, rejected: Tensor, empty: Tensor) -> Tensor:
    """-log sigmoid(log of chosen's odds p / (1 - p) over rejected's)."""
    rests = [(-torch.expm1(x.detach())).clamp(min=LEAST) for x in (chosen, rejected)]
    win, lose = (
        x.detach() - torch.where(rest < 0.5, rest.log(), torch.log1p(-torch.exp(x.detach())))
        for x, rest in zip((chosen, rejected), rests, strict=True)
    )
    log_odds = torch.where(empty, 0.0, win - lose)
    # autograd would divide by 1 - p what has lost it in rounding
    slope = torch.where(empty, 0.0, torch.sigmoid(-log_odds))
    return known(-F.logsigmoid(log_odds), (chosen, -slope / rests[0]), (rejected, slope / rests[1]))


def sft(pairs: Pairs, p: Parameters) -> Tensor:
    """Imitation of the chosen answers, as a part of a sum of losses: each answer's mean token."""
    return -pairs.averaged().chosen_logp


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceFormula(sigmoid, uses_scores=True, smooths=True),
    "sigmoid_norm": PreferenceFormula(sigmoid_norm, uses_scores=True, uses_lengths=True),
    "ipo": PreferenceFormula(ipo, uses_scores=True),
    "ipo_avg": PreferenceFormula(ipo_avg, uses_scores=True, uses_lengths=True),
    "hinge": PreferenceFormula(hinge, uses_scores=True),
    "robust": PreferenceFormula(robust, uses_scores=True, smooths=True),
    "exo_pair": PreferenceFormula(exo_pair, uses_scores=True, smooths=True),
    "nca_pair": PreferenceFormula(nca_pair),
    "bco_pair": PreferenceFormula(bco_pair),
    "sppo_hard": PreferenceFormula(sppo_hard),
    "aot": PreferenceFormula(aot, couples_pairs=True, smooths=True),
    "aot_unpaired": PreferenceFormula(aot_unpaired, couples_pairs=True, smooths=True),
    "apo_zero": PreferenceFormula(apo_zero),
    "apo_down": PreferenceFormula(apo_down),
    "discopop": PreferenceFormula(discopop, uses_scores=True),
    "simpo": PreferenceFormula(
        simpo, uses_reference=False, uses_lengths=True, smooths=True, averages=True
    ),
    "cpo": PreferenceFormula(cpo, uses_reference=False, uses_lengths=True, smooths=True),
    "orpo": PreferenceFormula(orpo, uses_reference=False, uses_lengths=True, averages=True),
    "sft": PreferenceFormula(sft, uses_reference=False, uses_lengths=True),
}
