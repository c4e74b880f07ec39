"""Who samples for a run, and what it is told of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.runs.checkpoint import last_checkpoint
from rlcore.sampling.rollout import Rollout, check_sampling
from rlcore.sampling.sampler import LocalSampler, Sampler, SamplingOptions
from rlcore.sampling.server import ServerGone
from rlcore.sampling.vllm import VLLMSampler, check_servers
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.run import Run, on_main
from rlcore.trainers.shared.weights import whole_weights


def check_sampler(config: SamplingConfig, model: Any) -> None:
    """Raise UserError where nobody could sample from the model."""
    if config.sampler == "local":
        check_sampling(model)
    else:
        vocabulary = len(model.get_input_embeddings().weight)
        check_servers(config.sampler_url, config.sampler_timeout, vocabulary)


def make_sampler(run: Run) -> Sampler:
    """The sampler that the run's options ask for."""
    config = run.config
    if config.sampler == "local":
        return LocalSampler(run.policy, run.tokenizer, full_length=run.is_sharded)
    return VLLMSampler(
        config.sampler_url,
        run.policy,
        run.tokenizer,
        timeout=config.sampler_timeout,
        max_requests=config.sampler_requests,
        weights_dir=config.sampler_weights_dir,
    )


def generated(run: Run, prompts: Sequence, seed: int = 0, **options: Any) -> Rollout | None:
    """Completions of the policy as it is now; None where its logits are no numbers.

    `options` are those of SamplingOptions that are not the run's own. Every process calls it.

    Raises:
        UserError: on every process where a server is gone or refuses on any.
    """
    config = run.config
    wanted = SamplingOptions(
        max_new_tokens=config.max_completion_length,
        max_prompt_length=config.max_prompt_length,
        **options,
    )
    try:
        if config.sampler == "local":
            return run.sampler.sample(prompts, wanted, seed)
        _sync(run)
        return _together(run, lambda: run.sampler.sample(prompts, wanted, seed))
    except FloatingPointError:
        return None


def _sync(run: Run) -> None:
    """Bring the weights to the servers; the main process does, and the others expect them."""
    weights = whole_weights(run) if run.sampler.step != run.step else None

    def bring() -> Any:
        _explained(run, lambda: run.sampler.sync(run.policy, run.step, weights))
        return run.sampler.share()

    run.sampler.follow(on_main(run.accelerator, bring), run.step)


def _together(run: Run, action: Any) -> Any:
    """What `action` gives; its UserError ends all processes."""
    result = failure = None
    try:
        result = _explained(run, action)
    except UserError as error:
        failure = error
    failed = torch.tensor(float(failure is not None), device=run.accelerator.device)
    if run.accelerator.reduce(failed, "sum").item():
        raise failure or UserError("the sampler of another process has failed")
    return result


def _explained(run: Run, action: Any) -> Any:
    """What `action` gives; where a server is gone the error says what is left of the run."""
    try:
        return action()
    except ServerGone as error:
        last = last_checkpoint(run.config.output_dir)
        left = f"{last} is intact, and --resume goes on from it" if last else "no step was saved"
        raise UserError(f"step {run.step + 1}: {error}; {left}") from error
