"""Text files of data into rows: JSON Lines, JSON and CSV, compressed or not.

Read here, because a reader that makes one table of them gives every row the keys of all others and
every value the type of its column.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from rlcore.data.rows import Part, Rows
from rlcore.errors import UserError

OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOOLEANS = {"true": True, "false": False}
NOT_FINITE = {"nan", "inf", "-inf"}
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def file_type(name: str | Path) -> str:
    """The ending that says what a file holds, in lower case: .jsonl of rows.JSONL.gz."""
    path = Path(str(name).lower())
    return (path.with_suffix("") if path.suffix in OPENERS else path).suffix


def read_file(path: str | Path, name: str | None = None, text: Collection[str] = ()) -> Rows:
    """The rows of a file whose type is in `READERS`, as they stand there.

    Args:
        name: what messages call it, and whose ending tells its type; None: its path.
        text: columns of a CSV file that stay text, even where every value is a number.

    Raises:
        UserError: it is not what its name says, or not UTF-8; the line or row is named.
    """
    name = str(path) if name is None else name
    found = list(rows_of_file(path, name))
    numbers, rows = [number for number, _ in found], [row for _, row in found]
    unit, read = READERS[file_type(name)]
    if read is _csv_rows:
        _type_columns(rows, text)
    return Rows(rows, [Part(name, unit, numbers)])


def rows_of_file(path: str | Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of such a file, as it is read; a CSV file's values are text.

    Raises:
        UserError: what `read_file` raises.
    """
    unit, read = READERS[file_type(name)]
    opener = OPENERS.get(Path(name).suffix.lower(), open)
    try:
        # A byte order mark is no part of the text. The CSV reader wants newlines as they are.
        newline = "" if read is _csv_rows else None
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as lines:
            for number, row in read(lines, name):
                if not isinstance(row, dict):
                    place, kind = f"{name}, {unit} {number}", type(row).__name__
                    raise UserError(f"{place}: a row must be a JSON object, not {kind}")
                yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text: {error}") from error
    except BROKEN as error:
        raise UserError(f"{name}: cannot be read: {error}") from error


def _json_lines(lines: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                # its own message counts lines within this one
                place = f"{name}, line {number}, column {error.colno}"
                raise UserError(f"{place}: not JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}, line {number}: not JSON: {error}") from error


def _json_values(file: TextIO, name: str) -> Iterator[tuple[int, Any]]:
    """The entries of a list, or values one after another, each on one line or on several."""
    try:
        values = list(_decoded(file.read()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    if len(values) == 1 and isinstance(values[0], list):
        (values,) = values
    yield from enumerate(values, start=1)


def _decoded(text: str) -> Iterator[Any]:
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    place = blanks.match(text).end()
    while place < len(text):
        value, place = decode(text, place)
        yield value
        place = blanks.match(text, place).end()


def _csv_rows(file: TextIO, name: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Rows of text, with None for an empty cell."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(file, strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise UserError(f"{name}: the header names the column {twice!r} twice")
        for number, cells in enumerate(filter(None, lines), start=1):
            if len(cells) != len(header):
                raise UserError(
                    f"{name}, row {number}: {len(cells)} cells, but the header names "
                    f"{len(header)} columns"
                )
            yield number, dict(zip(header, (cell or None for cell in cells), strict=True))
    except csv.Error as error:
        raise UserError(f"{name}, line {lines.line_num}: not CSV: {error}") from error


def _type_columns(rows: list[dict[str, Any]], text: Collection[str]) -> None:
    """Make numbers of a column where writing them gives each cell's own text, or booleans of it.

    So 007, 1.50 and a code among names stay text, and 1 beside an empty cell does not become 1.0.
    """
    for name in set(rows[0] if rows else ()) - set(text):
        cells = {row[name] for row in rows} - {None}
        for parse in (_boolean, _number):
            values = {cell: parse(cell) for cell in cells}
            if None not in values.values():
                for row in rows:
                    row[name] = values.get(row[name])
                break


def _boolean(text: str) -> bool | None:
    return BOOLEANS.get(text.lower())


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if str(value) == text and text not in NOT_FINITE:
            return value
    return None


READERS: dict[str, tuple[str, Callable[[TextIO, str], Iterator[tuple[int, Any]]]]] = {
    ".jsonl": ("line", _json_lines),
    ".ndjson": ("line", _json_lines),
    ".json": ("row", _json_values),
    ".csv": ("row", _csv_rows),
}
