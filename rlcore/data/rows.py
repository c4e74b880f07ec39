"""Rows of data in the hand: as their files have them, each with the place it comes from."""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one source, for messages."""

    source: str  # a file, or a dataset's name
    unit: str  # what its rows are counted in: "line" or "row"
    numbers: Sequence[int]  # one a row


class Rows:
    """Rows of named values; what a row holds is never changed to agree with other rows.

    `rows[3]` is the row {name: value}; `rows[2:5]` and `rows[[4, 1]]` are columns {name: values},
    and `rows["answer"]` is one column. In a column a row that lacks it has None.

    Args:
        rows: dicts in order, in memory or read when they are asked for.
        parts: where they come from, in the same order.
        names: the columns' names; None: all that any row has.

    Attributes:
        notes: what the user should be told of where they come from.
        null_fields: columns whose nested objects have null fields, be it that they lack them.
        group: the required columns that every row has.
        extent: of its prompts, once they were encoded.
    """

    notes: tuple[str, ...] = ()
    null_fields: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    extent: Any = None

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        parts: Sequence[Part],
        names: Iterable[str] | None = None,
    ):
        self._rows = rows
        self._parts = tuple(parts)
        self._names = _all_names(rows) if names is None else dict.fromkeys(names)
        self.column_names = list(self._names)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._selected, self._rows)

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        if isinstance(key, str):
            return [row.get(key) for row in self]
        if isinstance(key, int):
            return self._selected(self._rows[key])
        indices = range(len(self))[key] if isinstance(key, slice) else key
        picked = [self[index] for index in indices]
        # Copies: a reward function may do what it likes with its columns.
        return copy.deepcopy(
            {name: [row.get(name) for row in picked] for name in self.column_names}
        )

    def select_columns(self, names: Iterable[str]) -> Rows:
        """The same rows with these columns alone."""
        return Rows(self._rows, self._parts, names)

    def renamed(self, old: str, new: str) -> Rows:
        """The same rows with a column called otherwise, in place of one that has its new name."""
        names = dict.fromkeys(new if name == old else name for name in self.column_names)
        rows = self.mapped(functools.partial(_renamed, old, new), names)
        rows.null_fields = tuple(new if name == old else name for name in self.null_fields)
        return rows

    def mapped(
        self, change: Callable[[Any], dict[str, Any]], names: Iterable[str] | None = None
    ) -> Rows:
        """The same rows as `change` has each; `names` are their columns, None: those of before."""
        rows = Rows(_Mapped(self._rows, change), self._parts, names or self._names)
        rows.notes, rows.null_fields = self.notes, self.null_fields
        return rows

    def part(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to and without `stop`."""
        parts, before = [], 0
        for part in self._parts:
            numbers = part.numbers[max(start - before, 0) : max(stop - before, 0)]
            parts.append(replace(part, numbers=numbers))
            before += len(part.numbers)
        chosen = [self._rows[index] for index in range(len(self))[start:stop]]
        return Rows(chosen, parts, self._names)

    def where(self, index: int) -> str:
        """The place of a row, for messages: "rows.jsonl, line 7"."""
        for part in self._parts:
            if index < len(part.numbers):
                return f"{part.source}, {part.unit} {part.numbers[index]}"
            index -= len(part.numbers)
        raise IndexError(index)

    def _selected(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name in self._names}


class _Mapped(Sequence):
    """Rows as `change` has each, when it is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], change: Callable[[Any], dict[str, Any]]):
        self._rows, self._change = rows, change

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._change(self._rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._change, self._rows)


def _renamed(old: str, new: str, row: Mapping[str, Any]) -> dict[str, Any]:
    if old not in row:
        return {name: value for name, value in row.items() if name != new}
    return {new: row[old], **{name: row[name] for name in row if name not in (old, new)}}


def joined(pieces: Sequence[Rows]) -> Rows:
    """The rows of all pieces, one after another; each is read when it is asked for."""
    rows = Rows(
        _Chain([piece._rows for piece in pieces]),
        [part for piece in pieces for part in piece._parts],
        [name for piece in pieces for name in piece.column_names],
    )
    rows.notes = tuple(note for piece in pieces for note in piece.notes)
    rows.null_fields = tuple(dict.fromkeys(n for piece in pieces for n in piece.null_fields))
    return rows


class _Chain(Sequence):
    """Sequences one after another."""

    def __init__(self, pieces: Sequence[Sequence[Any]]):
        self._pieces = pieces
        self._ends = list(itertools.accumulate(map(len, pieces)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        place = bisect.bisect_right(self._ends, index)
        return self._pieces[place][index - self._ends[place]]  # counted from its end

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(*self._pieces)


def _all_names(rows: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return names
