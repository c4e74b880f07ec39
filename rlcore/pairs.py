"""Preference pairs as token ids, and as padded batches of [chosen; rejected] rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data import PREFERENCE_COLUMNS, load_rows
from rlcore.encoding import Batch, Example, collate, encode_completions
from rlcore.errors import UserError


@dataclass(frozen=True)
class Pair:
    """Two tokenized answers to one prompt, the better one first."""

    chosen: Example
    rejected: Example
    margin: float | None = None  # by how much it is better

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def load_pairs(tokenizer: Any, path_or_name: str, max_length: int | None) -> list[Pair]:
    """The preference pairs of a data file or hub dataset, tokenized.

    A row is {"prompt", "chosen", "rejected"}, text or messages, or without "prompt": it is then
    what chosen and rejected begin with alike. "margin" may stand beside them. Of each sequence the
    first `max_length` tokens stay; a pair that this leaves without one of its answers drops out.

    Raises:
        UserError: no such data, a column is missing, chosen and rejected do not differ, or no pair
            is left.
    """
    rows = load_rows(path_or_name, PREFERENCE_COLUMNS)
    margins = rows["margin"] if "margin" in rows.column_names else [None] * len(rows)
    answers = [_with_prompt(row, f"{path_or_name}, row {n}") for n, row in enumerate(rows, 1)]
    chosen, rejected = (
        encode_completions(
            tokenizer,
            [{"prompt": answer["prompt"], "completion": answer[side]} for answer in answers],
            max_length,
        )
        for side in ("chosen", "rejected")
    )
    both = zip(chosen, rejected, margins, strict=True)
    pairs = [Pair(*pair) for pair in both if None not in pair[:2]]
    if not pairs:
        raise UserError(f"{path_or_name}: no pair has both answers within max_length tokens")
    return pairs


def _with_prompt(row: dict, where: str) -> dict:
    """The row with a prompt of its own, taken off the beginning of both answers if need be."""
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    if chosen == rejected:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same: nothing to prefer")
    if row.get("prompt") is not None:
        return row
    alike = (a == b for a, b in zip(chosen, rejected, strict=False))
    length = sum(itertools.takewhile(bool, alike))
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        # tokens keep the blank before a word
        length -= 1
    if not length:
        raise UserError(f"{where}: no 'prompt', and 'chosen' and 'rejected' begin differently")
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
