"""What the trainers ask of policies: log-probabilities of what was sampled, and how it is counted.

The policy that samples, the one that learns and the reference are asked the same way, in
micro-batches of completions of like length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rlcore as rl
from rlcore.kernels.formulas.kl import KL_BOUND
from rlcore.models.adapters import adapter_off
from rlcore.models.forward import evaluating
from rlcore.models.heads import Head, choose_head
from rlcore.models.loading import check_tokenizer, load_reference
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.order import mix_seed, summed
from rlcore.trainers.shared.run import Run


@dataclass(frozen=True)
class Policy:
    """A causal language model, as prepared, and how its losses are had."""

    model: Any
    head: Head
    adapter: bool = True  # False: with its adapter switched off

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """The model in evaluation mode and in the state that this policy is, for a while."""
        switched = contextlib.nullcontext() if self.adapter else adapter_off(self.model)
        with evaluating(self.model), switched:
            yield


def load_wanted_reference(config: SamplingConfig, tokenizer: Any) -> Any | None:
    """The frozen reference model; None where no term of the run asks for one of its own.

    Raises:
        UserError: nothing loadable there, or a reference that reads other tokens.
    """
    if not config.wants_reference or _reference_is_policy(config):
        return None
    if config.ref_model is not None:
        check_tokenizer("ref_model", config.ref_model, tokenizer, config.trust_remote_code)
    return load_reference(config.ref_model or config.model, **config.loading)


def _reference_is_policy(config: SamplingConfig) -> bool:
    """With its adapter off the policy is where it started from."""
    return config.peft is not None and config.ref_model is None


def as_reference(run: Run, model: Any | None) -> Policy | None:
    """What `load_wanted_reference` gave, on this run's device; None where none is wanted."""
    if not run.config.wants_reference:
        return None
    if model is None:
        return Policy(run.model, run.head, adapter=False)
    head, _ = choose_head(model, run.wants_fused_head)
    if run.is_sharded:
        return Policy(run.accelerator.prepare_model(model, evaluation_mode=True), head)
    # what the accelerator prepares would be in every checkpoint
    return Policy(model.to(run.accelerator.device), head)


def completion_logp(run: Run, policy: Policy, experience: Experience) -> torch.Tensor:
    """(N, C) log-probabilities of the completions; 0 where no loss will ask for them."""
    return completion_scores(run, policy, experience, entropy=False)[0]


@torch.no_grad()
def completion_scores(
    run: Run, policy: Policy, experience: Experience, *, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C) log-probabilities of the completions, and entropies or zeros; 0 where masked."""
    logp, entropies = torch.zeros(2, *experience.mask.shape, device=experience.mask.device)
    everything = torch.arange(len(experience), device=logp.device)
    with policy.asked():
        for rows in micro_batches(run, experience, everything):
            part = experience.take(rows).trimmed()
            with run.accelerator.autocast():
                scores = policy.head.token_logprob(
                    policy.model, part, temperature=run.config.temperature, entropy=entropy
                )
            logp[rows, : part.completion_length] = scores.logp.to(logp.dtype)
            if entropy:
                entropies[rows, : part.completion_length] = scores.entropy.to(logp.dtype)
    return logp, entropies


def micro_batches(run: Run, experience: Experience, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`rows` (M,) in micro-batches of like length, the longest first."""
    by_length = experience.lengths()[rows].argsort(descending=True, stable=True)
    return rows[by_length].split(run.config.per_device_train_batch_size)


def shuffled_rows(run: Run, experience: Experience, seed: int) -> Sequence[torch.Tensor]:
    """One pass over the experience: the rows of each of its optimizer steps."""
    generator = torch.Generator().manual_seed(mix_seed(seed, run.accelerator.process_index))
    order = torch.randperm(len(experience), generator=generator).to(experience.mask.device)
    config = run.config
    return order.split(config.per_device_train_batch_size * config.gradient_accumulation_steps)


def counted_items(
    run: Run, mask: torch.Tensor, loss_agg_mode: str, *, all_processes: bool = True
) -> float:
    """The denominator of a loss over `mask` (M, C): its tokens, or its sequences.

    Of all processes, over the number of processes, because their gradients are averaged; or of
    this process alone.
    """
    count = float((mask if loss_agg_mode == "token-mean" else mask.any(1)).sum())
    if all_processes:
        count = summed(run.accelerator, count) / run.accelerator.num_processes
    return max(count, 1.0)


def bounded_kl(part: Experience, result: rl.PolicyLoss) -> torch.Tensor | None:
    """(B, C) indicators of the tokens whose k3 is the tangent at its bound; None without a KL."""
    return None if result.kl is None else part.ref_logp - result.logp > KL_BOUND


def clip_ratios(part: Experience, result: rl.PolicyLoss) -> dict[str, torch.Tensor]:
    """(B, C) indicators of the tokens whose gradient the clip holds at 0, by its side."""
    rose = (
        torch.zeros_like(result.clipped) if part.old_logp is None else result.logp > part.old_logp
    )
    return {
        "clip_ratio/low_mean": result.clipped & ~rose,
        "clip_ratio/high_mean": result.clipped & rose,
        "clip_ratio/region_mean": result.clipped,
    }
