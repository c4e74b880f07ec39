"""Preference pairs as token ids, and as padded batches of [chosen; rejected] rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlcore.data.chat import notes_of_tools
from rlcore.data.encoding import Batch, Example, collate, encode_completions, shortened
from rlcore.data.loaded import Loaded, Tally, encoded, measured
from rlcore.data.loading import PREFERENCE_COLUMNS, load_rows
from rlcore.errors import UserError


@dataclass(frozen=True)
class Pair:
    """Two tokenized answers to one prompt, the better one first."""

    chosen: Example
    rejected: Example
    margin: float | None = None  # by how much it is better

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def load_pairs(
    tokenizer: Any,
    path_or_name: str | Sequence[str],
    max_length: int | None,
    *,
    held_out: bool = False,
    prompt_column: str = "prompt",
    finish: Callable[[Example], Example] | None = None,
) -> Loaded:
    """The preference pairs of a data file, directory or hub dataset, tokenized, as Pairs.

    A row is {"prompt", "chosen", "rejected"}, text or messages, or without "prompt": it is then
    what chosen and rejected begin with alike. "margin" may stand beside them. Left out are pairs
    whose answers do not differ, as far as they stay, and pairs without one of them.

    Args:
        max_length: of each sequence the first so many tokens stay.
        held_out, prompt_column: see `load_rows`.
        finish: how each answer is ended; a pair that is still too long is then left out, not cut.

    Raises:
        UserError: no such data, a column is missing, chosen and rejected do not differ, or no pair
            is left.
    """
    rows = load_rows(
        path_or_name, PREFERENCE_COLUMNS, held_out=held_out, prompt_column=prompt_column
    )
    pairs, places, tally = Loaded(), [], Tally(rows)
    for row, pair in enumerate(encoded(rows, lambda batch: encode_pairs(tokenizer, batch))):
        if finish is not None and pair is not None:
            pair = replace(pair, chosen=finish(pair.chosen), rejected=finish(pair.rejected))
        fitting, event = _fitting(pair, max_length, cut=finish is None)
        if event:
            tally.add(event, row)
        if fitting is not None:
            pairs.append(fitting)
            places.append(row)
    if not pairs:
        raise UserError(f"no pair is left: {'; '.join(tally.notes)}")
    pairs.notes = rows.notes + notes_of_tools(tokenizer, rows) + tally.notes
    pairs.extent = measured(
        rows,
        (
            (row, example.prompt + example.completion)
            for row, pair in zip(places, pairs, strict=True)
            for example in (pair.chosen, pair.rejected)
        ),
    )
    return pairs


def encode_pairs(tokenizer: Any, rows: Sequence[dict]) -> list[Pair | None]:
    """Each row's pair, uncut; None where an answer or the prompt has no tokens."""
    answers = [_with_prompt(row) for row in rows]
    chosen, rejected = (
        encode_completions(
            tokenizer,
            [{"prompt": answer["prompt"], "completion": answer[side]} for answer in answers],
        )
        for side in ("chosen", "rejected")
    )
    both = zip(chosen, rejected, map(_margin, rows), strict=True)
    return [None if None in pair[:2] else Pair(*pair) for pair in both]


def _margin(row: dict) -> float | None:
    margin = row.get("margin")
    try:
        return None if margin is None else float(margin)
    except (TypeError, ValueError):
        raise UserError(f"'margin' must be a number, not {margin!r:.80}") from None


def _fitting(
    pair: Pair | None, max_length: int | None, *, cut: bool
) -> tuple[Pair | None, str | None]:
    """What stays of a pair within `max_length` tokens, and what is to be said of that."""
    if pair is None:
        return None, "are left out: the prompt or an answer has no tokens"
    short = replace(
        pair,
        chosen=shortened(pair.chosen, max_length),
        rejected=shortened(pair.rejected, max_length),
    )
    if None in (short.chosen, short.rejected) or (len(short) < len(pair) and not cut):
        return None, f"are left out: an answer does not fit into max_length {max_length}"
    if short.chosen.completion == short.rejected.completion:
        how = "as tokens" if len(short) == len(pair) else f"once max_length {max_length} cut them"
        return None, f"are left out: their answers are the same {how}"
    return short, f"lose an answer's end to max_length {max_length}" if short != pair else None


def _with_prompt(row: dict) -> dict:
    """The row with a prompt of its own, taken off the beginning of both answers if need be."""
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise UserError("'chosen' and 'rejected' must both be text or both be messages")
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' are the same: nothing to prefer")
    if row.get("prompt") is not None:
        return row
    alike = (a == b for a, b in zip(chosen, rejected, strict=False))
    length = sum(itertools.takewhile(bool, alike))
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        # tokens keep the blank before a word
        length -= 1
    if not length:
        raise UserError("no 'prompt', and 'chosen' and 'rejected' begin differently")
    return {
        "prompt": chosen[:length],
        "chosen": chosen[length:],
        "rejected": rejected[length:],
    }


def collate_pairs(pairs: Sequence[Pair], pad_token_id: int) -> Batch:
    """(2B, P + C): B rows of chosen answers, then the B of rejected ones in the same order."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(rows, pad_token_id)


def margins(pairs: Sequence[Pair]) -> torch.Tensor | None:
    """(B,) float32, None where no pair has a margin; a pair without one among others has 0."""
    if all(pair.margin is None for pair in pairs):
        return None
    return torch.tensor([pair.margin or 0.0 for pair in pairs])
