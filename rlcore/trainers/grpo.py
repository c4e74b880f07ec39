"""Group relative policy optimization (GRPO: Shao et al. 2024, arXiv:2402.03300) and its kin.

    A_i  = (r_i - mean of the prompt's group) / std of the group
    loss = - mean over tokens of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
           + beta * KL(policy || reference) - entropy_coef * entropy

Left out: an inference server and tool calls. Where nothing but the surrogate moves the policy
(beta = entropy_coef = 0), completions of advantage 0 are counted, but not computed: entropy and
clip ratios are then means over the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import rlcore as rl
from rlcore.data import load_rows
from rlcore.heads import Head, choose_head
from rlcore.models import load_policy, load_reference, load_tokenizer
from rlcore.rewards import RewardFunction
from rlcore.rollout import evaluating
from rlcore.trainers.common import (
    Result,
    Run,
    batch_indices,
    finish_run,
    make_accelerator,
    mix_seed,
    optimizer_step,
    save_if_due,
    start_run,
    summed,
    total_steps,
    tracking,
    wants_evaluation,
)
from rlcore.trainers.experience import Experience
from rlcore.trainers.grpo_config import LOSS_TYPES, GRPOConfig, check_grpo_config
from rlcore.trainers.metrics import Clock, Log, Means
from rlcore.trainers.sampling import collect, evaluate, make_judge

__all__ = ["GRPOConfig", "train_grpo"]

DISPLAYED = ("reward", "kl", "entropy", "tokens_per_second")


def train_grpo(
    config: GRPOConfig,
    *,
    reward_funcs: Sequence[RewardFunction] | None = None,
    tracker: Any | None = None,
) -> Result:
    """Train `config.model` on rows of {"prompt", ...} to please the reward functions.

    Args:
        reward_funcs: functions besides those that `config.reward` names.
        tracker: an open Tracker to log to; None makes one in `config.output_dir`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options, data or reward functions that do not work. TrainingDiverged: a loss or
        gradient that is not finite.
    """
    judge = make_judge(config.reward, reward_funcs or (), config.reward_weights)
    check_grpo_config(config, len(judge.functions))
    accelerator = make_accelerator(config)
    tokenizer = load_tokenizer(config.model)
    rows = load_rows(config.dataset)
    held_out = None if config.eval_dataset is None else load_rows(config.eval_dataset)
    model = load_policy(
        config.model, gradient_checkpointing=config.gradient_checkpointing, dropout=False
    )
    # without a KL term nothing asks for the reference's opinion
    reference = load_reference(config.ref_model or config.model) if config.beta else None
    prompts = config.prompts_per_process * accelerator.num_processes  # in a generation batch
    updates = config.num_iterations * config.updates_per_pass  # optimizer steps that it serves
    run = start_run(
        config, accelerator, model, tokenizer, total_steps(config, len(rows), prompts / updates)
    )
    reference = _prepared(run, reference)
    with tracking(run, tracker, "GRPO", DISPLAYED) as tracker:
        log, clock, step = Log(run, tracker), Clock(), run.first_step
        if held_out is not None and step == 0:
            log.write(0, evaluate(run, held_out, judge))
            clock.skip()
        while step < run.total_steps:
            number = step // updates
            chosen = rows[batch_indices(len(rows), prompts, number, config.seed)]
            seed = mix_seed(config.seed, number)
            experience, sampled = collect(run, chosen, judge, seed)
            experience = _with_other_policies(run, experience, reference)
            tokens = sampled.pop("tokens")
            for trained in _updates(run, step, experience, seed):
                step += 1
                metrics = sampled | trained | clock.lap(tokens) | {"num_tokens": run.num_tokens}
                metrics["epoch"] = step / updates * prompts / len(rows)
                if held_out is not None and wants_evaluation(run, step):
                    metrics |= evaluate(run, held_out, judge)
                log.add(step, metrics)
                clock.skip()
                tokens = 0
            # Between generation batches alone, so that a resumed run starts with a fresh one.
            save_if_due(run, step, updates)
        return finish_run(run, log)


def _prepared(run: Run, reference: Any | None) -> tuple[Any, Head] | None:
    """The frozen reference on this device, with its head; None where there is none."""
    if reference is None:
        return None
    head, _ = choose_head(reference, run.wants_fused_head)
    return run.accelerator.prepare_model(reference, evaluation_mode=True), head


def _with_other_policies(
    run: Run, experience: Experience, reference: tuple[Any, Head] | None
) -> Experience:
    """The log-probabilities under the reference, and under the present policy where it will move.

    With one update a pass the first pass meets the policy that sampled, and hands out its
    log-probabilities itself.
    """
    ref_logp = old_logp = None
    if reference is not None:
        ref_logp = _logp(run, *reference, experience)
    if run.config.updates_per_pass > 1:
        old_logp = _logp(run, run.model, run.head, experience)
    return dataclasses.replace(experience, old_logp=old_logp, ref_logp=ref_logp)


@torch.no_grad()
def _logp(run: Run, model: Any, head: Head, experience: Experience) -> torch.Tensor:
    """(N, C) log-probabilities of the completions; 0 where no loss will ask for them."""
    logp = torch.zeros(experience.mask.shape, device=experience.mask.device)
    everything = torch.arange(len(experience), device=logp.device)
    with evaluating(model):
        for rows in _micro_batches(run, experience, everything):
            part = experience.take(rows).trimmed()
            with run.accelerator.autocast():
                scores = head.token_logprob(
                    model, part, temperature=run.config.temperature, entropy=False
                )
            logp[rows, : part.completion_length] = scores.logp.to(logp.dtype)
    return logp


def _updates(run: Run, step: int, experience: Experience, seed: int) -> Iterator[dict[str, float]]:
    """Go through the batch num_iterations times, one optimizer step an item; yields its metrics."""
    config = run.config
    generator = torch.Generator().manual_seed(mix_seed(seed, run.accelerator.process_index))
    order = torch.randperm(len(experience), generator=generator).to(experience.mask.device)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    for rows in config.num_iterations * order.split(size):
        if step == run.total_steps:
            return
        step += 1
        logp, metrics = _update(run, step, experience, rows)
        yield metrics
        if experience.old_logp is None:
            experience = dataclasses.replace(experience, old_logp=logp)


def _update(
    run: Run, step: int, experience: Experience, rows: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step on `rows`: the policy's (N, C) logp there, before it, and the metrics."""
    means = Means()
    logp = torch.zeros(experience.mask.shape, device=experience.mask.device)
    num_items = _num_items(run, experience.mask[rows])

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        result = _loss(run, part, num_items)
        logp[batch, : part.completion_length] = result.logp.to(logp.dtype)
        means.add(part.mask, entropy=result.entropy, kl=result.kl, **_clip_ratios(part, result))
        return result.loss

    trained = optimizer_step(run, step, _micro_batches(run, experience, rows), loss_of)
    return logp, trained | means.reduce(run.accelerator)


def _micro_batches(run: Run, experience: Experience, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`rows` in micro-batches of like length, without those that would give no gradient."""
    if run.config.surrogate_alone and not run.is_sharded:
        useful = rows[experience.has_gradient()[rows]]
        # One row stays at least: every process must take part in the backward pass.
        rows = useful if len(useful) else rows[:1]
    by_length = experience.lengths()[rows].argsort(descending=True, stable=True)
    return rows[by_length].split(run.config.per_device_train_batch_size)


def _num_items(run: Run, mask: torch.Tensor) -> float:
    """The loss's denominator: tokens or sequences counted in the whole optimization batch.

    Over the number of processes, because their gradients are averaged.
    """
    loss_type = LOSS_TYPES[run.config.loss_type]
    counted = mask if loss_type.loss_agg_mode == "token-mean" else mask.any(1)
    count = float(counted.sum())
    if loss_type.all_processes:
        count = summed(run.accelerator, count) / run.accelerator.num_processes
    return max(count, 1.0)


def _loss(run: Run, part: Experience, num_items: float) -> rl.PolicyLoss:
    config = run.config
    loss_type = LOSS_TYPES[config.loss_type]
    options = dict(
        old_logp=part.old_logp,
        ref_logp=part.ref_logp,
        surrogate=loss_type.surrogate,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        importance_sampling_level=config.importance_sampling_level,
        loss_agg_mode=loss_type.loss_agg_mode,
        num_items=num_items,
        norm_length=config.max_completion_length if loss_type.fixed_length else None,
    )
    with run.accelerator.autocast():
        return run.head.policy_loss(run.model, part, part.advantage, **options)


def _clip_ratios(part: Experience, result: rl.PolicyLoss) -> dict[str, torch.Tensor]:
    """(B, C) indicators of the tokens whose gradient the clip holds at 0, by its side."""
    rose = (
        torch.zeros_like(result.clipped) if part.old_logp is None else result.logp > part.old_logp
    )
    return {
        "clip_ratio/low_mean": result.clipped & ~rose,
        "clip_ratio/high_mean": result.clipped & rose,
        "clip_ratio/region_mean": result.clipped,
    }
