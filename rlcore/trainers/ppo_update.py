"""One optimizer step of PPO: the losses of policy and value model, and what is measured of them."""

from __future__ import annotations

from typing import Any

import torch

import rlcore as rl
from rlcore.trainers.options.ppo import KL_MODES
from rlcore.trainers.shared.critic import Critic, actor_critic_step, clipped_value_loss, value_step
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.policies import clip_ratios, counted_items, micro_batches
from rlcore.trainers.shared.run import Run


def update(
    run: Run,
    critic: Critic,
    step: int,
    experience: Experience,
    rows: torch.Tensor,
    penalty_coef: float,
) -> dict[str, float]:
    """One optimizer step of policy and value model on `rows`; its metrics are from before it."""
    means = Means()
    num_items = counted_items(run, experience.mask[rows], "token-mean")

    def policy_loss(batch: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        result = _policy_loss(run, part, num_items, penalty_coef)
        means.add(part.mask, **_policy_metrics(part, result))
        return result.loss

    trained = actor_critic_step(
        run,
        critic,
        step,
        experience,
        micro_batches(run, experience, rows),
        policy_loss,
        _value_loss(run, experience, num_items, means),
    )
    metrics = trained | means.reduce(run.accelerator)
    metrics["policy/clipfrac_avg"] = metrics["clip_ratio/region_mean"]
    metrics["policy/entropy_avg"] = metrics["entropy"]
    return metrics


def warm_up(
    run: Run, critic: Critic, step: int, experience: Experience, rows: torch.Tensor
) -> dict[str, float]:
    """One optimizer step of the value model alone."""
    run.step = step
    means = Means()
    num_items = counted_items(run, experience.mask[rows], "token-mean")
    loss = _value_loss(run, experience, num_items, means)
    batches = micro_batches(run, experience, rows)
    return value_step(critic, step, experience, batches, loss) | means.reduce(run.accelerator)


def _policy_loss(
    run: Run, part: Experience, num_items: float, penalty_coef: float
) -> rl.PolicyLoss:
    config = run.config
    near = {
        "clip": {"epsilon": config.cliprange},
        "penalty": {"surrogate_params": {"kl_coef": penalty_coef}},
    }[config.kl_mode]
    options = dict(
        old_logp=part.old_logp,
        # for the metrics alone: its KL is in the reward
        ref_logp=part.ref_logp,
        importance_sampling_ratio=part.importance_ratio,
        surrogate=KL_MODES[config.kl_mode].surrogate,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        num_items=num_items,
    )
    with run.accelerator.autocast():
        return run.head.policy_loss(run.model, part, part.advantage, **options, **near)


def _policy_metrics(part: Experience, result: rl.PolicyLoss) -> dict[str, torch.Tensor | None]:
    log_ratio = result.logp - part.old_logp
    return {
        "entropy": result.entropy,
        "kl": result.kl,
        "policy/approxkl_avg": rl.token_kl(part.old_logp, result.logp, kl_estimator="k2"),
        "val/ratio": log_ratio.exp(),
        **clip_ratios(part, result),
    }


def _value_loss(run: Run, experience: Experience, num_items: float, means: Means) -> Any:
    """The value loss of a micro-batch, of its rows and their values (B, C)."""
    cliprange = run.config.cliprange_value

    def loss_of(batch: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        if cliprange is not None:
            held = part.value + (value.detach() - part.value).clamp(-cliprange, cliprange)
            error, held_error = ((v - part.returns).square() for v in (value.detach(), held))
            means.add(part.mask, **{"val/clipfrac_avg": (held_error > error).float()})
        return clipped_value_loss(value, part, cliprange, num_items)

    return loss_of
