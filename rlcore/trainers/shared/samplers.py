"""Who samples for a run, and what it is told of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlcore.sampling.rollout import Rollout, check_sampling
from rlcore.sampling.sampler import LocalSampler, Sampler, SamplingOptions
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.run import Run


def check_sampler(config: SamplingConfig, model: Any) -> None:
    """Raise UserError where nobody could sample from the model."""
    check_sampling(model)


def make_sampler(run: Run) -> Sampler:
    """The sampler that the run's options ask for."""
    return LocalSampler(run.policy, run.tokenizer, full_length=run.is_sharded)


def generated(run: Run, prompts: Sequence, seed: int = 0, **options: Any) -> Rollout | None:
    """Completions of the policy as it is now; None where its logits are no numbers.

    `options` are those of SamplingOptions that are not the run's own. Every process calls it.
    """
    config = run.config
    run.sampler.sync(run.policy, run.step)
    wanted = SamplingOptions(
        max_new_tokens=config.max_completion_length,
        max_prompt_length=config.max_prompt_length,
        **options,
    )
    try:
        return run.sampler.sample(prompts, wanted, seed)
    except FloatingPointError:
        return None
