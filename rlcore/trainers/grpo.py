"""Group relative policy optimization (GRPO: Shao et al. 2024, arXiv:2402.03300) and its kin.

    A_i  = (r_i - mean of the prompt's group) / std of the group
    loss = - mean over tokens of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
           + beta * KL(policy || reference) - entropy_coef * entropy

Left out: tool calls. Where nothing but the surrogate moves the policy
(beta = entropy_coef = 0), completions of advantage 0 are counted, but not computed: entropy and
clip ratios are then means over the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

import rlcore as rl
from rlcore.functional.advantages import decoupled_group_advantage, group_advantage
from rlcore.kernels.rows.policy_inputs import DEFAULTS
from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.grpo import GRPOConfig, check_grpo_config, loss_type_of
from rlcore.trainers.shared.collect import Sampled, note_advantages
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.given import Given, Unpack
from rlcore.trainers.shared.judging import Judge
from rlcore.trainers.shared.masking import masked
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.online import prepare_online
from rlcore.trainers.shared.policies import (
    Policy,
    bounded_kl,
    clip_ratios,
    completion_logp,
    counted_items,
    micro_batches,
    shuffled_rows,
)
from rlcore.trainers.shared.run import Result, Run
from rlcore.trainers.shared.stepping import optimizer_step

__all__ = ["GRPOConfig", "train_grpo"]

DISPLAYED = ("reward", "kl", "entropy", "tokens_per_second")


def train_grpo(
    config: GRPOConfig,
    *,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    **given: Unpack[Given],
) -> Result:
    """Train `config.model` on rows of {"prompt", ...} to please the reward functions.

    Args:
        reward_funcs: functions besides those that `config.reward` names; one, or several, or names.
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options, data or reward functions that do not work. TrainingDiverged: a loss or
        gradient that is not finite.
    """
    online = prepare_online(config, reward_funcs, given, check_grpo_config)
    run, step = online.run, online.run.first_step
    with online.started("GRPO", DISPLAYED):
        while step < run.total_steps:
            number = step // online.steps
            sampled = online.sample(number)
            experience = _with_other_policies(run, sampled.experience, online.reference)
            advantage = _advantage(run.config, online.judge, sampled)
            experience = dataclasses.replace(experience, advantage=sampled.mine(advantage))
            note_advantages(run, experience.advantage)
            for trained in _updates(run, step, experience, online.seed(number)):
                step += 1
                online.log(step, sampled.metrics, trained)
            online.save(step)
        return online.finish()


def _advantage(config: GRPOConfig, judge: Judge, sampled: Sampled) -> torch.Tensor:
    """(M,) advantages of all processes' completions."""
    count = config.num_generations
    if config.multi_objective_aggregation == "normalize_then_sum":
        weight = None if judge.weights is None else torch.tensor(judge.weights)
        return decoupled_group_advantage(sampled.all_rewards, count, weight=weight)
    return group_advantage(sampled.all_scores, count, scale_rewards=config.scale_rewards)


def _with_other_policies(run: Run, experience: Experience, reference: Policy | None) -> Experience:
    """The log-probabilities under the reference, and under the present policy where it will move.

    With one update a pass the first pass meets the policy that sampled, and hands out its
    log-probabilities itself.
    """
    ref_logp, old_logp = None, experience.old_logp
    if reference is not None:
        ref_logp = completion_logp(run, reference, experience)
    if old_logp is None and run.config.updates_per_pass > 1:
        old_logp = completion_logp(run, Policy(run.model, run.head), experience)
    return dataclasses.replace(experience, old_logp=old_logp, ref_logp=ref_logp)


def _updates(run: Run, step: int, experience: Experience, seed: int) -> Iterator[dict[str, float]]:
    """Go through the batch num_iterations times, one optimizer step an item; yields its metrics."""
    config = run.config
    for rows in config.num_iterations * shuffled_rows(run, experience, seed):
        if step == run.total_steps:
            return
        step += 1
        logp, metrics = update_policy(run, step, experience, rows)
        yield metrics
        if experience.old_logp is None:
            experience = dataclasses.replace(experience, old_logp=logp)


def update_policy(
    run: Run, step: int, experience: Experience, rows: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step on `rows`: the policy's (N, C) logp there, before it, and the metrics."""
    means, config = Means(), run.config
    logp = torch.zeros(experience.mask.shape, device=experience.mask.device)
    num_items = _num_items(run, experience.mask[rows])
    experience, shares = masked(run, experience, rows)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        result = surrogate_loss(run, part, num_items)
        logp[batch, : part.completion_length] = result.logp.to(logp.dtype)
        means.add(part.mask, entropy=result.entropy, kl=result.kl, **clip_ratios(part, result))
        if config.kl_estimator == "k3":
            means.add(part.mask, **{"kl/bounded": bounded_kl(part, result)})
        return result.loss

    trained = optimizer_step(run, step, _useful_batches(run, experience, rows), loss_of)
    return logp, trained | shares | means.reduce(run.accelerator)


def _useful_batches(run: Run, experience: Experience, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """`rows` in micro-batches, without those that would give no gradient."""
    if run.config.surrogate_alone and not run.is_sharded:
        useful = rows[experience.has_gradient()[rows]]
        # One row stays at least: every process must take part in the backward pass.
        rows = useful if len(useful) else rows[:1]
    return micro_batches(run, experience, rows)


def _num_items(run: Run, mask: torch.Tensor) -> float:
    """The loss's denominator, after the loss type's own idea of what counts."""
    loss_type = loss_type_of(run.config.loss_type)
    return counted_items(run, mask, loss_type.loss_agg_mode, all_processes=loss_type.all_processes)


def surrogate_loss(run: Run, part: Experience, num_items: float) -> rl.PolicyLoss:
    config = run.config
    loss_type = loss_type_of(config.loss_type)
    named = {name: getattr(config, name) for name in DEFAULTS if hasattr(config, name)}
    options = named | dict(
        old_logp=part.old_logp if config.surrogate.has_ratio else None,
        ref_logp=part.ref_logp,
        importance_sampling_ratio=part.importance_ratio,
        surrogate=loss_type.surrogate,
        importance_sampling_level=config.level,
        loss_agg_mode=loss_type.loss_agg_mode,
        num_items=num_items,
        norm_length=config.max_completion_length if loss_type.fixed_length else None,
    )
    with run.accelerator.autocast():
        return run.head.policy_loss(run.model, part, part.advantage, **options)
