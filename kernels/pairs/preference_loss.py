"""Preference losses from the log-probabilities of whole answers, and their options.

    loss = mean over pairs of  sum over loss types of  weight * formula(log-ratios)

The formulas stand in formulas/pair_losses.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_denominators,
    check_finite,
    check_name,
    check_numbers,
    check_positive,
    checks_types,
)
from ..formulas.f_divergences import F_DIVERGENCES
from ..formulas.pair_losses import POSITIVE, PREFERENCE_LOSSES, Pairs, Parameters
from ..limits import FARTHEST, held, log_ratio, times


class PreferenceLoss(NamedTuple):
    """What `preference_loss` returns; all but the loss are detached, (B,)."""

    loss: Tensor  # a scalar with a gradient
    chosen_reward: Tensor  # beta times the log-ratio to the reference
    rejected_reward: Tensor
    chosen_logp: Tensor  # summed over the answer's tokens
    rejected_logp: Tensor


@dataclass(frozen=True)
class PreferenceOptions:
    """The checked options of a preference loss."""

    loss_types: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: Parameters
    f_divergence_type: str
    f_alpha_divergence_coef: float

    @property
    def uses_reference(self) -> bool:
        return any(PREFERENCE_LOSSES[name].uses_reference for name in self.loss_types)

    @property
    def uses_lengths(self) -> bool:
        return any(PREFERENCE_LOSSES[name].uses_lengths for name in self.loss_types)

    @property
    def couples_pairs(self) -> bool:
        return any(PREFERENCE_LOSSES[name].couples_pairs for name in self.loss_types)

    def per_pair(self, pairs: Pairs) -> Tensor:
        """(B,): the weighted sum of the formulas; a weight of 0 leaves one out."""
        terms = [
            weight * PREFERENCE_LOSSES[name].formula(pairs, self.parameters)
            for name, weight in zip(self.loss_types, self.weights, strict=True)
            if weight
        ]
        return sum(terms) if terms else 0 * pairs.chosen_logp

    def total(self, pairs: Pairs, pair_weight: Tensor | None, items: int | float | Tensor):
        """The scalar: the pairs' losses, weighted, over `items`."""
        loss = self.per_pair(pairs)
        if pair_weight is not None:
            loss = times(pair_weight.detach().to(loss.dtype), loss)
        return held(loss).sum() / items

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Detached (B,) of chosen and rejected."""
        beta = self.parameters.beta
        if self.uses_reference:
            return beta * pairs.chosen.detach(), beta * pairs.rejected.detach()
        if all(PREFERENCE_LOSSES[name].averages for name in self.loss_types):
            pairs = pairs.averaged()
        return beta * pairs.chosen_logp.detach(), beta * pairs.rejected_logp.detach()


def preference_options(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    **parameters: float,
) -> PreferenceOptions:
    """Check the options; ValueError names the one that does not work."""
    names = (loss_type,) if isinstance(loss_type, str) else _several("loss_type", loss_type)
    if not names:
        raise ValueError("loss_type is empty: name one, 'sigmoid' say")
    for name in names:
        check_name("loss_type", name, PREFERENCE_LOSSES)
    weights = (1.0,) * len(names)
    if loss_weights is not None:
        given = {
            f"loss_weights[{i}]": w for i, w in enumerate(_several("loss_weights", loss_weights))
        }
        check_numbers(**given)
        check_finite(**given)
        weights = tuple(map(float, given.values()))
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have an entry for each of the {len(names)} loss types, it has "
            f"{len(weights)}"
        )
    check_finite(f_alpha_divergence_coef=f_alpha_divergence_coef, **parameters)
    numbers = Parameters(**parameters)
    _check_parameters(names, numbers)
    check_name("f_divergence_type", f_divergence_type, F_DIVERGENCES)
    deaf = [name for name in names if not PREFERENCE_LOSSES[name].uses_scores]
    if f_divergence_type != "reverse_kl" and deaf:
        raise ValueError(
            f"f_divergence_type {f_divergence_type!r} has no meaning for loss_type {deaf[0]!r}: "
            "its formula takes the log-ratios apart"
        )
    return PreferenceOptions(names, weights, numbers, f_divergence_type, f_alpha_divergence_coef)


def _several(name: str, values: Sequence) -> tuple:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, an entry for each loss, got {values!r}")
    return tuple(values)


def _check_parameters(names: tuple[str, ...], parameters: Parameters) -> None:
    check_positive(**{name: getattr(parameters, name) for name in POSITIVE})
    smoothing = parameters.label_smoothing
    limit = 0.5 if "robust" in names else 1.0
    if not 0 <= smoothing < limit:
        raise ValueError(f"label_smoothing must be in [0, {limit}), got {smoothing}")
    if smoothing and not any(PREFERENCE_LOSSES[name].smooths for name in names):
        raise ValueError(f"label_smoothing has no part in loss_type {', '.join(names)}: leave it 0")


def make_pairs(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
    options: PreferenceOptions,
) -> Pairs:
    """What the formulas ask about, in at least float32."""
    wide = wide_dtype(chosen_logp)
    # a banned token's -inf becomes a number, with which every formula has a value
    logps = [x.to(wide).clamp(min=-FARTHEST) for x in (chosen_logp, rejected_logp)]
    ratios = logps
    if options.uses_reference:
        ratios = [
            log_ratio(logp.to(wide), ref_logp.detach().to(wide))
            for logp, ref_logp in (
                (chosen_logp, ref_chosen_logp),
                (rejected_logp, ref_rejected_logp),
            )
        ]
    lengths = (
        None if length is None else length.to(wide) for length in (chosen_length, rejected_length)
    )
    return Pairs(
        *logps, *ratios, *lengths, F_DIVERGENCES[options.f_divergence_type],
        options.f_alpha_divergence_coef,
    )  # fmt: skip


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64 where x is that, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@checks_types(options=Parameters, defaults=asdict(Parameters()))
def preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    pair_weight: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    num_items: int | float | Tensor | None = None,
    **parameters: float,
) -> PreferenceLoss:
    """DPO and its relatives: how much a policy prefers the chosen to the rejected answers.

    Args:
        chosen_logp, rejected_logp: (B,) log-probabilities of the answers, summed over their
            tokens. Gradients flow to these alone.
        ref_chosen_logp, ref_rejected_logp: (B,) under the reference. "simpo", "cpo", "orpo" and
            "sft" have none, and refuse one.
        loss_type: a key of PREFERENCE_LOSSES, or several, which are added up. "ipo" is the paper's
            (sums), "ipo_avg" TRL's (means over tokens).
        loss_weights: one for each loss type; None = 1 each.
        beta: positive, 0.1; the larger, the closer to the reference. IPO's tau.
        label_smoothing: share of pairs taken to be the wrong way round, in [0, 1) (below 0.5 for
            "robust"); 0, the default, means 1e-3 to "exo_pair".
        chosen_length, rejected_length: (B,) counted tokens, for the losses that average over them;
            0 for an empty answer, whose mean is 0 (to "orpo" its pair is a tie).
        pair_weight: (B,) factors of the pairs' losses, detached, such as WPO's (Zhou et al. 2024,
            arXiv:2406.11827); None = 1.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" with
            f_alpha_divergence_coef (arXiv:2309.16240), for the losses on a difference of scores.
        discopop_tau (0.05), simpo_gamma (0.5), cpo_alpha (1): of the losses called so.
        num_items: replaces B in the denominator, so that micro-batches and ranks add up.

    Returns:
        PreferenceLoss(loss, chosen_reward, rejected_reward, chosen_logp, rejected_logp), float32
        (float64 for float64 inputs). A reward is beta times the log-ratio; without a reference
        beta times the log-probability ("simpo", "orpo": its mean over tokens).

    Raises:
        ValueError: shapes that differ, an unknown name, a parameter out of its range, a reference
            or a length that is missing or has no meaning.
    """
    options = preference_options(
        loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, **parameters
    )
    given = {
        "rejected_logp": rejected_logp,
        "ref_chosen_logp": ref_chosen_logp,
        "ref_rejected_logp": ref_rejected_logp,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
        "pair_weight": pair_weight,
    }
    _check_given(chosen_logp, given, options)
    check_denominators(num_items=num_items)
    pairs = make_pairs(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_length,
        rejected_length, options,
    )  # fmt: skip
    items = max(len(chosen_logp), 1) if num_items is None else num_items
    loss = options.total(pairs, pair_weight, items)
    logps = (x.detach().to(wide_dtype(chosen_logp)) for x in (chosen_logp, rejected_logp))
    return PreferenceLoss(loss, *options.rewards(pairs), *logps)


def _check_given(
    chosen_logp: Tensor, given: dict[str, Tensor | None], options: PreferenceOptions
) -> None:
    names = ", ".join(options.loss_types)
    if chosen_logp.dim() != 1:
        raise ValueError(
            f"chosen_logp must have shape (B,), one sum an answer, got {tuple(chosen_logp.shape)}"
        )
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != chosen_logp.shape:
            raise ValueError(
                f"{name} must have the shape of chosen_logp, {tuple(chosen_logp.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
        if name.startswith("ref_") and (tensor is None) == options.uses_reference:
            verb = "needs" if tensor is None else "has no use for"
            raise ValueError(f"loss_type {names} {verb} {name}")
        if name.endswith("_length") and tensor is None and options.uses_lengths:
            raise ValueError(f"loss_type {names} averages over tokens: it needs {name}")
