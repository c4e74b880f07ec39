"""Supervised fine-tuning: imitate completions.

    loss = - sum over completion tokens of logp / number of completion tokens in the whole batch

With `assistant_only_loss` these are the tokens of a conversation that its assistant writes.

The rows of an optimizer step are sorted by length before they are cut into micro-steps, which
leaves little padding; with `padding_free` none is left, as a micro-step's sequences are one row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlcore.data.encoding import Batch, Example, collate, encode_examples
from rlcore.data.loaded import Loaded
from rlcore.data.loading import SFT_COLUMNS, load_rows
from rlcore.data.streaming import Stream
from rlcore.errors import UserError
from rlcore.models.forward import evaluating
from rlcore.models.heads import without_padding
from rlcore.models.limits import check_extent
from rlcore.runs.ranges import Count, Length, Natural, Positive
from rlcore.trainers.options.base import TrainConfig, check_train_config
from rlcore.trainers.shared.evaluation import show_completions
from rlcore.trainers.shared.given import Given, Unpack, policy_of, tokenizer_of, with_objects
from rlcore.trainers.shared.held_out import HeldOut
from rlcore.trainers.shared.loading import load_data
from rlcore.trainers.shared.metrics import Clock, Log
from rlcore.trainers.shared.order import batch_indices, shared_out, summed
from rlcore.trainers.shared.run import Result, Run, make_accelerator, start_run, total_steps
from rlcore.trainers.shared.stepping import optimizer_step
from rlcore.trainers.shared.writing import finish_run, save_if_due, tracking

DISPLAYED = ("loss", "learning_rate", "tokens_per_second")


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning."""

    learning_rate: Positive = 2e-5  # its peak
    max_length: Length | None = 1024  # tokens of a sequence; longer ones are cut at their end
    assistant_only_loss: bool = False  # of rows of messages learn the assistant's turns alone
    padding_free: bool = False  # a micro-step's sequences in one row; wants flash attention
    streaming: bool = False  # read the data as it is needed; max_steps says when to end
    shuffle_buffer_size: Count = 1024  # examples among which streaming draws the next
    # greedy completions of held-out prompts to show and keep in completions.jsonl
    log_completions: Natural = 3
    completions_format: str = "jsonl"  # or parquet: at the end they are in completions.parquet too


def train_sft(config: SFTConfig, **given: Unpack[Given]) -> Result:
    """Fine-tune `config.model` on rows of {"prompt", "completion"}, {"text"} or {"messages"}.

    Args:
        given: model, tokenizer, dataset, eval_dataset, callbacks, tracker: see `Given`.

    Returns:
        A Result; the model lies in `config.output_dir`.

    Raises:
        UserError: options or data that do not work. TrainingDiverged: a loss that is not finite.
    """
    config = with_objects(config, given)
    check_train_config(config)
    _check_streaming(config)
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    data = load_data(config, partial(_load_examples, config, tokenizer))
    examples, held_out = data.train, data.held_out
    model = policy_of(config)
    data.check_models(tokenizer, model)
    source = examples
    if config.streaming:
        check = partial(check_extent, model, tokenizer=tokenizer)
        source = _stream(config, tokenizer, config.dataset, check=check)
        # without a number, as it is not that of the data
        examples = iter(examples)
    local_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = local_rows * accelerator.num_processes
    steps = config.max_steps if config.streaming else total_steps(config, len(examples), rows)
    run = start_run(config, accelerator, model, tokenizer, steps, data=examples, notes=data.notes)
    if config.padding_free:
        run.head = without_padding(run.head, run.policy)
    with tracking(run, given, "SFT", DISPLAYED) as tracker:
        log, clock = Log(run, tracker), Clock()
        held = HeldOut(run, log, clock, held_out, lambda some: {"eval/loss": _evaluate(run, some)})
        upcoming = _upcoming(run, source, rows)
        for step in run.steps():
            chosen, epoch = next(upcoming)
            metrics = _train_step(run, step, chosen)
            tokens = sum(map(len, chosen))
            run.num_tokens += tokens
            metrics |= clock.lap(tokens) | {"num_tokens": run.num_tokens, "epoch": epoch}
            log.add(step, metrics)
            held.after(step)
            save_if_due(run, step)
            clock.skip()
        return finish_run(run, log)


def _load_examples(
    config: SFTConfig, tokenizer: Any, path_or_name: str | Sequence[str], held_out: bool
) -> Loaded:
    if config.streaming and not held_out:
        return _stream(config, tokenizer, path_or_name).first()
    column = config.prompt_column
    rows = load_rows(path_or_name, SFT_COLUMNS, held_out=held_out, prompt_column=column)
    assistant_only = config.assistant_only_loss
    return encode_examples(tokenizer, rows, config.max_length, assistant_only=assistant_only)


def _stream(config: SFTConfig, tokenizer: Any, source: Any, **options: Any) -> Stream:
    how = {"max_length": config.max_length, "assistant_only": config.assistant_only_loss}
    return Stream(
        source,
        SFT_COLUMNS,
        partial(encode_examples, tokenizer, may_be_empty=True, **how),
        buffer_size=config.shuffle_buffer_size,
        seed=config.seed,
        prompt_column=config.prompt_column,
        **options,
    )


def _check_streaming(config: SFTConfig) -> None:
    if config.streaming and config.max_steps == -1:
        raise UserError(
            "streaming does not count rows before it has read them, so num_train_epochs cannot say "
            "when to end: give max_steps"
        )
    buffer_size = SFTConfig.shuffle_buffer_size
    if not config.streaming and config.shuffle_buffer_size != buffer_size:
        raise UserError(
            "shuffle_buffer_size is set, but without streaming rows are drawn from all: add "
            "--streaming, or leave it out"
        )


def _upcoming(
    run: Run, source: Stream | Sequence[Example], rows: int
) -> Iterator[tuple[list[Example], float]]:
    """The `rows` examples of each step that is left, and how often the data was gone through."""
    if isinstance(source, Stream):
        drawn = itertools.islice(source, run.first_step * rows, None)
        while True:
            epochs, examples = zip(*itertools.islice(drawn, rows), strict=True)
            yield list(examples), float(epochs[-1])
    for step in itertools.count(run.first_step):
        chosen = batch_indices(len(source), rows, step, run.config.seed)
        yield [source[index] for index in chosen], (step + 1) * rows / len(source)


def _train_step(run: Run, step: int, examples: list[Example]) -> dict[str, float]:
    """One optimizer step on the examples of all processes."""
    accelerator = run.accelerator
    batches = _micro_batches(run, examples)
    tokens = sum(example.num_learned for example in examples)
    num_items = tokens / accelerator.num_processes
    return optimizer_step(run, step, batches, lambda batch: _loss(run, batch, num_items))


def _micro_batches(run: Run, examples: Sequence[Example], size: int | None = None) -> list[Batch]:
    """This process's share, in micro-batches of examples of like length."""
    batches = []
    size = size or run.config.per_device_train_batch_size
    for piece, counts in shared_out(run, sorted(examples, key=len), size):
        batch = collate(piece, run.tokenizer.pad_token_id).to(run.accelerator.device)
        batches.append(dataclasses.replace(batch, mask=batch.mask & counts))
    return batches


def _loss(run: Run, batch: Batch, num_items: float) -> torch.Tensor:
    """The batch's part of the mean negative log-probability of a completion token."""
    with run.accelerator.autocast():
        # minus the log-probability: reinforcing every demonstrated token alike
        advantage = torch.ones(len(batch.mask), device=batch.mask.device)
        result = run.head.policy_loss(
            run.model, batch, advantage, surrogate="reinforce", num_items=num_items
        )
    return result.loss


@torch.no_grad()
def _evaluate(run: Run, examples: list[Example]) -> float:
    """The mean negative log-probability of a held-out completion token."""
    show_completions(run, examples[: run.config.log_completions])
    with evaluating(run.model):
        batches = _micro_batches(run, examples, run.config.eval_batch_size)
        total = sum(_loss(run, batch, 1.0).item() for batch in batches)
    tokens = sum(example.num_learned for example in examples)
    return summed(run.accelerator, total) / tokens
