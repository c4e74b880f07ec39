"""Tokens that the surrogate leaves out of an optimizer step, by the policy as it is before it.

off_policy_mask_threshold   sequences of negative advantage that the policy has left behind (OPSM)
second_moment_threshold     tokens of the largest ratios, by the mean of (log r)^2 (M2PO)
top_entropy_quantile        all but the tokens where the policy is least certain

loss_type fipo              no mask, but a weight by what the policy has come to favour later on

They need the policy's log-probabilities and entropies of the whole step before its first
micro-batch: one more forward pass, except where only ratios matter and all of them are 1. What is
left out still counts in the denominator, and in the KL and the entropy bonus.
"""

from __future__ import annotations

import dataclasses

import torch

from rlcore.functional.corrections import future_kl_weight
from rlcore.functional.masks import high_entropy_mask, off_policy_mask, second_moment_mask
from rlcore.trainers.options.grpo import GRPOConfig, loss_type_of
from rlcore.trainers.shared.credit import everywhere, mine
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.policies import Policy, completion_scores
from rlcore.trainers.shared.run import Run


def masked(
    run: Run, experience: Experience, rows: torch.Tensor
) -> tuple[Experience, dict[str, float]]:
    """The experience with factors 0 of the surrogate on `rows` (R,), and the shares left out.

    Every process calls it, with as many rows.
    """
    config = run.config
    part = experience.take(rows)
    old_logp = part.old_logp if config.sampler == "local" else part.sampling_logp
    by_entropy = config.top_entropy_quantile < 1
    by_ratio = config.weighs_ratios and old_logp is not None
    if not (by_entropy or by_ratio):
        return experience, {}
    logp, entropy = completion_scores(run, Policy(run.model, run.head), part, entropy=by_entropy)
    keep = {}
    if by_ratio:
        keep |= _by_ratio(run, config, part, logp, old_logp)
    if by_entropy:
        everyone = high_entropy_mask(
            everywhere(run, entropy),
            everywhere(run, part.mask),
            top_entropy_quantile=config.top_entropy_quantile,
        )
        keep["low_entropy"] = mine(run, everyone, part.mask)
    ratio = experience.importance_ratio
    ratio = torch.ones_like(experience.mask, dtype=logp.dtype) if ratio is None else ratio.clone()
    for kept in keep.values():
        ratio[rows] = ratio[rows] * kept
    if by_ratio and loss_type_of(config.loss_type).future_kl:
        ratio[rows] = ratio[rows] * _future_kl(config, logp, old_logp, part.mask)
    shares = {f"masked/{name}": _share(run, part.mask, kept) for name, kept in keep.items()}
    return dataclasses.replace(experience, importance_ratio=ratio), shares


def _future_kl(
    config: GRPOConfig, logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    reach = config.fipo_clip_range
    low = 1.0 if config.fipo_clip_high_only else 1.0 - reach
    return future_kl_weight(
        logp, old_logp, mask, half_life=config.fipo_decay_rate, low=low, high=1.0 + reach
    )


def _by_ratio(
    run: Run, config: GRPOConfig, part: Experience, logp: torch.Tensor, old_logp: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tokens (R, C) that each mask of ratios keeps."""
    advantage = part.advantage
    advantage = advantage[:, None].expand_as(logp) if advantage.dim() == 1 else advantage
    given = (logp, old_logp, advantage, part.mask)
    keep = {}
    if config.off_policy_mask_threshold is not None:
        keep["off_policy"] = off_policy_mask(*given, threshold=config.off_policy_mask_threshold)
    if config.second_moment_threshold is not None:
        everyone = second_moment_mask(
            *(everywhere(run, each) for each in given), threshold=config.second_moment_threshold
        )
        keep["second_moment"] = mine(run, everyone, part.mask)
    return keep


def _share(run: Run, mask: torch.Tensor, kept: torch.Tensor) -> float:
    """The share of all processes' counted tokens that is not kept."""
    counts = torch.stack([(mask & ~kept).sum(), mask.sum()]).double()
    dropped, counted = run.accelerator.reduce(counts, "sum").tolist()
    return dropped / max(counted, 1.0)
