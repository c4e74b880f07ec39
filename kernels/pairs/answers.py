"""From the log-probabilities of answers' tokens to a preference loss: sums, weights, rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_denominators
from ..rows.token_logprob import TokenLogprob
from .preference_loss import PreferenceLoss, PreferenceOptions, make_pairs, preference_options

Ask = Callable[[float], TokenLogprob]  # a temperature -> (2B, T) of the answers' tokens


@dataclass(frozen=True)
class Answers:
    """What a loss knows of 2B answers, rows [chosen; rejected], besides their logp."""

    mask: Tensor  # (2B, T) bool
    token_weight: Tensor | None  # (2B, T) of a token's logp in its answer's sum
    ref_logp: Tensor | None  # (2B,)
    pair_weight: Tensor | None  # (B,)
    num_items: int | float | Tensor | None = None  # None: B

    def __post_init__(self) -> None:
        check_denominators(num_items=self.num_items)

    def loss(
        self, logp: Tensor, options: PreferenceOptions, pairs: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss, chosen_reward, rejected_reward) of `pairs`, from their sums (2b,)."""
        # made here: torch 2.11's compiler takes no slice as a default
        pairs = slice(None) if pairs is None else pairs
        half = len(self.mask) // 2
        chosen, rejected = logp.chunk(2)
        sides = slice(0, half), slice(half, None)
        lengths = [self.mask[side][pairs].sum(1) for side in sides]
        refs = [None if self.ref_logp is None else self.ref_logp[side][pairs] for side in sides]
        made = make_pairs(chosen, rejected, *refs, *lengths, options)
        weight = None if self.pair_weight is None else self.pair_weight[pairs]
        items = max(half, 1) if self.num_items is None else self.num_items
        return options.total(made, weight, items), *options.rewards(made)

    def preference_loss(self, logp: Tensor, options: PreferenceOptions) -> PreferenceLoss:
        """From the tokens' logp (2B, T), differentiably."""
        sums = summed(logp, self.token_weight)
        loss, *rewards = self.loss(sums, options)
        return PreferenceLoss(loss, *rewards, *sums.detach().chunk(2))


def summed(logp: Tensor, token_weight: Tensor | None) -> Tensor:
    """(2B, T) -> (2B,)"""
    return (logp if token_weight is None else logp * token_weight.to(logp.dtype)).sum(1)


def beyond_shorter(mask: Tensor, ld_alpha: float | None) -> Tensor | None:
    """(2B, T): 1 up to the shorter answer's number of tokens, then ld_alpha; None for None."""
    if ld_alpha is None:
        return None
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
    shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)
    # float64, to be rounded to the log-probabilities' dtype and no further
    one = torch.ones((), dtype=torch.float64, device=mask.device)
    return torch.where(mask.cumsum(1) <= shorter[:, None], one, ld_alpha)


@torch.no_grad()
def wpo_weight(ask: Ask, mask: Tensor, temperature: float) -> Tensor:
    """(B,): the product over both answers of exp(mean of log p_target - log sum_j p_j^2)."""
    plain, squared = ask(temperature), ask(temperature / 2)
    # lse(2 z) - 2 lse(z) = log sum_j p_j^2
    aligned = plain.logp - (squared.lse - 2 * plain.lse)
    means = torch.where(mask, aligned, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    chosen, rejected = means.exp().chunk(2)
    return chosen * rejected


def composed_preference_loss(
    ask: Ask,
    mask: Tensor,
    ref_logp: Tensor | None,
    *,
    temperature: float = 1.0,
    loss_type="sigmoid",
    loss_weights=None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    use_weighting: bool = False,
    ld_alpha: float | None = None,
    num_items: int | float | Tensor | None = None,
    **parameters: float,
) -> PreferenceLoss:
    """`linear_preference_loss` of tokens whose log-probabilities `ask` gives, differentiably."""
    options = preference_options(
        loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, **parameters
    )
    pair_weight = wpo_weight(ask, mask, temperature) if use_weighting else None
    answers = Answers(mask, beyond_shorter(mask, ld_alpha), ref_logp, pair_weight, num_items)
    return answers.preference_loss(ask(temperature).logp, options)
