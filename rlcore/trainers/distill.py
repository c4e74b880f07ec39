"""Generalised knowledge distillation (GKD: Agarwal et al. 2024, arXiv:2306.13649).

    loss = mean over tokens of D(p_student(. | x, y_<t), p_teacher(. | x, y_<t))
    y    ~ the student with probability lmbda, else the data's, or with seq_kd the teacher's
    D    = KL(teacher || student) at beta 0, KL(student || teacher) at beta 1, else
           beta KL(teacher || m) + (1 - beta) KL(student || m),
           m = beta teacher + (1 - beta) student

D is exact over the vocabulary; no gradient goes through the sampling (algorithm 1). Rewards, where
there are any, measure what is written and teach nothing.

Left out: several teachers, and teachers with another tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rlcore.data.encoding import Example, collate
from rlcore.sampling.rewards import RewardLike
from rlcore.sampling.rollout import Rollout, generate
from rlcore.trainers.options.distill import DistillConfig, check_distill_config
from rlcore.trainers.shared.collect import BROKEN
from rlcore.trainers.shared.divergence import stop_together
from rlcore.trainers.shared.evaluation import evaluate, show_rollout
from rlcore.trainers.shared.experience import Experience, from_rollout
from rlcore.trainers.shared.given import Given, Unpack
from rlcore.trainers.shared.judging import Judge
from rlcore.trainers.shared.loading import Data, load_prompts_and_completions
from rlcore.trainers.shared.metrics import Means
from rlcore.trainers.shared.online import prepare_online
from rlcore.trainers.shared.order import mix_seed, shared_out, summed
from rlcore.trainers.shared.policies import Policy, counted_items, micro_batches
from rlcore.trainers.shared.run import Result, Run
from rlcore.trainers.shared.samplers import generated
from rlcore.trainers.shared.stepping import optimizer_step
from rlcore.trainers.shared.teacher import load_teacher, teacher_divergence

__all__ = ["DistillConfig", "train_distill"]

DISPLAYED = ("loss", "on_policy", "learning_rate", "tokens_per_second")


def train_distill(
    config: DistillConfig,
    *,
    teacher: Any | None = None,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    **given: Unpack[Given],
) -> Result:
    """Train `config.model` to give each next token the teacher's probabilities.

    Rows are {"prompt", "completion"}; {"prompt"} where lmbda is 1 or with seq_kd.

    Args:
        teacher: a transformers model, of which a copy is asked; `config.teacher` is then None.
        reward_funcs: functions besides those that `config.reward` names, to measure by.
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options, data or models that do not work. TrainingDiverged: a loss or gradient
        that is not finite.
    """
    config = config if teacher is None else dataclasses.replace(config, teacher=teacher)
    examples: list[Example] = []

    def load(config: DistillConfig, tokenizer: Any, judge: Judge) -> Data:
        data, found = load_prompts_and_completions(
            config, tokenizer, judge, completions=config.learns_from_data
        )
        examples.extend(found)
        return data

    online = prepare_online(
        config, reward_funcs, given, check_distill_config, load=load, frozen=load_teacher
    )
    run, teacher = online.run, online.reference
    measure = partial(_evaluate, run, online.judge, teacher)
    with online.started("Distillation", DISPLAYED, measure):
        for step in run.steps():
            seed = online.seed(step - 1)
            if _is_on_policy(run.config, seed):
                sampled = online.sample(step - 1)
                experience, metrics = sampled.experience, sampled.metrics | {"on_policy": 1.0}
            else:
                mine = _mine(run, online.chosen(step - 1))
                if run.config.seq_kd:
                    experience = _of_teacher(run, teacher, online.data.train[mine]["prompt"], seed)
                else:
                    experience = _of_data(run, [examples[row] for row in mine])
                tokens = summed(run.accelerator, float(experience.attention_mask.sum()))
                run.num_tokens += tokens
                metrics = {"on_policy": 0.0, "tokens": tokens}
            online.log(step, metrics, _update(run, step, experience, teacher))
            online.save(step)
            online.clock.skip()
        return online.finish()


def _is_on_policy(config: DistillConfig, seed: int) -> bool:
    """Whether the student samples, with probability lmbda; the same on every process."""
    return torch.rand((), generator=torch.Generator().manual_seed(seed)).item() < config.lmbda


def _mine(run: Run, chosen: Sequence[int]) -> Sequence[int]:
    """This process's share of a step's rows."""
    share, rank = run.config.prompts_per_process, run.accelerator.process_index
    return chosen[rank * share : (rank + 1) * share]


def _of_data(run: Run, examples: Sequence[Example]) -> Experience:
    """The data's own completions."""
    batch = collate(examples, run.tokenizer.pad_token_id).to(run.accelerator.device)
    return Experience(batch.input_ids, batch.attention_mask, batch.mask)


def _of_teacher(run: Run, teacher: Policy, prompts: Sequence, seed: int) -> Experience:
    """What the teacher samples."""
    config = run.config
    run.phase("sampling")
    rollout = None
    try:
        with teacher.asked():
            rollout = generate(
                teacher.model,
                run.tokenizer,
                prompts,
                num_generations=config.num_generations,
                max_new_tokens=config.max_completion_length,
                max_prompt_length=config.max_prompt_length,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=mix_seed(seed, run.accelerator.process_index),
                full_length=run.is_sharded,
            )
    except FloatingPointError:
        pass
    stop_together(run, run.step + 1, BROKEN if rollout is None else None)
    return from_rollout(rollout, mask_truncated_completions=config.mask_truncated_completions)


def _update(run: Run, step: int, experience: Experience, teacher: Policy) -> dict[str, float]:
    """One optimizer step on the mean divergence over the tokens of all processes."""
    num_items = counted_items(run, experience.mask, "token-mean")
    rows = torch.arange(len(experience), device=experience.mask.device)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        part = experience.take(batch).trimmed()
        return _divergence(run, part, teacher, num_items=num_items)

    return optimizer_step(run, step, micro_batches(run, experience, rows), loss_of)


def _divergence(
    run: Run, part: Experience, teacher: Policy, num_items: float | None = None
) -> torch.Tensor:
    """(B, C): D of each token's two distributions, 0 where masked; or their sum over num_items."""
    config = run.config
    with run.accelerator.autocast():
        return teacher_divergence(
            run,
            teacher,
            part,
            num_items=num_items,
            temperature=config.temperature,
            **config.divergence,
        )


@torch.no_grad()
def _evaluate(
    run: Run, judge: Judge, teacher: Policy, held_out: Mapping[str, Any]
) -> dict[str, float]:
    """The rewards of greedy completions; without a reward the loss on them."""
    if judge.functions:
        return evaluate(run, held_out, judge)
    means, found = Means(), None
    for batch, counts in shared_out(run, range(len(held_out)), run.config.eval_batch_size):
        prompts = held_out[list(batch)]["prompt"]
        rollout: Rollout | None = generated(run, prompts, greedy=True)
        if rollout is None:
            found = BROKEN
            continue
        show_rollout(run, prompts, rollout)
        part = from_rollout(rollout, mask_truncated_completions=False)
        loss = _divergence(run, part, teacher)
        means.add(part.mask & counts, loss=loss)
    stop_together(run, run.step, found)
    return {f"eval/{name}": value for name, value in means.reduce(run.accelerator).items()}
