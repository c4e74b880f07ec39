"""The policy gradient (REINFORCE: Williams 1992; Sutton et al. 2000) of a language model.

    loss = - mean over tokens of (G_t - b) log pi(a_t | s_t)

G_t is the reward of the whole completion or the reward to go, less the KL to the reference where
that is part of the reward. The baseline b is nothing, the batch's mean reward, the mean of the
prompt's other completions (RLOO: Ahmadian et al. 2024, arXiv:2402.14740) or a value model's
opinion. With kl_placement reward, reward_to_go, no baseline and whitened advantages it is
REINFORCE++ (Hu 2025, arXiv:2501.03262) without its clip, as each batch is gone through once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

import rlcore as rl
from rlcore.functional.advantages import leave_one_out_advantage
from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.pg import PGConfig, RLOOConfig, check_pg_config
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.credit import everywhere, judged_only, mine, token_reward, whitened
from rlcore.trainers.shared.critic import (
    Critic,
    actor_critic_step,
    clipped_value_loss,
    explained_variance,
    predict_values,
    value_step,
)
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.given import Given, Unpack
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.online import prepare_online
from rlcore.trainers.shared.policies import (
    Policy,
    bounded_kl,
    completion_logp,
    counted_items,
    micro_batches,
)
from rlcore.trainers.shared.run import Result, Run
from rlcore.trainers.shared.stepping import optimizer_step

__all__ = ["PGConfig", "RLOOConfig", "train_pg"]

DISPLAYED = ("reward", "kl", "entropy", "tokens_per_second")


def train_pg(
    config: PGConfig,
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
    online = prepare_online(config, reward_funcs, given, check_pg_config, critic=value)
    run = online.run
    with online.started("PG", DISPLAYED):
        for step in run.steps():
            sampled = online.sample(step - 1)
            experience = _experience(run, online.critic, online.reference, sampled)
            trained = _update(run, online.critic, step, experience)
            online.log(step, sampled.metrics, trained)
            online.save(step)
        return online.finish()


def _experience(
    run: Run, critic: Critic | None, reference: Policy | None, sampled: Sampled
) -> Experience:
    """What was sampled, with its returns and advantages."""
    config = run.config
    experience, score = judged_only(sampled)
    if reference is not None:
        ref_logp = completion_logp(run, reference, experience)
        experience = dataclasses.replace(experience, ref_logp=ref_logp)
    if config.kl_in_reward and experience.old_logp is None:
        old_logp = completion_logp(run, Policy(run.model, run.head), experience)
        experience = dataclasses.replace(experience, old_logp=old_logp)
    reward = token_reward(experience, score, config.kl_in_reward, config.estimator)
    if critic is not None:
        value, _ = predict_values(run, critic, experience)
        experience = dataclasses.replace(experience, value=value)
    returns = _returns(config, experience, reward)
    advantage = returns - _baseline(run, experience, reward)
    advantage = torch.where(experience.mask, advantage, 0.0)
    if config.whiten_advantages:
        advantage = whitened(run, advantage, experience.mask)
    return dataclasses.replace(experience, advantage=advantage, returns=returns)


def _returns(config: PGConfig, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    """(N, C): what each token is given credit for."""
    if config.return_type == "reward_to_go":
        return rl.discounted_return(reward, gamma=config.gamma, mask=experience.mask)
    return reward.sum(1, keepdim=True).expand_as(reward)


def _baseline(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    """(N, C) or (N, 1): what the returns are compared with."""
    return BASELINES[run.config.baseline](run, experience, reward)


def _no_baseline(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    return reward.new_zeros(len(reward), 1)


def _batch_mean(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    everyone = _totals(run, experience, reward)
    return everyone.nanmean().nan_to_num(0.0).expand(len(reward), 1)


def _leave_one_out(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    everyone = _totals(run, experience, reward)
    others = everyone - leave_one_out_advantage(everyone, run.config.num_generations)
    return mine(run, others, reward.sum(1)).nan_to_num(0.0)[:, None]


def _value(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    return experience.value


BASELINES = {
    "none": _no_baseline,
    "batch_mean": _batch_mean,
    "leave_one_out": _leave_one_out,
    "value": _value,
}


def _totals(run: Run, experience: Experience, reward: torch.Tensor) -> torch.Tensor:
    """(M,) rewards of all processes' completions; NaN where none of its tokens counts."""
    total = torch.where(experience.mask.any(1), reward.sum(1), torch.nan)
    return everywhere(run, total)


def _update(run: Run, critic: Critic | None, step: int, experience: Experience) -> dict[str, float]:
    """One optimizer step on the whole of the experience; its metrics are from before it."""
    means = Means()
    num_items = counted_items(run, experience.mask, "token-mean")
    rows = torch.arange(len(experience), device=experience.mask.device)
    batches = micro_batches(run, experience, rows)

    def policy_loss(batch: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        result = _policy_loss(run, part, num_items)
        means.add(part.mask, entropy=result.entropy, kl=result.kl)
        if run.config.kl_in_loss and run.config.estimator == "k3":
            means.add(part.mask, **{"kl/bounded": bounded_kl(part, result)})
        return result.loss

    def value_loss(batch: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        return clipped_value_loss(value, part, None, num_items)

    if critic is None:
        return optimizer_step(run, step, batches, policy_loss) | means.reduce(run.accelerator)
    trained = actor_critic_step(run, critic, step, experience, batches, policy_loss, value_loss)
    for _ in range(run.config.num_value_epochs - 1):
        trained |= value_step(critic, step, experience, batches, value_loss)
    trained["value/explained_variance"] = explained_variance(run, experience)
    return trained | means.reduce(run.accelerator)


def _policy_loss(run: Run, part: Experience, num_items: float) -> rl.PolicyLoss:
    config = run.config
    options = dict(
        ref_logp=part.ref_logp,
        importance_sampling_ratio=part.importance_ratio,
        surrogate="reinforce",
        beta=config.kl_in_loss,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        num_items=num_items,
    )
    if config.kl_in_loss:
        options["kl_estimator"] = config.estimator
    with run.accelerator.autocast():
        return run.head.policy_loss(run.model, part, part.advantage, **options)
