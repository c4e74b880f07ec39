"""KTO: completions that are good or bad by themselves (Ethayarajh et al. 2024, arXiv:2402.01306).

    loss = mean over completions of weight * (1 - sigmoid(+-beta (h - z)))      + good, - bad
    h    = log pi(completion | prompt) - log pi_ref(completion | prompt)
    z    = max(0, mean of h over prompts with completions of other prompts)

z is the step's, of all processes: it does not depend on how a step is cut into micro-steps. A
row's foreign completion is drawn once for the run.

Left out: images, and a reference that follows the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

import rlcore as rl
from rlcore.data.encoding import Batch, Example, collate
from rlcore.data.labelled import Labelled, load_labelled, unrelated
from rlcore.data.loaded import Loaded
from rlcore.kernels.rows.token_logprob import TokenLogprob
from rlcore.models.forward import evaluating
from rlcore.trainers.options.kto import KTOConfig, check_kto_config
from rlcore.trainers.shared.evaluation import show_completions
from rlcore.trainers.shared.given import Given, Unpack, policy_of, tokenizer_of, with_objects
from rlcore.trainers.shared.held_out import HeldOut
from rlcore.trainers.shared.loading import load_data
from rlcore.trainers.shared.metrics import Clock, Log, Means
from rlcore.trainers.shared.order import batch_indices, shared_out, summed
from rlcore.trainers.shared.policies import Policy, as_reference, load_wanted_reference
from rlcore.trainers.shared.run import Result, Run, make_accelerator, start_run, total_steps
from rlcore.trainers.shared.stepping import optimizer_step
from rlcore.trainers.shared.writing import finish_run, save_if_due, tracking

__all__ = ["KTOConfig", "train_kto"]

DISPLAYED = ("loss", "kl", "rewards/margins", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class KTOData:
    """Labelled completions, and each prompt with a foreign one."""

    rows: Sequence[Labelled]
    foreign: Sequence[Example] | None  # None: the loss has no reference point
    ref_logp: torch.Tensor | None = None  # (M, 2) of own and foreign, where precomputed

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True)
class KTOBatch:
    """B rows of a step on the device."""

    rows: Batch
    desirable: torch.Tensor  # (B,) bool
    ref_logp: torch.Tensor  # (B,) sums
    counts: bool  # False: its passes only keep the processes in step

    def __len__(self) -> int:
        return len(self.desirable)


def train_kto(config: KTOConfig, **given: Unpack[Given]) -> Result:
    """Train `config.model` on rows of {"prompt", "completion", "label"}, label true for good ones.

    Rows of {"prompt", "chosen", "rejected"} are a good and a bad completion each.

    Args:
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options or data that do not work. TrainingDiverged: a loss or gradient that is
        not finite.
    """
    config = with_objects(config, given)
    check_kto_config(config)
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    how = {"max_length": config.max_length, "prompt_column": config.prompt_column}
    loaded = load_data(config, partial(load_labelled, tokenizer, **how))
    data = _as_data(config, loaded.train)
    held_out = {name: _as_data(config, rows) for name, rows in loaded.held_out.items()}
    model = policy_of(config, dropout=False)
    reference = load_wanted_reference(config, tokenizer)
    loaded.check_models(tokenizer, model, reference)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = size * accelerator.num_processes  # of an optimizer step
    steps = total_steps(config, len(data), rows)
    notes = loaded.notes + _balance_note(config, data)
    run = start_run(config, accelerator, model, tokenizer, steps, data=data.rows, notes=notes)
    reference = as_reference(run, reference)
    with tracking(run, given, "KTO", DISPLAYED) as tracker:
        if config.precompute_ref_log_probs:
            data = _with_reference(run, data, reference)
            held_out = {name: _with_reference(run, d, reference) for name, d in held_out.items()}
            reference = None
        log, clock = Log(run, tracker), Clock()
        held = HeldOut(run, log, clock, held_out, partial(_evaluate, run, reference))
        for step in run.steps():
            chosen = batch_indices(len(data), rows, step - 1, config.seed)
            metrics = _update(run, step, data, chosen, reference)
            tokens = sum(len(data.rows[index]) for index in chosen)
            run.num_tokens += tokens
            metrics |= clock.lap(tokens) | {"num_tokens": run.num_tokens}
            metrics["epoch"] = step * rows / len(data)
            log.add(step, metrics)
            held.after(step)
            save_if_due(run, step)
            clock.skip()
        return finish_run(run, log)


def _as_data(config: KTOConfig, rows: Loaded) -> KTOData:
    return KTOData(rows, unrelated(rows, config.seed) if config.uses_kl else None)


def _balance_note(config: KTOConfig, data: KTOData) -> tuple[str, ...]:
    """What to say where the weights do not balance the labels as the paper (section 4.2) would."""
    good = sum(each.desirable for each in data.rows)
    bad = len(data) - good
    if not good or not bad:
        return (f"all {len(data)} completions are {'good' if good else 'bad'}",)
    share = config.desirable_weight * good / (config.undesirable_weight * bad)
    if 0.99 <= share <= 1.34:
        return ()
    return (
        f"{good} completions are good and {bad} bad: desirable_weight x {good} over "
        f"undesirable_weight x {bad} is {share:.2f}, and KTO's authors found 1 to 1.33 best",
    )


def _update(
    run: Run, step: int, data: KTOData, chosen: Sequence[int], reference: Policy | None
) -> dict[str, float]:
    """One optimizer step on the mean loss over the rows `chosen`, of all processes."""
    config, means = run.config, Means()
    kl = _reference_point(run, data, chosen, reference, config.per_device_train_batch_size)
    batches = _batches(run, data, chosen, reference, config.per_device_train_batch_size)
    num_rows = len(chosen) / run.accelerator.num_processes

    def loss_of(batch: KTOBatch) -> torch.Tensor:
        return _loss(run, batch, kl, means) / num_rows

    metrics = optimizer_step(run, step, batches, loss_of)
    return _reduced(run, means, kl) | metrics


def _loss(run: Run, batch: KTOBatch, kl: float, means: Means) -> torch.Tensor:
    """The batch's summed losses, 0 where it does not count; takes its metrics."""
    config = run.config
    with run.accelerator.autocast():
        scores = run.head.token_logprob(run.model, batch.rows)
    logp = scores.logp.sum(1)
    loss = batch.counts * rl.kto_loss(
        logp,
        batch.ref_logp,
        batch.desirable,
        loss_type=config.loss_type,
        kl=kl,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        num_items=1,
    )
    _add_metrics(means, config.beta, batch, scores, loss)
    return loss


def _add_metrics(
    means: Means, beta: float, batch: KTOBatch, scores: TokenLogprob, loss: torch.Tensor
) -> None:
    """Sums of the good and of the bad rows, as means over all; of rows that do not count names."""
    logp = scores.logp.detach().sum(1)
    reward = beta * (logp - batch.ref_logp)
    values = {"loss": loss.detach().expand(len(batch)) / len(batch)}
    for side, chosen in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
        values |= {
            f"rewards/{side}": torch.where(chosen, reward, 0),
            f"logps/{side}": torch.where(chosen, logp, 0),
            side: chosen.float(),
        }
    means.add(torch.full_like(batch.desirable, batch.counts), **values)
    means.add(batch.rows.mask & batch.counts, entropy=scores.entropy.detach())


def _reduced(run: Run, means: Means, kl: float) -> dict[str, float]:
    """TRL's metrics; those of a label that no row has are left out."""
    metrics = means.reduce(run.accelerator)
    for side in ("chosen", "rejected"):
        share = metrics.pop(side)
        for name in (f"rewards/{side}", f"logps/{side}"):
            total = metrics.pop(name)
            if share:
                metrics[name] = total / share
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics | ({"kl": kl} if run.config.uses_kl else {})


def _batches(
    run: Run, data: KTOData, chosen: Sequence[int], reference: Policy | None, size: int
) -> list[KTOBatch]:
    """This process's share of the rows `chosen`, in micro-batches of like length."""
    batches = []
    for piece, counts in _pieces(run, [row.example for row in data.rows], chosen, size):
        rows = _collated(run, [data.rows[index].example for index in piece])
        good = [data.rows[index].desirable for index in piece]
        desirable = torch.tensor(good, device=run.accelerator.device)
        ref_logp = _reference_logp(run, data, piece, rows, reference, 0)
        batches.append(KTOBatch(rows, desirable, ref_logp, counts))
    return batches


@torch.no_grad()
def _reference_point(
    run: Run, data: KTOData, chosen: Sequence[int], reference: Policy | None, size: int
) -> float:
    """The mean log-ratio of the foreign completions of the rows `chosen`, at least 0."""
    if data.foreign is None:
        return 0.0
    total = 0.0
    policy = Policy(run.model, run.head)
    for piece, counts in _pieces(run, data.foreign, chosen, size):
        rows = _collated(run, [data.foreign[index] for index in piece])
        ratio = _summed_logp(run, policy, rows)
        ratio = ratio - _reference_logp(run, data, piece, rows, reference, 1)
        total += counts * ratio.sum().item()
    return max(summed(run.accelerator, total) / len(chosen), 0.0)


def _pieces(
    run: Run, examples: Sequence[Example], chosen: Sequence[int], size: int
) -> list[tuple[Sequence[int], bool]]:
    ordered = sorted(chosen, key=lambda index: len(examples[index]), reverse=True)
    return shared_out(run, ordered, size)


def _collated(run: Run, examples: Sequence[Example]) -> Batch:
    return collate(examples, run.tokenizer.pad_token_id).to(run.accelerator.device)


def _reference_logp(
    run: Run, data: KTOData, piece: Sequence[int], rows: Batch, reference: Policy | None, kind: int
) -> torch.Tensor:
    """(B,) what the reference gives the rows `piece`: their own (0) or foreign (1) completions."""
    if data.ref_logp is not None:
        return data.ref_logp[list(piece), kind]
    return _summed_logp(run, reference, rows)


@torch.no_grad()
def _summed_logp(run: Run, policy: Policy, rows: Batch) -> torch.Tensor:
    """(B,) summed log-probabilities of the completions."""
    with policy.asked(), run.accelerator.autocast():
        return policy.head.token_logprob(policy.model, rows, entropy=False).logp.sum(1)


def _with_reference(run: Run, data: KTOData, reference: Policy) -> KTOData:
    """The data with what the reference gives every completion, on every process."""
    logp = torch.zeros(len(data), 2, device=run.accelerator.device)
    own = [row.example for row in data.rows]
    for kind, examples in enumerate((own, data.foreign)):
        if examples is None:
            continue
        size = run.config.per_device_train_batch_size
        for piece, counts in _pieces(run, examples, range(len(data)), size):
            rows = _collated(run, [examples[index] for index in piece])
            known = _summed_logp(run, reference, rows)
            if counts:
                logp[list(piece), kind] = known
    return dataclasses.replace(data, ref_logp=run.accelerator.reduce(logp, "sum"))


@torch.no_grad()
def _evaluate(run: Run, reference: Policy | None, held_out: KTOData) -> dict[str, float]:
    """Loss and rewards on held-out rows, with the KL of all of them."""
    shown = held_out.rows[: run.config.log_completions]
    show_completions(run, [row.example for row in shown])
    means, everything, size = Means(), range(len(held_out)), run.config.eval_batch_size
    with evaluating(run.model):
        kl = _reference_point(run, held_out, everything, reference, size)
        for batch in _batches(run, held_out, everything, reference, size):
            _loss(run, batch, kl, means)
    return {f"eval/{name}": value for name, value in _reduced(run, means, kl).items()}
