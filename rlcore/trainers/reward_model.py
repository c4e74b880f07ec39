"""Reward models: learn from preferences which answer is better.

    loss = - mean over pairs of log sigmoid(r_chosen - r_rejected - margin)
           + center_rewards_coefficient * (r_chosen + r_rejected)^2

The Bradley-Terry likelihood of the pairs (Ouyang et al. 2022, arXiv:2203.02155), with margin and
centring on request. r is a linear score of the last token's hidden state, which is the end of an
answer: a pair too long for the model to see it is left out, not cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import rlcore as rl
from rlcore.data.encoding import up_to_end
from rlcore.data.loaded import Loaded
from rlcore.data.pairs import Pair, collate_pairs, load_pairs, margins
from rlcore.models.forward import evaluating
from rlcore.models.loading import load_classifier
from rlcore.models.reward_model import sequence_scores
from rlcore.runs.ranges import Count, Length, NotNegative, Positive
from rlcore.trainers.options.base import TrainConfig, check_train_config
from rlcore.trainers.shared.given import Given, Unpack, tokenizer_of, with_objects
from rlcore.trainers.shared.held_out import HeldOut
from rlcore.trainers.shared.loading import load_data
from rlcore.trainers.shared.metrics import Clock, Log, Means
from rlcore.trainers.shared.order import batch_indices, shared_out, summed
from rlcore.trainers.shared.run import Result, Run, make_accelerator, start_run, total_steps
from rlcore.trainers.shared.stepping import optimizer_step
from rlcore.trainers.shared.writing import finish_run, save_if_due, tracking

__all__ = ["RewardModelConfig", "train_reward_model"]

INF = math.inf
DISPLAYED = ("loss", "accuracy", "margin", "tokens_per_second")


@dataclass(kw_only=True)
class RewardModelConfig(TrainConfig):
    """Reward model."""

    learning_rate: Positive = 1e-5  # its peak
    per_device_train_batch_size: Count = 8  # pairs in a micro-step on each process
    max_length: Length | None = 1024  # tokens of prompt and answer; pairs with more are left out
    # weight of the term that keeps rewards around 0
    center_rewards_coefficient: NotNegative = 0.0


def train_reward_model(config: RewardModelConfig, **given: Unpack[Given]) -> Result:
    """Train a score on top of `config.model`: rows of {"prompt", "chosen", "rejected"}.

    Args:
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; a sequence classifier with one label lies in `config.output_dir`.

    Raises:
        UserError: options or data that do not work. TrainingDiverged: a loss or gradient that is
        not finite.
    """
    config = with_objects(config, given)
    check_train_config(config)
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    how = {"max_length": config.max_length, "prompt_column": config.prompt_column}
    data = load_data(config, partial(load_ended_pairs, tokenizer, **how))
    pairs, held_out = data.train, data.held_out
    model = load_classifier(
        config.model,
        gradient_checkpointing=config.gradient_checkpointing,
        dropout=False,
        new_head="random",
        **config.policy_loading,
    )
    data.check_models(tokenizer, model)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    local_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = local_rows * accelerator.num_processes
    steps = total_steps(config, len(pairs), rows)
    run = start_run(config, accelerator, model, tokenizer, steps, data=pairs, notes=data.notes)
    with tracking(run, given, "reward model", DISPLAYED) as tracker:
        log, clock = Log(run, tracker), Clock()
        held = HeldOut(run, log, clock, held_out, lambda some: _evaluate(run, some))
        for step in run.steps():
            indices = batch_indices(len(pairs), rows, step - 1, config.seed)
            chosen = [pairs[index] for index in indices]
            metrics = _train_step(run, step, chosen)
            tokens = sum(map(len, chosen))
            run.num_tokens += tokens
            metrics |= clock.lap(tokens) | {"num_tokens": run.num_tokens}
            metrics["epoch"] = step * rows / len(pairs)
            log.add(step, metrics)
            held.after(step)
            save_if_due(run, step)
            clock.skip()
        return finish_run(run, log)


def load_ended_pairs(
    tokenizer: Any,
    path_or_name: str | Sequence[str],
    max_length: int | None,
    **how: Any,
) -> Loaded:
    """The pairs whose answers both fit, each answer up to its end as a policy would sample it.

    Args:
        how: further arguments of `load_pairs`.

    Raises:
        UserError: what `load_pairs` raises.
    """
    finish = partial(up_to_end, tokenizer)
    return load_pairs(tokenizer, path_or_name, max_length, finish=finish, **how)


def _train_step(run: Run, step: int, pairs: Sequence[Pair]) -> dict[str, float]:
    """One optimizer step on the pairs of all processes."""
    num_items = len(pairs) / run.accelerator.num_processes
    seen: list[torch.Tensor] = []

    def loss_of(batch: tuple[Sequence[Pair], bool]) -> torch.Tensor:
        loss, scores = _loss(run, *batch, num_items)
        seen.append(scores)
        return loss

    trained = optimizer_step(run, step, _micro_batches(run, pairs), loss_of)
    return trained | _score_metrics(run, torch.cat(seen, dim=1))


def _micro_batches(
    run: Run, pairs: Sequence[Pair], size: int | None = None
) -> list[tuple[Sequence[Pair], bool]]:
    """This process's share, in micro-batches of pairs of like length, and whether each counts."""
    ordered = sorted(pairs, key=len, reverse=True)
    return shared_out(run, ordered, size or run.config.per_device_train_batch_size)


def _loss(
    run: Run, pairs: Sequence[Pair], counts: bool, num_items: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs' part of the mean loss, and their scores (2, B), chosen first, detached.

    Of pairs that do not count: 0, and (2, 0).
    """
    device = run.accelerator.device
    batch = collate_pairs(pairs, run.tokenizer.pad_token_id).to(device)
    with run.accelerator.autocast():
        scores = sequence_scores(run.model, run.policy, batch.input_ids, batch.attention_mask)
    chosen, rejected = scores.chunk(2)
    margin = margins(pairs)
    loss = rl.pairwise_reward_loss(
        chosen,
        rejected,
        margin=None if margin is None else margin.to(device),
        center_rewards_coefficient=run.config.center_rewards_coefficient,
        num_items=num_items,
    )
    scores = torch.stack([chosen, rejected]).detach()
    return loss * counts, scores[:, : len(pairs) * counts]


def _score_metrics(run: Run, scores: torch.Tensor) -> dict[str, float]:
    """TRL's metrics of the scores (2, N), chosen first, of every process."""
    chosen, rejected = scores
    means = Means()
    means.add(
        torch.ones_like(chosen, dtype=torch.bool),
        accuracy=(chosen > rejected).float(),
        margin=chosen - rejected,
        mean_reward=(chosen + rejected) / 2,
    )
    gather = run.accelerator.gather
    # a process may have no pair
    low, high = (torch.cat([scores.flatten(), scores.new_tensor([end])]) for end in (INF, -INF))
    return means.reduce(run.accelerator) | {
        "min_reward": gather(low.amin().reshape(1)).min().item(),
        "max_reward": gather(high.amax().reshape(1)).max().item(),
    }


@torch.no_grad()
def _evaluate(run: Run, pairs: Sequence[Pair]) -> dict[str, float]:
    """Loss and scores of held-out pairs."""
    with evaluating(run.model):
        batches = _micro_batches(run, pairs, run.config.eval_batch_size)
        parts = [_loss(run, *batch, len(pairs)) for batch in batches]
    losses, scores = zip(*parts, strict=True)
    metrics = _score_metrics(run, torch.cat(scores, dim=1))
    metrics["loss"] = summed(run.accelerator, sum(losses).item())
    return {f"eval/{name}": value for name, value in metrics.items()}
