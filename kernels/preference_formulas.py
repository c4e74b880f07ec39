"""The preference losses: each a formula on the log-ratios of B pairs, (B,) -> (B,).

    chosen   = log pi(chosen) - log pi_ref(chosen)        rejected likewise
    margin   = score(chosen) - score(rejected), where score is the f-divergence's, by default the
               log-ratio itself

Differentiated by autograd: a pair is a handful of numbers. Names and parameters are TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What a formula may ask about B pairs, (B,) each; reference-free losses leave ratios alone."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen: Tensor  # log-ratios to the reference
    rejected: Tensor
    chosen_score: Tensor  # the f-divergence's scores of them
    rejected_score: Tensor
    chosen_length: Tensor | None  # counted tokens
    rejected_length: Tensor | None

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    def averaged(self) -> Pairs:
        """The same with everything divided by the answers' lengths."""
        chosen, rejected = self.chosen_length, self.rejected_length
        return replace(
            self,
            chosen_logp=self.chosen_logp / chosen,
            rejected_logp=self.rejected_logp / rejected,
            chosen_score=self.chosen_score / chosen,
            rejected_score=self.rejected_score / rejected,
        )


@dataclass(frozen=True)
class Parameters:
    """The numbers in the formulas."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0


Formula = Callable[[Pairs, Parameters], Tensor]


@dataclass(frozen=True)
class PreferenceFormula:
    """A row of the table: the formula, and what it needs besides."""

    formula: Formula
    uses_reference: bool = True
    uses_lengths: bool = False
    uses_scores: bool = False  # an f-divergence other than the reverse KL changes it
    couples_pairs: bool = False  # a pair's loss depends on the others
    averages: bool = False  # without a reference: the reward is the mean over tokens, not the sum


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid with a share of the labels flipped."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def sigmoid(pairs: Pairs, p: Parameters) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; smoothed labels: cDPO (Mitchell 2023)."""
    return _smoothed(p.beta * pairs.margin, p.label_smoothing)


def sigmoid_norm(pairs: Pairs, p: Parameters) -> Tensor:
    """DPO on log-ratios averaged over the answers' tokens (Tulu 3, arXiv:2411.15124)."""
    return -F.logsigmoid(p.beta * pairs.averaged().margin)


def ipo(pairs: Pairs, p: Parameters) -> Tensor:
    """IPO on summed log-ratios, Azar et al. 2023 (arXiv:2310.12036) eq. 17; beta is its tau."""
    return (pairs.margin - 1 / (2 * p.beta)).square()


def ipo_avg(pairs: Pairs, p: Parameters) -> Tensor:
    """IPO on log-ratios averaged over the answers' tokens: TRL's "ipo"."""
    return ipo(pairs.averaged(), p)


def hinge(pairs: Pairs, p: Parameters) -> Tensor:
    """SLiC's hinge, Zhao et al. 2023 (arXiv:2305.10425), on DPO's log-ratios."""
    return F.relu(1 - p.beta * pairs.margin)


def robust(pairs: Pairs, p: Parameters) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409): unbiased under flipped labels."""
    logits, flipped = p.beta * pairs.margin, p.label_smoothing
    loss = flipped * F.logsigmoid(-logits) - (1 - flipped) * F.logsigmoid(logits)
    return loss / (1 - 2 * flipped)


def exo_pair(pairs: Pairs, p: Parameters) -> Tensor:
    """EXO on pairs, Ji et al. 2024 (arXiv:2402.00856) eq. 16: the reverse KL to smoothed labels."""
    logits, smoothing = p.beta * pairs.margin, p.label_smoothing or 1e-3
    win, lose = F.logsigmoid(logits), F.logsigmoid(-logits)
    return win.exp() * (win - math.log1p(-smoothing)) + lose.exp() * (lose - math.log(smoothing))


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
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


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
    return 1 - torch.sigmoid(p.beta * pairs.chosen) + torch.sigmoid(p.beta * pairs.rejected)


def apo_down(pairs: Pairs, p: Parameters) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv:2408.06266) eq. 8: both down, rejected more."""
    apart = torch.sigmoid(p.beta * (pairs.chosen - pairs.rejected))
    return torch.sigmoid(p.beta * pairs.chosen) + 1 - apart


def discopop(pairs: Pairs, p: Parameters) -> Tensor:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414) eq. 5: logistic and exponential, mixed."""
    logits = p.beta * pairs.margin
    mixture = torch.sigmoid(logits / p.discopop_tau)
    return (1 - mixture) * -F.logsigmoid(logits) + mixture * torch.exp(-logits)


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
    """ORPO, Hong et al. 2024 (arXiv:2403.07691): imitation and an odds ratio, no reference."""
    averages = pairs.averaged()
    chosen, rejected = averages.chosen_logp, averages.rejected_logp
    log_odds = chosen - rejected - _log1mexp(chosen) + _log1mexp(rejected)
    return -chosen - p.beta * F.logsigmoid(log_odds)


def sft(pairs: Pairs, p: Parameters) -> Tensor:
    """Imitation of the chosen answers, as a part of a sum of losses: each answer's mean token."""
    return -pairs.averaged().chosen_logp


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of log 2."""
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    return torch.where(x > -math.log(2), near, torch.log1p(-torch.exp(x)))


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceFormula(sigmoid, uses_scores=True),
    "sigmoid_norm": PreferenceFormula(sigmoid_norm, uses_scores=True, uses_lengths=True),
    "ipo": PreferenceFormula(ipo, uses_scores=True),
    "ipo_avg": PreferenceFormula(ipo_avg, uses_scores=True, uses_lengths=True),
    "hinge": PreferenceFormula(hinge, uses_scores=True),
    "robust": PreferenceFormula(robust, uses_scores=True),
    "exo_pair": PreferenceFormula(exo_pair, uses_scores=True),
    "nca_pair": PreferenceFormula(nca_pair),
    "bco_pair": PreferenceFormula(bco_pair),
    "sppo_hard": PreferenceFormula(sppo_hard),
    "aot": PreferenceFormula(aot, couples_pairs=True),
    "aot_unpaired": PreferenceFormula(aot_unpaired, couples_pairs=True),
    "apo_zero": PreferenceFormula(apo_zero),
    "apo_down": PreferenceFormula(apo_down),
    "discopop": PreferenceFormula(discopop, uses_scores=True),
    "simpo": PreferenceFormula(simpo, uses_reference=False, uses_lengths=True, averages=True),
    "cpo": PreferenceFormula(cpo, uses_reference=False, uses_lengths=True),
    "orpo": PreferenceFormula(orpo, uses_reference=False, uses_lengths=True, averages=True),
    "sft": PreferenceFormula(sft, uses_reference=False, uses_lengths=True),
}


def _reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return 1 - torch.exp(-log_ratio)


def _js_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(log_ratio)


def _alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    # far out the score is flat instead of infinite
    most = math.log(torch.finfo(log_ratio.dtype).max) - 8
    return torch.expm1(((alpha - 1) * log_ratio).clamp(max=most)) / (alpha - 1)


# f'(pi / pi_ref), up to a constant that cancels (f-DPO: Wang et al. 2023, arXiv:2309.16240)
F_DIVERGENCES = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
