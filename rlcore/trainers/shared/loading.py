"""The data of a run, to train on and held out: read, tokenized and checked at the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlcore.data.chat import notes_of_tools
from rlcore.data.encoding import Example, encode_completions, encode_prompts
from rlcore.data.loaded import Extent, Tally, encoded, measured
from rlcore.data.loading import load_rows
from rlcore.data.rows import Rows
from rlcore.errors import UserError
from rlcore.models.limits import check_extent
from rlcore.runs.resuming import held_out_sets
from rlcore.sampling.rewards import check_columns
from rlcore.trainers.options.base import TrainConfig
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.judging import Judge


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on."""

    train: Any  # Rows or Loaded
    held_out: dict[str, Any]  # the same by the set's name; "" is the name of one without
    notes: tuple[str, ...]  # what the user should be told of them
    new_tokens: int = 0  # that are sampled behind a sequence, at most

    def check_models(self, tokenizer: Any, *models: Any | None) -> None:
        """Raise UserError where one of the models cannot take the data's lengths or token ids."""
        # a value model has its backbone and config inside
        models = [getattr(model, "classifier", model) for model in models]
        for data in (self.train, *self.held_out.values()):
            for model in models:
                if hasattr(model, "config"):
                    check_extent(model, data.extent, tokenizer, self.new_tokens)


def said(names: Any, option: str = "dataset") -> str:
    """A data set's name, or those of several, for messages; of an object the option's name."""
    if isinstance(names, str):
        return names
    is_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return " ".join(names) if is_names else option


def load_data(config: TrainConfig, load: Callable[..., Any]) -> Data:
    """What `load(path_or_name, held_out=...)` makes of the run's data sets."""
    train = load(config.dataset, held_out=False)
    held_out = {
        name: load(source, held_out=True)
        for name, source in held_out_sets(config.eval_dataset).items()
    }
    notes = [note for rows in (train, *held_out.values()) for note in rows.notes]
    notes += _overlaps(config, train, held_out)
    return Data(train, held_out, tuple(dict.fromkeys(notes)))


def _overlaps(config: TrainConfig, train: Any, held_out: Mapping[str, Any]) -> Iterator[str]:
    """A line for each held-out set with rows to train on; UserError where it has no others."""
    seen = {hash(repr(row)) for row in train} if held_out else set()
    for name, rows in held_out.items():
        asked = {hash(repr(row)) for row in rows}
        source = said(held_out_sets(config.eval_dataset)[name], name or "eval_dataset")
        if asked == seen:
            raise UserError(
                f"eval_dataset holds the rows of dataset ({source}, {said(config.dataset)}): what "
                "it measures would be trained on; hold other rows out"
            )
        if both := len(asked & seen):
            yield f"{source}: {both} of {len(asked)} held-out rows are among those to train on"


def load_prompts(config: SamplingConfig, tokenizer: Any, judge: Judge) -> Data:
    """Rows of {"prompt", ...} for the run, as `load_prompt_rows` checks them."""

    def load(path_or_name: str | Sequence[str], held_out: bool) -> Rows:
        return load_prompt_rows(config, tokenizer, judge, path_or_name, held_out)

    data = load_data(config, load)
    notes = data.notes + _sampling_note(config)
    return dataclasses.replace(data, notes=notes, new_tokens=config.max_completion_length)


def load_prompts_and_completions(
    config: SamplingConfig, tokenizer: Any, judge: Judge, *, completions: bool
) -> tuple[Data, list[Example]]:
    """Rows of {"prompt", ...} for the run; of the training rows {"prompt", "completion"} Examples.

    Examples are as long as what is sampled is at most: prompts lose their beginning, completions
    their end. Without `completions` there are none.

    Raises:
        UserError: data, columns or a row that do not work; the row is named.
    """
    examples: list[Example] = []

    def load(path_or_name: str | Sequence[str], held_out: bool) -> Rows:
        rows = load_prompt_rows(config, tokenizer, judge, path_or_name, held_out)
        if completions and not held_out:
            if "completion" not in rows.column_names:
                raise UserError(
                    f"{said(path_or_name)} has no column 'completion' to learn from: add it, or "
                    "set lmbda 1 or seq_kd, and completions are sampled"
                )
            examples.extend(_cut_examples(config, tokenizer, rows))
        return rows

    data = load_data(config, load)
    return dataclasses.replace(data, new_tokens=config.max_completion_length), examples


def _cut_examples(config: SamplingConfig, tokenizer: Any, rows: Rows) -> list[Example]:
    """An Example a row; cuts become notes of the rows, ids part of their extent."""
    examples, tally = [], Tally(rows)
    both = rows.select_columns(["prompt", "completion"])
    for row, example in enumerate(encoded(both, partial(encode_completions, tokenizer))):
        if example is None:
            raise UserError(f"{rows.where(row)}: 'prompt' and 'completion' need a token each")
        prompt, completion = example.prompt, example.completion[: config.max_completion_length]
        if len(completion) < len(example.completion):
            tally.add(
                f"completions lose their end to max_completion_length "
                f"{config.max_completion_length}",
                row,
            )
        examples.append(Example(prompt[-(config.max_prompt_length or len(prompt)) :], completion))
    rows.notes += tally.notes
    extent = measured(rows, enumerate(example.completion for example in examples))
    if extent.token_id > rows.extent.token_id:
        highest = {"token_id": extent.token_id, "highest": extent.highest}
        rows.extent = dataclasses.replace(rows.extent, **highest)
    return examples


def load_prompt_rows(
    config: Any, tokenizer: Any, judge: Judge, path_or_name: str | Sequence[str], held_out: bool
) -> Rows:
    """Rows of {"prompt", ...}, every prompt of which was encoded once.

    Args:
        config: has `reward`, `prompt_column`, `max_prompt_length` and `max_completion_length`.

    Raises:
        UserError: data, columns or a prompt that do not work; the row is named.
    """
    rows = load_rows(path_or_name, held_out=held_out, prompt_column=config.prompt_column)
    source = said(path_or_name, "eval_dataset" if held_out else "dataset")
    check_columns(judge.functions, rows.column_names, source)
    prompts = rows.select_columns(["prompt"])
    rows.extent, cuts = _measured_prompts(prompts, tokenizer, config.max_prompt_length)
    if judge.reward_models:
        # they read prompts whole
        whole, _ = _measured_prompts(prompts, tokenizer, None)
        for each in judge.reward_models:
            check_extent(each.model, whole, tokenizer, config.max_completion_length)
    rows.notes += cuts + notes_of_tools(tokenizer, rows) + _null_fields_note(rows, source)
    if "code_runs" in config.reward and "tests" not in rows.column_names:
        rows.notes += (
            f"{source} has no column 'tests': code_runs rewards every program that runs",
        )
    return rows


def _measured_prompts(
    rows: Rows, tokenizer: Any, max_length: int | None
) -> tuple[Extent, tuple[str, ...]]:
    """The extent of the prompts as the policy gets them, and a note of those that are cut."""
    tally = Tally(rows)

    def sequences() -> Iterator[tuple[int, list[int]]]:
        prompts = encoded(
            rows, lambda batch: encode_prompts(tokenizer, [r["prompt"] for r in batch])
        )
        for row, ids in enumerate(prompts):
            if max_length is not None and len(ids) > max_length:
                tally.add(
                    f"prompts lose their beginning to max_prompt_length {max_length}, be it bos or "
                    "a system prompt",
                    row,
                )
                ids = ids[-max_length:]
            yield row, ids

    return measured(rows, sequences()), tally.notes


def _null_fields_note(rows: Rows, source: str) -> tuple[str, ...]:
    if not rows.null_fields:
        return ()
    names = ", ".join(map(repr, rows.null_fields))
    return (
        f"{source}: objects in {names} have null fields, which is how a table stores fields that a "
        "row lacks, and reward functions get them so; .jsonl keeps rows as they are",
    )


def _sampling_note(config: SamplingConfig) -> tuple[str, ...]:
    options = [f"top_p {config.top_p}"] * (config.top_p < 1) + [f"top_k {config.top_k}"] * (
        config.top_k > 0
    )
    if not options:
        return ()
    return (
        f"{' and '.join(options)}: completions are sampled from the likeliest tokens alone, and "
        "trained on as if from all of them; top_p 1 and top_k 0 sample what is trained",
    )
