"""Proximal policy optimization (PPO: Schulman et al. 2017, arXiv:1707.06347) of a language model.

    r_t  = -kl_coef KL_t(policy || reference), and the score on the last token
    A    = GAE of r and V, whitened;  returns = A + V before that
    loss = - mean over tokens of min(ratio * A, clip(ratio, 1 - cliprange, 1 + cliprange) * A)
           or of ratio * A - penalty_coef * KL(old || new)
    value loss = 0.5 max((V - returns)^2, (clip(V, V_old -+ cliprange_value) - returns)^2)

The rewards are those of Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022
(arXiv:2203.02155). Left out: a policy and a value model that share one optimizer, as the value
model wants a higher learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

import rlcore as rl
from rlcore.functional.kl_control import ppo_kl_coef, proportional_kl_coef
from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.ppo import PPOConfig, check_ppo_config
from rlcore.trainers.ppo_update import update, warm_up
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.credit import judged_only, objective_metrics, token_reward, whitened
from rlcore.trainers.shared.critic import Critic, explained_variance, predict_values
from rlcore.trainers.shared.divergence import require_finite
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.given import Given, Unpack
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.online import prepare_online
from rlcore.trainers.shared.order import mix_seed, summed
from rlcore.trainers.shared.policies import (
    Policy,
    completion_logp,
    shuffled_rows,
)
from rlcore.trainers.shared.run import Result, Run

__all__ = ["PPOConfig", "train_ppo"]

DISPLAYED = ("reward", "objective/kl", "entropy", "value/explained_variance", "tokens_per_second")


def train_ppo(
    config: PPOConfig,
    *,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    **given: Unpack[Given],
) -> Result:
    """Train `config.model` on rows of {"prompt", ...} to please the reward functions.

    Args:
        reward_funcs: functions besides those that `config.reward` names; one, or several, or names.
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`, the value model below it.

    Raises:
        UserError: options, data, models or reward functions that do not work. TrainingDiverged: a
        loss or gradient that is not finite.
    """
    online = prepare_online(
        config, reward_funcs, given, check_ppo_config, critic=True, prepare=_set_coefficients
    )
    run, critic = online.run, online.critic
    with online.started("PPO", DISPLAYED):
        for step in run.steps():
            sampled = online.sample(step - 1)
            experience, objective = _experience(run, critic, online.reference, sampled)
            trained = _train(run, critic, step, experience, online.seed(step - 1))
            _adapt(run, step, experience, objective)
            online.log(step, sampled.metrics, objective | trained)
            online.save(step)
        return online.finish()


def _set_coefficients(run: Run) -> None:
    """Those that go with the KL; a checkpoint holds them."""
    config = run.config
    run.coefficients = {"kl_coef": config.kl_coef, "penalty_coef": config.penalty_coef}


def _experience(
    run: Run, critic: Critic, reference: Policy | None, sampled: Sampled
) -> tuple[Experience, dict[str, float]]:
    """What was sampled with all that the losses need to know of it, and its metrics."""
    config, coefficients = run.config, run.coefficients
    experience, score = judged_only(sampled)
    value, last_value = predict_values(run, critic, experience)
    old_logp = experience.old_logp
    if old_logp is None:
        old_logp = completion_logp(run, Policy(run.model, run.head), experience)
    experience = dataclasses.replace(
        experience,
        old_logp=old_logp,
        ref_logp=None if reference is None else completion_logp(run, reference, experience),
        value=value,
    )
    going_on = sampled.truncated.to(score.device) & config.bootstrap_truncated
    score = torch.where(going_on, -(config.missing_eos_penalty or 0.0), score)
    reward = token_reward(experience, score, coefficients["kl_coef"], config.kl_estimator)
    metrics = objective_metrics(run, experience, score, reward)
    if config.whiten_rewards:
        reward = whitened(run, reward, experience.mask, shift_mean=False)
    advantage, returns = rl.gae(
        reward,
        value,
        gamma=config.gamma,
        lam=config.lam,
        mask=experience.mask,
        last_value=torch.where(going_on, last_value, 0.0),
    )
    if config.whiten_advantages:
        advantage = whitened(run, advantage, experience.mask)
    experience = dataclasses.replace(experience, advantage=advantage, returns=returns)
    metrics["value/explained_variance"] = explained_variance(run, experience)
    metrics["val/num_eos_tokens"] = summed(run.accelerator, float((~sampled.truncated).sum()))
    return experience, metrics | {"objective/kl_coef": coefficients["kl_coef"]}


def _train(
    run: Run, critic: Critic, step: int, experience: Experience, seed: int
) -> dict[str, float]:
    """All updates on a generation batch: their metrics on average, and how many they were."""
    config = run.config
    taken = []
    for number in range(config.num_ppo_epochs):
        for rows in shuffled_rows(run, experience, mix_seed(seed, number)):
            if step <= config.value_warmup_steps:
                taken.append(warm_up(run, critic, step, experience, rows))
                continue
            penalty_coef = run.coefficients["penalty_coef"]
            taken.append(update(run, critic, step, experience, rows, penalty_coef))
            if config.target_kl is not None and taken[-1]["policy/approxkl_avg"] > config.target_kl:
                return _averaged(taken)
    return _averaged(taken)


def _averaged(taken: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates that were taken, and their number."""
    metrics = {name: sum(own[name] for own in taken) / len(taken) for name in taken[0]}
    ratios = torch.tensor([own["val/ratio"] for own in taken if "val/ratio" in own])
    metrics["policy/updates"] = len(ratios)
    if len(ratios):
        metrics["val/ratio_var"] = ratios.var(correction=0).item()
    return metrics


def _adapt(run: Run, step: int, experience: Experience, metrics: dict[str, float]) -> None:
    """The coefficients for the next batch, from how far the policy is and how far it went."""
    config, coefficients = run.config, run.coefficients
    if step <= config.value_warmup_steps:
        return
    if config.kl_target is not None:
        require_finite(run, step, {"objective/kl": metrics["objective/kl"]})
        coefficients["kl_coef"] = proportional_kl_coef(
            coefficients["kl_coef"],
            metrics["objective/kl"],
            target=config.kl_target,
            gain=config.kl_gain,
        )
    if config.kl_mode == "penalty":
        logp = completion_logp(run, Policy(run.model, run.head), experience)
        means = Means()
        means.add(experience.mask, kl=rl.token_kl(experience.old_logp, logp))
        kl = means.reduce(run.accelerator)["kl"]
        require_finite(run, step, {"policy/kl": kl})
        metrics |= {"policy/kl": kl, "policy/penalty_coef": coefficients["penalty_coef"]}
        adapted = ppo_kl_coef(coefficients["penalty_coef"], kl, target=config.penalty_target)
        # a thousand halvings would make it 0
        coefficients["penalty_coef"] = min(max(adapted, 1e-6), 1e6)
