"""Tokenized rows, what was lost on the way to them, and what they ask of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlcore.data.rows import Rows
from rlcore.errors import UserError, reasons_of

BATCH = 1024


@dataclass(frozen=True)
class Extent:
    """How long token sequences get and how high their ids are, and in which row."""

    length: int = 0
    longest: str = ""
    token_id: int = -1
    highest: str = ""


class Loaded(list):
    """Tokenized rows.

    Attributes:
        notes: what the user should be told of the data.
        extent: of all its sequences.
    """

    notes: tuple[str, ...] = ()
    extent: Extent = Extent()


class Tally:
    """How many rows something happens to, and which is the first."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._rows_by_event: dict[str, list[int]] = {}

    def add(self, event: str, row: int) -> None:
        """Something happens to a row: "are left out"."""
        self._rows_by_event.setdefault(event, []).append(row)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line of what happened; none where nothing did."""
        parts = [
            f"{len(rows)} {event} (the first: {self._rows.where(rows[0])})"
            for event, rows in self._rows_by_event.items()
        ]
        return (f"of {len(self._rows)} rows {'; '.join(parts)}",) if parts else ()


def encoded(rows: Rows, encode: Callable[[list[dict]], Sequence[Any]]) -> Iterator[Any]:
    """What `encode` makes of each row, of many at a time.

    Raises:
        UserError: what it raises, with the place of the row that it cannot do.
    """
    rest = iter(rows)
    for start in itertools.count(step=BATCH):
        batch = list(itertools.islice(rest, BATCH))
        if not batch:
            return
        try:
            results = encode(batch)
        except Exception:
            # Chat templates and tokenizers raise what they like.
            _name_the_row(rows, start, batch, encode)
            raise
        yield from results


def _name_the_row(rows: Rows, start: int, batch: list[dict], encode: Callable) -> None:
    for index, row in enumerate(batch, start):
        try:
            encode([row])
        except Exception as error:
            raise UserError(f"{rows.where(index)}: {reasons_of(error)}") from error


def measured(rows: Rows, sequences: Iterable[tuple[int, Sequence[int]]]) -> Extent:
    """The extent of (row, token ids) after (row, token ids)."""
    length, longest, token_id, highest = 0, 0, -1, 0
    for row, ids in sequences:
        if len(ids) > length:
            length, longest = len(ids), row
        if (top := max(ids, default=-1)) > token_id:
            token_id, highest = top, row
    return Extent(length, rows.where(longest), token_id, rows.where(highest))
