"""rlcore's policy losses in the form that verl's registry calls them in.

Each entry of LOSSES says which surrogates make up a verl loss, with what parameters and weights.
verl hands over log-probabilities (B, T); aggregation and its global counts are verl's `agg_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlcore.functional.corrections import kl_cov_mask
from rlcore.integrations.logp_loss import policy_loss_from_logp
from rlcore.kernels.formulas.sequence_ratio import sequence_mean
from rlcore.kernels.formulas.sequences import AGGREGATIONS
from rlcore.kernels.formulas.surrogates import SURROGATES
from rlcore.kernels.limits import log_ratio

# verl holds a sequence's log-ratio at this, with no gradient; as a bound on the ratio
GSPO_BOUND = math.exp(10.0)


@dataclass(frozen=True)
class Batch:
    """A micro-batch's values, each (B, T) and 0 where the mask is false.

    The weight is the sampler's, or None; where the mask is false it may hold anything.
    """

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    weight: Tensor | None

    @property
    def log_ratio(self) -> Tensor:
        return log_ratio(self.logp.detach(), self.old_logp)

    def weighted(self, chosen: Tensor) -> Batch:
        """The same with weight 0 where `chosen` (bool) is false."""
        weight = torch.ones_like(self.logp) if self.weight is None else self.weight
        return replace(self, weight=torch.where(chosen, weight, 0.0))


@dataclass(frozen=True)
class Part:
    """One surrogate over a batch, with its options of `rl.policy_loss`."""

    batch: Batch
    surrogate: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """The parts that add up to a loss, and the tokens that verl's metrics call clipped.

    Args:
        clipped: None = those whose gradient the clip holds at zero, less `clipped_lower`.
        clipped_lower: None = no token.
        loss_agg_mode: the mode a loss is defined with, whatever the config says; None = any.
    """

    parts: list[Part]
    clipped: Tensor | None = None
    clipped_lower: Tensor | None = None
    loss_agg_mode: str | None = None


def _bounds(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def _clip(config: Any) -> dict[str, float]:
    return dict(zip(("epsilon", "epsilon_high"), _bounds(config), strict=True))


def _outside(x: Tensor, low: float, high: float) -> Tensor:
    return (x < low) | (x > high)


def ppo(batch: Batch, config: Any) -> Terms:
    """ "vanilla": the clipped surrogate with dual clip."""
    bound = config.get("clip_ratio_c", 3.0)
    if not bound > 1:
        raise ValueError(f"clip_ratio_c must be greater than 1, got {bound}")
    lower = (batch.advantage < 0) & (batch.log_ratio.exp() > bound)
    part = Part(batch, "ppo_clip", {**_clip(config), "delta": bound})
    return Terms([part], clipped_lower=lower)


def gspo(batch: Batch, config: Any) -> Terms:
    """ "gspo": the sequence's ratio in every token's value, each token's own gradient.

    That is GSPO-token (arXiv:2507.18071, eq. 13), which is GSPO where a sequence has one advantage.
    """
    mean = sequence_mean(torch.where(batch.mask, batch.log_ratio, 0.0), batch.mask, None)
    shared = replace(batch, old_logp=batch.logp.detach() - mean)
    return Terms([Part(shared, "ppo_clip", {**_clip(config), "delta": GSPO_BOUND})])


def cispo(batch: Batch, config: Any) -> Terms:
    low, high = _bounds(config)
    clipped = _outside(batch.log_ratio.exp(), 1 - low, 1 + high)
    return Terms([Part(batch, "cispo", _clip(config))], clipped)


def sapo(batch: Batch, config: Any) -> Terms:
    taus = {"tau_pos": float(config.tau_pos), "tau_neg": float(config.tau_neg)}
    part = Part(batch, "sapo", {"surrogate_params": taus})
    return Terms([part], loss_agg_mode="seq-mean-token-mean")


def geo_mean(batch: Batch, config: Any) -> Terms:
    """ "geo_mean": GMPO, with a sequence's mean advantage and the geometric mean of its weights."""
    low, high = _bounds(config)
    outside = _outside(batch.log_ratio, -low, high)
    sequence = replace(batch, advantage=sequence_mean(batch.advantage, batch.mask, None))
    if batch.weight is not None:
        log_weight = torch.where(batch.mask, torch.log(batch.weight + 1e-10), 0.0)
        sequence = replace(sequence, weight=sequence_mean(log_weight, batch.mask, None).exp())
    options = {**_clip(config), "importance_sampling_level": "sequence"}
    return Terms(
        [Part(sequence, "gmpo", options)],
        outside & (batch.advantage > 0),
        outside & (batch.advantage < 0),
        loss_agg_mode="seq-mean-token-mean",
    )


def _dppo(surrogate: str) -> Callable[[Batch, Any], Terms]:
    """ "dppo_tv", "dppo_kl": tokens dropped by the divergence, a truncated ratio on the others."""

    def dppo(batch: Batch, config: Any) -> Terms:
        bound = config.get("clip_ratio_c", 20.0)
        logp, old_logp, advantage = batch.logp.detach(), batch.old_logp, batch.advantage
        dropped = SURROGATES[surrogate].torch(logp, old_logp, advantage, _bounds(config))[2]
        part = Part(batch.weighted(~dropped), "cispo_abs", {"epsilon_high": bound})
        return Terms([part], dropped, (batch.log_ratio.exp() > bound) & ~dropped)

    return dppo


def reinforce(batch: Batch, config: Any) -> Terms:
    """ "gpg": log-probabilities without a ratio; the old ones serve the KL metric alone."""
    return Terms([Part(batch, "reinforce")])


def kl_cov(batch: Batch, config: Any) -> Terms:
    """ "kl_cov": a KL penalty on the tokens whose logp and advantage vary together the most."""
    fraction, coefficient = config.policy_loss.kl_cov_ratio, config.policy_loss.ppo_kl_coef
    fraction = 0.0002 if fraction is None else fraction
    coefficient = 1.0 if coefficient is None else coefficient
    chosen = kl_cov_mask(batch.logp.detach(), batch.advantage, mask=batch.mask, fraction=fraction)
    penalty = {"surrogate_params": {"kl_coef": float(coefficient)}}
    return Terms(
        [
            Part(batch.weighted(chosen), "kl_cov", penalty),
            Part(batch.weighted(~chosen), "ppo_clip", {"epsilon": math.inf}),
        ]
    )


LOSSES: dict[str, Callable[[Batch, Any], Terms]] = {
    "rlcore_ppo": ppo,
    "rlcore_gspo": gspo,
    "rlcore_cispo": cispo,
    "rlcore_sapo": sapo,
    "rlcore_geo_mean": geo_mean,
    "rlcore_dppo_tv": _dppo("dppo_tv"),
    "rlcore_dppo_kl": _dppo("dppo_kl"),
    "rlcore_reinforce": reinforce,
    "rlcore_kl_cov": kl_cov,
}

# verl's name: (ours, which entry of config.global_batch_info is the count in the denominator)
AGGREGATION = {
    "token-mean": ("token-mean", "batch_num_tokens"),
    "token-sum": ("token-mean", None),
    **{mode: (mode, "global_batch_size") for mode in AGGREGATIONS if mode.startswith("seq-")},
}


def aggregation(loss_agg_mode: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """verl's mode and counts as options of `rl.policy_loss`.

    Each rank's loss is multiplied by dp_size, as the ranks' gradients will be averaged.

    Raises:
        ValueError: an unknown mode, or a global count that dp_size > 1 needs.
    """
    if loss_agg_mode not in AGGREGATION:
        raise ValueError(
            f"loss_agg_mode must be one of {', '.join(map(repr, AGGREGATION))}, got "
            f"{loss_agg_mode!r}"
        )
    mode, count = AGGREGATION[loss_agg_mode]
    ranks = info.get("dp_size") or 1
    total = 1 if count is None else info.get(count)
    if total is None and ranks > 1:
        raise ValueError(f"global_batch_info needs {count} where dp_size is {ranks}")
    options = {"loss_agg_mode": mode, "num_items": None if total is None else total / ranks}
    if mode == "seq-mean-token-sum-norm":
        options["norm_length"] = info.get("loss_scale_factor")
    return options


def make_policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The loss called `name` in LOSSES, with the parameters of verl's own."""
    make_terms = LOSSES[name]

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(f"{name} needs the actor's config, got None")
        mask = response_mask.bool()
        counted = (torch.where(mask, x, 0.0) for x in (log_prob, old_log_prob, advantages))
        batch = Batch(*counted, mask, rollout_is_weights)
        terms = make_terms(batch, config)
        options = aggregation(terms.loss_agg_mode or loss_agg_mode, config.global_batch_info)
        outputs = [_part_loss(part, options) for part in terms.parts]
        loss = sum(output.loss for output in outputs)
        clipped = terms.clipped
        if clipped is None:
            clipped = torch.stack([output.clipped for output in outputs]).any(0)
            if terms.clipped_lower is not None:
                clipped = clipped & ~terms.clipped_lower
        return loss, _metrics(batch, clipped, terms.clipped_lower)

    policy_loss.__name__ = policy_loss.__qualname__ = name
    policy_loss.__doc__ = make_terms.__doc__
    return policy_loss


def _part_loss(part: Part, options: Mapping[str, Any]):
    batch = part.batch
    return policy_loss_from_logp(
        batch.logp, batch.advantage, mask=batch.mask, surrogate=part.surrogate,
        old_logp=batch.old_logp if SURROGATES[part.surrogate].has_ratio else None,
        importance_sampling_ratio=batch.weight, **part.options, **options,
    )  # fmt: skip


def _metrics(batch: Batch, clipped: Tensor, clipped_lower: Tensor | None) -> dict[str, float]:
    """verl's own, fractions and means over the micro-batch's counted tokens, in one transfer."""
    if clipped_lower is None:
        clipped_lower = torch.zeros_like(batch.mask)
    dtype = batch.log_ratio.dtype
    values = torch.stack([clipped.to(dtype), -batch.log_ratio, clipped_lower.to(dtype)])
    means = torch.where(batch.mask, values, 0.0).flatten(1).sum(1) / batch.mask.sum().clamp(min=1)
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, means.tolist(), strict=True))
