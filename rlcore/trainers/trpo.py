"""Trust region policy optimization (TRPO: Schulman et al. 2015, arXiv:1502.05477).

    maximise L = mean over tokens of ratio * A    subject to mean KL(old || new) <= delta

One step a generation batch: g, the gradient of L; s = (F + damping I)^-1 g by conjugate gradient;
sqrt(2 delta / s^T F s) s, shortened until L does rise and the exact KL does hold, or not taken at
all. Left out: sharded models, and a KL to a reference.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

import torch

import rlcore as rl
from rlcore.errors import UserError
from rlcore.models.forward import CompletionLogits
from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.schedules import learning_rate_scale
from rlcore.trainers.options.trpo import ADVANTAGES, TRPOConfig, check_trpo_config
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.credit import judged_only, token_reward
from rlcore.trainers.shared.critic import (
    Critic,
    clipped_value_loss,
    explained_variance,
    predict_values,
    value_step,
)
from rlcore.trainers.shared.divergence import require_finite
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.given import Given, Unpack
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.natural_gradient import (
    Fisher,
    Policy,
    dot,
    natural_step,
    search_step,
    supports_forward_ad,
)
from rlcore.trainers.shared.online import prepare_online
from rlcore.trainers.shared.order import mix_seed, summed
from rlcore.trainers.shared.policies import counted_items, micro_batches
from rlcore.trainers.shared.run import Result, Run

__all__ = ["TRPOConfig", "train_trpo"]

DISPLAYED = ("reward", "trpo/kl", "entropy", "tokens_per_second")


def train_trpo(
    config: TRPOConfig,
    *,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    **given: Unpack[Given],
) -> Result:
    """Train `config.model` on rows of {"prompt", ...} to please the reward functions.

    Args:
        reward_funcs: functions besides those that `config.reward` names; one, or several, or names.
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`, a value model below it.

    Raises:
        UserError: options, data, models or reward functions that do not work. TrainingDiverged: a
        loss or gradient that is not finite.
    """
    value = config.baseline == "value"
    online = prepare_online(
        config, reward_funcs, given, check_trpo_config,
        critic=value, frozen=None, prepare=_freeze_others,
    )  # fmt: skip
    run, critic = online.run, online.critic
    policy = _policy(run)
    with online.started("TRPO", DISPLAYED):
        for step in run.steps():
            sampled = online.sample(step - 1)
            experience = _experience(run, critic, sampled)
            trained = _update(run, step, policy, experience, online.seed(step - 1))
            if critic is not None:
                trained |= _fit_values(run, critic, step, experience)
            online.log(step, sampled.metrics, trained)
            online.save(step)
        return online.finish()


def _freeze_others(run: Run) -> None:
    """Freeze what `trained_parameters` does not name, before anything is written.

    Raises:
        UserError: a sharded model, nothing left to train, or a model without forward derivatives.
    """
    patterns = run.config.trained_parameters
    if run.is_sharded:
        raise UserError("TRPO needs each process to hold the whole model: run it without sharding")
    for name, parameter in run.policy.named_parameters():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    policy = _policy(run)
    if not policy.parameters:
        raise UserError(f"trained_parameters {' '.join(patterns)}: no trainable parameter of that")
    ids = torch.ones(1, 3, dtype=torch.int64, device=run.accelerator.device)
    reason = supports_forward_ad(policy, Experience(ids, ids, ids[:, 1:].bool()))
    if reason is not None:
        raise UserError(f"{type(run.policy).__name__} has no forward derivative: {reason}")


def _policy(run: Run) -> Policy:
    """The policy and its trainable parameters, as one for all processes."""
    model = CompletionLogits(run.policy)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def reduce(totals: list[torch.Tensor]) -> list[torch.Tensor]:
        return run.accelerator.reduce(totals, "sum")

    return Policy(model, trained, run.config.temperature, reduce)


def _experience(run: Run, critic: Critic | None, sampled: Sampled) -> Experience:
    """What was sampled, with its advantages; with a value model also values and returns."""
    config = run.config
    experience, score = judged_only(sampled)
    if critic is None:
        advantage = ADVANTAGES[config.baseline](sampled.all_scores, config)
        return _with_advantage(experience, sampled.mine(advantage))
    value, _ = predict_values(run, critic, experience)
    advantage, returns = rl.gae(
        token_reward(experience, score, 0.0),
        value,
        gamma=config.gamma,
        lam=config.lam,
        mask=experience.mask,
    )
    experience = dataclasses.replace(experience, value=value, returns=returns)
    return _with_advantage(experience, advantage)


def _with_advantage(experience: Experience, advantage: torch.Tensor) -> Experience:
    """Importance weights go into the advantages, in which gradient and line search are linear."""
    if experience.importance_ratio is not None:
        advantage = advantage.view(len(experience), -1) * experience.importance_ratio
    return dataclasses.replace(experience, advantage=advantage)


def _update(
    run: Run, step: int, policy: Policy, experience: Experience, seed: int
) -> dict[str, float]:
    """One step of the policy within its trust region; its metrics."""
    config = run.config
    run.step = step
    run.phase("updating")
    everything = torch.arange(len(experience), device=experience.mask.device)
    batches = _parts(run, experience, everything)
    some = _parts(run, experience, _fisher_rows(run, everything, seed))
    count = _count(run, batches)
    gradient, metrics = _surrogate_gradient(run, step, policy, batches, count)
    # the schedule is that of the step's length, and delta goes with its square
    delta = config.delta * learning_rate_scale(config, step, run.total_steps) ** 2
    proposed = natural_step(
        gradient,
        Fisher(policy, some, _count(run, some)),
        Fisher(policy, batches, count),
        delta=delta,
        damping=config.cg_damping,
        max_iter=config.cg_iterations,
        tol=config.cg_tolerance,
    )
    require_finite(run, step, {"trpo/expected_improvement": proposed.expected})
    search = search_step(
        policy,
        proposed.step,
        batches,
        count,
        delta=delta,
        shrink=config.line_search_shrink,
        max_trials=config.line_search_steps,
    )
    return metrics | {
        "trpo/expected_improvement": proposed.expected,
        "trpo/improvement": search.improvement,
        "trpo/delta": delta,
        "trpo/kl": search.kl,
        "trpo/first_kl": search.trials[0].kl,
        "trpo/step_fraction": search.step or 0.0,
        "trpo/line_search_steps": len(search.trials),
        "trpo/step_norm": math.sqrt(dot(proposed.step, proposed.step)) * (search.step or 0.0),
        "trpo/cg_residual": proposed.residual,
        "trpo/cg_iterations": proposed.iterations,
    }


def _parts(run: Run, experience: Experience, rows: torch.Tensor) -> list[Experience]:
    """The rows in micro-batches."""
    return [experience.take(batch).trimmed() for batch in micro_batches(run, experience, rows)]


def _fisher_rows(run: Run, rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The rows that the direction's Fisher matrix is averaged over."""
    wanted = run.config.fisher_rows
    if wanted is None or wanted >= len(rows):
        return rows
    generator = torch.Generator().manual_seed(mix_seed(seed, run.accelerator.process_index))
    return rows[torch.randperm(len(rows), generator=generator)[:wanted].to(rows.device)]


def _count(run: Run, batches: Sequence[Experience]) -> float:
    """The counted tokens of all processes."""
    return max(summed(run.accelerator, float(sum(part.mask.sum() for part in batches))), 1.0)


def _surrogate_gradient(
    run: Run, step: int, policy: Policy, batches: Sequence[Experience], count: float
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """(g, {"grad_norm", "entropy"}): where the policy is the old one, the policy gradient."""
    parameters = list(policy.parameters.values())
    total = policy.zeros()
    means = Means()
    for part in batches:
        with run.accelerator.autocast():
            result = run.head.policy_loss(
                run.policy,
                part,
                part.advantage,
                surrogate="reinforce",
                temperature=policy.temperature,
                num_items=count,
            )
        means.add(part.mask, entropy=result.entropy)
        gradient = torch.autograd.grad(result.loss, parameters, allow_unused=True)
        for sum_so_far, addend in zip(total, gradient, strict=True):
            if addend is not None:
                sum_so_far -= addend
    total = policy.reduce(total)
    grad_norm = math.sqrt(dot(total, total))
    require_finite(run, step, {"grad_norm": grad_norm})
    return total, {"grad_norm": grad_norm} | means.reduce(run.accelerator)


def _fit_values(run: Run, critic: Critic, step: int, experience: Experience) -> dict[str, float]:
    """Fit the value model to the returns, `num_value_epochs` times."""
    num_items = counted_items(run, experience.mask, "token-mean")
    rows = torch.arange(len(experience), device=experience.mask.device)
    batches = micro_batches(run, experience, rows)

    def value_loss(batch: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return clipped_value_loss(value, experience.take(batch).trimmed(), None, num_items)

    for _ in range(run.config.num_value_epochs):
        fitted = value_step(critic, step, experience, batches, value_loss)
    return fitted | {"value/explained_variance": explained_variance(run, experience)}
