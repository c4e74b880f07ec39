"""Direct preference optimization (DPO: Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

    loss = - mean over pairs of log sigmoid(beta * (h_chosen - h_rejected))
    h    = log pi(answer | prompt) - log pi_ref(answer | prompt)

The pairs come from a file, or with `online` from the policy itself: the best and the worst of a
prompt's completions, as the rewards have it.

Left out: images, and a reference that follows the policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import rlcore as rl
from rlcore.data.encoding import Batch
from rlcore.data.pairs import Pair, collate_pairs, load_pairs
from rlcore.models.forward import evaluating
from rlcore.models.heads import without_padding
from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.dpo import DPOConfig, check_dpo_config
from rlcore.trainers.shared.collect import collect
from rlcore.trainers.shared.evaluation import evaluate, show_completions
from rlcore.trainers.shared.given import Given, Unpack, policy_of, tokenizer_of, with_objects
from rlcore.trainers.shared.held_out import HeldOut
from rlcore.trainers.shared.judging import Judge, make_judge
from rlcore.trainers.shared.loading import Data, load_data, load_prompts
from rlcore.trainers.shared.metrics import Clock, Log, Means
from rlcore.trainers.shared.order import batch_indices, mix_seed, shared_out, summed
from rlcore.trainers.shared.policies import Policy, as_reference, load_wanted_reference
from rlcore.trainers.shared.run import Result, Run, make_accelerator, start_run, total_steps
from rlcore.trainers.shared.samplers import check_sampler, make_sampler
from rlcore.trainers.shared.stepping import optimizer_step
from rlcore.trainers.shared.writing import finish_run, save_if_due, tracking

__all__ = ["DPOConfig", "train_dpo"]

DISPLAYED = ("loss", "rewards/accuracies", "rewards/margins", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Rows [chosen; rejected] of B pairs, and what the reference thinks of them."""

    rows: Batch
    ref_logp: torch.Tensor | None = None  # (2B,) sums; None: not asked yet, or not wanted
    counts: bool = True  # False: its passes only keep the processes in step
    indices: Sequence[int] = ()  # which pairs of a file they are

    def __len__(self) -> int:
        return len(self.rows.mask) // 2


@dataclasses.dataclass(frozen=True)
class PairData:
    """Pairs of a file, tokenized."""

    pairs: Sequence[Pair]
    ref_logp: torch.Tensor | None = None  # (M, 2) of chosen and rejected, where precomputed

    def __len__(self) -> int:
        return len(self.pairs)


def train_dpo(
    config: DPOConfig,
    *,
    reward_funcs: RewardLike | Sequence[RewardLike] | None = None,
    **given: Unpack[Given],
) -> Result:
    """Train `config.model` to prefer chosen to rejected: rows of {"prompt", "chosen", "rejected"}.

    Args:
        reward_funcs: with `online`, functions besides those that `config.reward` names; the rows
            are then {"prompt", ...}.
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options or data that do not work. TrainingDiverged: a loss or gradient that is
        not finite.
    """
    config = with_objects(config, given)
    judge = make_judge(config, reward_funcs)
    check_dpo_config(config, len(judge.functions))
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    judge.prepare(tokenizer, accelerator.device)
    loaded = _load_data(config, tokenizer, judge)
    data, held_out = loaded.train, loaded.held_out
    if not config.online:
        data = PairData(data)
        held_out = {name: PairData(pairs) for name, pairs in held_out.items()}
    model = policy_of(config, dropout=False)
    if config.online:
        check_sampler(config, model)
    reference = load_wanted_reference(config, tokenizer)
    loaded.check_models(tokenizer, model, reference)
    rows = config.pairs_per_process * accelerator.num_processes  # of an optimizer step
    steps = total_steps(config, len(data), rows)
    source = data if config.online else data.pairs
    run = start_run(config, accelerator, model, tokenizer, steps, data=source, notes=loaded.notes)
    if config.online:
        run.sampler = make_sampler(run)
    if config.padding_free:
        run.head = without_padding(run.head, run.policy)
    reference = as_reference(run, reference)
    with tracking(run, given, "DPO", DISPLAYED) as tracker:
        if config.precompute_ref_log_probs:
            data = _with_reference(run, data, reference)
            held_out = {name: _with_reference(run, d, reference) for name, d in held_out.items()}
            reference = None
        log, clock = Log(run, tracker), Clock()
        measure = partial(_evaluate, run, judge, reference)
        held = HeldOut(run, log, clock, held_out, measure)
        for step in run.steps():
            chosen = batch_indices(len(data), rows, step - 1, config.seed)
            if config.online:
                batches, metrics = _sampled_batches(run, data[chosen], judge, step)
            else:
                batches, metrics = _batches(run, data, chosen), {}
            tokens = sum(int(batch.rows.attention_mask.sum()) for batch in batches)
            metrics |= _update(run, step, batches, reference)
            tokens = summed(accelerator, float(tokens))
            run.num_tokens += 0 if config.online else tokens
            metrics |= clock.lap(tokens) | {"num_tokens": run.num_tokens}
            metrics["epoch"] = step * rows / len(data)
            log.add(step, metrics)
            held.after(step)
            save_if_due(run, step)
            clock.skip()
        return finish_run(run, log)


def _load_data(config: DPOConfig, tokenizer: Any, judge: Judge) -> Data:
    """Training and held-out data: pairs, or with `online` rows with prompts."""
    if config.online:
        return load_prompts(config, tokenizer, judge)
    how = {"max_length": config.max_length, "prompt_column": config.prompt_column}
    return load_data(config, partial(load_pairs, tokenizer, **how))


def _batches(
    run: Run, data: PairData, chosen: Sequence[int], size: int | None = None
) -> list[PairBatch]:
    """This process's share of the pairs `chosen`, in micro-batches of like length."""
    pairs = data.pairs
    ordered = sorted(chosen, key=lambda index: len(pairs[index]), reverse=True)
    batches = []
    for piece, counts in shared_out(run, ordered, size or run.config.per_device_train_batch_size):
        rows = collate_pairs([pairs[index] for index in piece], run.tokenizer.pad_token_id)
        known = None if data.ref_logp is None else data.ref_logp[list(piece)].T.flatten()
        batches.append(PairBatch(rows.to(run.accelerator.device), known, counts, piece))
    return batches


def _sampled_batches(
    run: Run, prompts: Any, judge: Judge, step: int
) -> tuple[list[PairBatch], dict[str, float]]:
    """The best and the worst completion of each prompt of this process, and the metrics.

    Every process gets as many batches as the one with the most pairs; those that a process has no
    pair for do not count.
    """
    config, accelerator = run.config, run.accelerator
    sampled = collect(run, prompts, judge, mix_seed(config.seed, step))
    scores = sampled.mine(sampled.all_scores).view(-1, config.num_generations)
    high, best = scores.nan_to_num(-torch.inf).max(1)
    low, worst = scores.nan_to_num(torch.inf).min(1)
    first = torch.arange(len(scores), device=scores.device) * config.num_generations
    # completions that nobody tells apart, or nobody judged, make no pair
    pairs = torch.stack([first + best, first + worst])[:, high > low]  # (2, pairs)
    counts = accelerator.gather(high.new_tensor([pairs.shape[1]])).tolist()
    metrics = sampled.metrics | {
        "frac_pairs": sum(counts) / (len(first) * accelerator.num_processes)
    }
    size = config.per_device_train_batch_size
    pieces = [(piece, True) for piece in pairs.split(size, dim=1) if piece.numel()]
    most = max(1, math.ceil(max(counts) / size))
    pieces += [(first[:1].expand(2, 1), False)] * (most - len(pieces))
    batches = []
    for piece, count in pieces:
        part = sampled.experience.take(piece.flatten()).trimmed()
        rows = Batch(part.input_ids, part.attention_mask, part.mask)
        batches.append(PairBatch(rows, None, count))
    return batches, metrics


def _update(
    run: Run, step: int, batches: Sequence[PairBatch], reference: Policy | None
) -> dict[str, float]:
    """One optimizer step on the mean loss over the pairs of all processes."""
    means = Means()
    pairs = sum(len(batch) for batch in batches if batch.counts)
    num_pairs = max(summed(run.accelerator, float(pairs)) / run.accelerator.num_processes, 1.0)

    def loss_of(batch: PairBatch) -> torch.Tensor:
        result = _loss(run, batch, reference)
        _add_metrics(means, result, batch.counts)
        return result.loss * (batch.counts * len(batch) / num_pairs)

    return optimizer_step(run, step, batches, loss_of) | means.reduce(run.accelerator)


def _loss(run: Run, batch: PairBatch, reference: Policy | None) -> rl.PreferenceLoss:
    """The mean loss of the batch's pairs."""
    config = run.config
    ref_logp = batch.ref_logp
    if ref_logp is None and reference is not None:
        ref_logp = _reference_logp(run, batch.rows, reference)
    with run.accelerator.autocast():
        return run.head.preference_loss(
            run.model,
            batch.rows,
            ref_logp,
            loss_type=config.loss_type,
            loss_weights=config.loss_weights,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            use_weighting=config.use_weighting,
            ld_alpha=config.ld_alpha,
            temperature=config.temperature,
            **config.parameters,
        )


@torch.no_grad()
def _reference_logp(run: Run, rows: Batch, reference: Policy) -> torch.Tensor:
    """(2B,) summed log-probabilities of the answers under the reference."""
    with reference.asked(), run.accelerator.autocast():
        logp = reference.head.token_logprob(
            reference.model, rows, temperature=run.config.temperature, entropy=False
        ).logp
    return logp.sum(1)


def _with_reference(run: Run, data: PairData, reference: Policy) -> PairData:
    """The pairs with what the reference thinks of every answer, on every process."""
    logp = torch.zeros(len(data), 2, device=run.accelerator.device)
    for batch in _batches(run, data, range(len(data))):
        known = _reference_logp(run, batch.rows, reference).view(2, -1).T
        if batch.counts:
            logp[list(batch.indices)] = known
    return dataclasses.replace(data, ref_logp=run.accelerator.reduce(logp, "sum"))


@torch.no_grad()
def _evaluate(run: Run, judge: Judge, reference: Policy | None, held_out: Any) -> dict[str, float]:
    """Loss and rewards on held-out pairs; with `online` the rewards of greedy completions."""
    if run.config.online:
        return evaluate(run, held_out, judge)
    show_completions(run, [pair.chosen for pair in held_out.pairs[: run.config.log_completions]])
    means = Means()
    with evaluating(run.model):
        for batch in _batches(run, held_out, range(len(held_out)), run.config.eval_batch_size):
            result = _loss(run, batch, reference)
            _add_metrics(means, result, batch.counts)
            counted = torch.full((len(batch),), batch.counts, device=result.loss.device)
            means.add(counted, loss=result.loss.expand(len(batch)))
    return {f"eval/{name}": value for name, value in means.reduce(run.accelerator).items()}


def _add_metrics(means: Means, result: rl.PreferenceLoss, counts: bool) -> None:
    """TRL's metrics of pairs; of pairs that do not count the names alone."""
    chosen, rejected = result.chosen_reward, result.rejected_reward
    counted = torch.full_like(chosen, counts, dtype=torch.bool)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": result.chosen_logp,
        "logps/rejected": result.rejected_logp,
    }
    means.add(counted, **values)
