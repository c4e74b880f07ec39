"""Rows that are read as they are needed, and never all at once.

They come shuffled among `buffer_size` at a time: the buffer is filled, and then each row that comes
takes the place of one drawn from it.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlcore.data.encoding import Example
from rlcore.data.loaded import BATCH, Extent, Loaded
from rlcore.data.loading import check_rows
from rlcore.data.names import parts_of
from rlcore.data.readers import OPENERS, READERS, file_type, rows_of_file
from rlcore.data.rows import Part, Rows
from rlcore.data.tables import TABLES, cleaned, explained, split_of, written_types
from rlcore.data.tools import TOOLS
from rlcore.errors import UserError

LINES = (".jsonl", ".ndjson")
Item = TypeVar("Item")
Numbered = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Stream:
    """Examples without end: (how often the data was gone through before, Example).

    Attributes:
        source: a file of lines, a table's file, a directory or hub name, or several; or a
            datasets.IterableDataset.
        required: see `load_rows`.
        encode: makes Examples of rows.
        buffer_size: of the shuffling; 1 leaves the data in its order.
        seed: of the order.
        prompt_column: what the column "prompt" is called in the data.
        check: is told how long the sequences get that were read last, and may refuse them.
    """

    source: Any
    required: Sequence[Sequence[str]]
    encode: Callable[[Rows], Loaded]
    buffer_size: int
    seed: int
    prompt_column: str = "prompt"
    check: Callable[[Extent], None] = lambda extent: None

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        for epoch in itertools.count():
            order = random.Random(f"{self.seed} {epoch}")
            examples = itertools.chain.from_iterable(self._pieces())
            empty = True
            for example in shuffled(examples, self.buffer_size, order):
                empty = False
                yield epoch, example
            if empty:
                raise UserError(f"{_shown(self.source)}: no row is left")

    def first(self) -> Loaded:
        """The first examples, to know the data by.

        Raises:
            UserError: no such data, rows that do not work, or none that is left.
        """
        found = next(self._pieces(), Loaded())
        if not found:
            raise UserError(f"{_shown(self.source)}: no row is left: {'; '.join(found.notes)}")
        return found

    def _pieces(self) -> Iterator[Loaded]:
        """The examples of so many rows at a time, from the start to the end of the data."""
        is_names = isinstance(self.source, list | tuple)
        groups = tuple(map(tuple, self.required))
        for source in self.source if is_names else [self.source]:
            name, unit, numbered = _opened(source)
            while piece := list(itertools.islice(numbered, BATCH)):
                numbers, rows = zip(*piece, strict=True)
                rows = Rows(rows, [Part(name, unit, numbers)])
                rows = check_rows(rows, groups, self.prompt_column)
                groups = (rows.group,)
                loaded = self.encode(rows)
                self.check(loaded.extent)
                yield loaded


def shuffled(items: Iterable[Item], size: int, order: random.Random) -> Iterator[Item]:
    """The items, each at most `size` places early."""
    items = iter(items)
    held = list(itertools.islice(items, size))
    for item in items:
        place = order.randrange(len(held))
        yield held[place]
        held[place] = item
    order.shuffle(held)
    yield from held


def _opened(source: Any) -> tuple[str, str, Numbered]:
    """(what messages call it, what its rows are counted in, its rows from the first on)."""
    from datasets import IterableDataset, load_dataset

    if isinstance(source, IterableDataset):
        return "dataset", "row", _cleaned(source, "dataset")
    if not isinstance(source, str):
        raise UserError(
            "streaming reads names, or a datasets.IterableDataset, and dataset is a "
            f"{type(source).__name__}, which is here already: leave streaming out"
        )
    kind, is_file = file_type(source), Path(source).is_file()
    if kind in LINES:
        if not is_file:
            raise UserError(f"cannot load the dataset {source!r}: no data file at {source!r}")
        return source, "line", rows_of_file(source, source)
    if kind in TABLES and is_file:
        with explained(source):
            table = load_dataset(TABLES[kind], data_files=source, split="train", streaming=True)
        return source, "row", _cleaned(table, source)
    if is_file or kind in (*READERS, *TABLES):
        raise UserError(
            f"streaming reads {', '.join((*LINES, *TABLES))} files, the first two also with "
            f"{', '.join(OPENERS)} behind, directories and hub names, not {source!r}"
        )
    name, config, split = parts_of(source)
    with explained(name):
        split = split or split_of(name, config)
        table = load_dataset(name, config, split=split, streaming=True)
    return f"{name} ({split})", "row", _cleaned(table, name)


def _cleaned(table: Iterable[dict[str, Any]], name: str) -> Numbered:
    """Rows that the library datasets reads, what a template writes without null fields."""
    features = getattr(table, "features", None)
    clean = _cleaned_by_value
    if features is not None:
        clean = functools.partial(cleaned, written=written_types(features))
    with explained(name):
        for number, row in enumerate(table, start=1):
            yield number, clean(row)


def _cleaned_by_value(row: dict[str, Any]) -> dict[str, Any]:
    """Of data whose types are not known before they are read."""
    return {
        key: _without_null(value) if key == TOOLS or _is_chat(value) else value
        for key, value in row.items()
    }


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value
    )


def _without_null(value: Any) -> Any:
    """Without fields that are null, but for a message's content, which may be."""
    if isinstance(value, list):
        return [_without_null(each) for each in value]
    if not isinstance(value, dict):
        return value
    stays = {"content"} if "role" in value else set()
    return {k: _without_null(v) for k, v in value.items() if v is not None or k in stays}


def _shown(source: Any) -> str:
    names = source if isinstance(source, list | tuple) else [source]
    return " ".join(name if isinstance(name, str) else "dataset" for name in names)
