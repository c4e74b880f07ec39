"""How far what was sampled is from the trainer's policy, and the weights that correct for it."""

from __future__ import annotations

import dataclasses
import math

import torch

from rlcore.errors import UserError
from rlcore.functional.corrections import importance_weights
from rlcore.functional.masks import rejection_mask
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.policies import Policy, completion_logp
from rlcore.trainers.shared.run import Run


def compared(run: Run, experience: Experience) -> tuple[Experience, dict[str, float]]:
    """The experience with the trainer's log-probabilities as old_logp, and what they correct.

    Returns also the metrics of how far the sampler's log-probabilities are from them. Where this
    process samples and no correction is asked for, the experience comes as it is, without metrics.

    Raises:
        UserError: on every process, where a server's differ by more than sampler_tolerance on
            average although it truncates nothing.
    """
    config = run.config
    if config.sampler == "local" and config.correction == "none" and config.rejection is None:
        return experience, {}
    logp = completion_logp(run, Policy(run.model, run.head), experience)
    experience = dataclasses.replace(experience, old_logp=logp)
    metrics = _differences(run, experience)
    _check_sampler_is_policy(run, metrics["sampling/logp_difference/mean"])
    if config.sampler != "local":
        metrics["sampling/resampled"] = _everyone(run, float(run.sampler.resampled))[:, 0].sum()
    if config.correction != "none" or config.rejection is not None:
        experience, ratios = _corrected(run, experience)
        metrics |= ratios
    return experience, {name: float(value) for name, value in metrics.items()}


def _differences(run: Run, experience: Experience) -> dict[str, torch.Tensor]:
    """Mean and maximum of |logp - sampling_logp| over the counted tokens of all processes."""
    difference = (experience.old_logp - experience.sampling_logp).abs()
    difference = torch.where(experience.mask, difference, 0.0)
    own = (difference.double().sum(), experience.mask.sum(), difference.amax())
    total, count, largest = _everyone(run, *own).unbind(1)
    return {
        "sampling/logp_difference/mean": total.sum() / count.sum().clamp(min=1),
        "sampling/logp_difference/max": largest.max(),
    }


def _check_sampler_is_policy(run: Run, mean: torch.Tensor) -> None:
    config = run.config
    # truncated, a token is drawn with more than its share of the whole vocabulary
    is_comparable = config.sampler != "local" and config.top_p == 1 and config.top_k == 0
    # a NaN is no number within the tolerance
    if is_comparable and not mean <= config.sampler_tolerance:
        raise UserError(
            f"step {run.step + 1}: the log-probabilities of sampler and trainer differ by "
            f"{mean:.3g} on average, more than sampler_tolerance ({config.sampler_tolerance:g}): "
            "the server does not sample from this policy. Start it with `rlcore serve`; if it "
            "computes in lower precision, raise --sampler-tolerance"
        )


def _corrected(run: Run, experience: Experience) -> tuple[Experience, dict[str, torch.Tensor]]:
    """The experience with its importance weights, and their metrics over all counted tokens.

    What is rejected has weight 0.
    """
    config, mask = run.config, experience.mask
    corrects = config.correction != "none"
    level, mode = config.correction.split("_") if corrects else ("token", "truncate")

    def weights(mode: str, low: float, high: float) -> torch.Tensor:
        options = {"mask": mask, "level": level, "mode": mode, "low": low, "high": high}
        return importance_weights(experience.old_logp, experience.sampling_logp, **options)

    ratio = weights("truncate", 0.0, math.inf)
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    weight = weights(mode, low, high) if corrects else mask.to(ratio.dtype)
    bounded = (weight[mask] != ratio[mask]).sum() if corrects else 0
    keep = _kept(config, experience)
    weight = weight * keep
    used, counted = weight[mask].double(), ratio[mask].double()
    smallest = counted.min() if len(counted) else math.inf
    largest = counted.max() if len(counted) else 0.0
    own = (len(counted), counted.sum(), smallest, largest, bounded, used.sum())
    own += (used.square().sum(), (mask & ~keep).sum())
    count, total, smallest, largest, bounded, sums, squares, lost = _everyone(run, *own).unbind(1)
    tokens = count.sum().clamp(min=1)
    metrics = {
        "sampling/importance_ratio/mean": total.sum() / tokens,
        "sampling/importance_ratio/min": smallest.min().clamp(max=largest.max()),
        "sampling/importance_ratio/max": largest.max(),
        # truncated or dropped
        "sampling/importance_ratio/bounded": bounded.sum() / tokens,
        # as a share of the tokens, by Kish: (sum of weights)^2 / (tokens * sum of their squares)
        "sampling/effective_sample_size": sums.sum() ** 2
        / (tokens * squares.sum()).clamp(min=1e-12),
    }
    if config.rejection is not None:
        metrics["sampling/rejected"] = lost.sum() / tokens
    return dataclasses.replace(experience, importance_ratio=weight), metrics


def _kept(config: SamplingConfig, experience: Experience) -> torch.Tensor:
    """(N, C) bool: the counted tokens that rejection keeps."""
    if config.rejection is None:
        return experience.mask
    level, *reduction, kind = config.rejection.split("_")
    return rejection_mask(
        experience.old_logp,
        experience.sampling_logp,
        experience.mask,
        kind=kind,
        level=level,
        reduction=reduction[0] if reduction else None,
        lower=config.rejection_lower,
        upper=config.rejection_upper,
    )


def _everyone(run: Run, *values: float | torch.Tensor) -> torch.Tensor:
    """(processes, values) float64, on the CPU."""
    device = run.accelerator.device
    own = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return run.accelerator.gather(torch.stack(own)[None]).cpu()
