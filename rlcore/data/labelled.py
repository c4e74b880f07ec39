"""Completions that are good or bad by themselves, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data.chat import notes_of_tools
from rlcore.data.encoding import Example, encode_completions, shortened
from rlcore.data.loaded import Loaded, Tally, encoded, measured
from rlcore.data.loading import PREFERENCE_COLUMNS, load_rows
from rlcore.data.pairs import encode_pairs
from rlcore.errors import UserError

# as JSON has them, as a table may, and as text
LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class Labelled:
    """A tokenized completion of a prompt, and whether it is a good one."""

    example: Example
    desirable: bool

    def __len__(self) -> int:
        return len(self.example)


def load_labelled(
    tokenizer: Any,
    path_or_name: str | Sequence[str],
    max_length: int | None,
    *,
    held_out: bool = False,
    prompt_column: str = "prompt",
) -> Loaded:
    """The labelled completions of a data file, directory or hub dataset, tokenized, as Labelled.

    A row is {"prompt", "completion", "label"}, text or messages, label true for a good completion;
    or preferences, {"prompt", "chosen", "rejected"}, which are a good and a bad one.

    Args:
        max_length: of each sequence the first so many tokens stay.
        held_out, prompt_column: see `load_rows`.

    Raises:
        UserError: no such data, a column is missing, a label that is neither true nor false, or no
            completion is left.
    """
    groups = (("prompt", "completion"), *PREFERENCE_COLUMNS)
    rows = load_rows(path_or_name, groups, held_out=held_out, prompt_column=prompt_column)
    encode = _encoded if "completion" in rows.group else _unpaired
    found, places, tally = Loaded(), [], Tally(rows)
    for row, several in enumerate(encoded(rows, lambda batch: encode(tokenizer, batch))):
        for example, desirable in several:
            short = example and shortened(example, max_length)
            if short is None:
                tally.add("have a completion without tokens, which is left out", row)
                continue
            if len(short) < len(example):
                tally.add(f"lose their end to max_length {max_length}", row)
            found.append(Labelled(short, desirable))
            places.append(row)
    if not found:
        raise UserError(f"no completion is left: {'; '.join(tally.notes)}")
    found.notes = rows.notes + notes_of_tools(tokenizer, rows) + tally.notes
    ids = (each.example.prompt + each.example.completion for each in found)
    found.extent = measured(rows, zip(places, ids, strict=True))
    return found


def _encoded(tokenizer: Any, rows: Sequence[dict]) -> list[list[tuple[Example | None, bool]]]:
    labels = [_label(row) for row in rows]
    examples = encode_completions(tokenizer, rows)
    return [[both] for both in zip(examples, labels, strict=True)]


def _unpaired(tokenizer: Any, rows: Sequence[dict]) -> list[list[tuple[Example | None, bool]]]:
    pairs = encode_pairs(tokenizer, rows)
    return [
        [(None, True)] if pair is None else [(pair.chosen, True), (pair.rejected, False)]
        for pair in pairs
    ]


def _label(row: dict) -> bool:
    label = row.get("label")
    try:
        return LABELS[str(label).strip().lower()]
    except KeyError:
        found = f"not {label!r:.80}" if "label" in row else "and there is no such column"
        raise UserError(f"'label' must be true (a good completion) or false, {found}") from None


def unrelated(rows: Loaded, seed: int) -> list[Example]:
    """Each row's prompt with the completion of a row with another prompt, drawn by the seed.

    None is longer than the longest of `rows`.

    Raises:
        UserError: all rows have the same prompt.
    """
    examples = [each.example for each in rows]
    if all(example.prompt == examples[0].prompt for example in examples):
        raise UserError(
            "loss_type kto compares with completions of other prompts, and all rows have the same "
            "one: add others, or take loss_type apo_zero_unpaired"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    result = list(examples)
    following = order[0]
    # backwards, and round twice: the first time, the last rows do not know what follows them
    for place, after in 2 * list(zip(order[::-1], [order[0], *order[:0:-1]], strict=True)):
        if examples[after].prompt != examples[place].prompt:
            following = after
        example = Example(examples[place].prompt, examples[following].completion)
        result[place] = shortened(example, rows.extent.length)
    return result
