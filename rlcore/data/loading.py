"""Rows of data from a file, a directory or the hub, checked where they are read.

A row is TRL's: {"prompt", ...} for a policy to complete, {"prompt", "completion"}, {"text"} or
{"messages"} to imitate, {"prompt", "chosen", "rejected"} to prefer; prompts and completions are
text or chat messages, and then "tools" may stand beside them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlcore.data.names import parts_of
from rlcore.data.readers import OPENERS, READERS, file_type, read_file
from rlcore.data.rows import Rows, joined
from rlcore.data.tools import TOOLS, read_tools, told_of_tools
from rlcore.errors import UserError

SFT_COLUMNS = (("prompt", "completion"), ("text",), ("messages",))
# without a prompt of their own, what chosen and rejected begin with alike is the prompt
PREFERENCE_COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def load_rows(
    path_or_name: Any,
    required: Sequence[str] | Sequence[Sequence[str]] = ("prompt",),
    *,
    held_out: bool = False,
    prompt_column: str = "prompt",
) -> Rows:
    """The rows of a file, or of a split of a directory or hub dataset; of several, one by one.

    Of a .jsonl, .ndjson, .json or .csv file, compressed (.gz, .bz2, .xz) or not, the values come as
    they stand there; a .parquet or .arrow file knows one type for a column.

    Args:
        required: the columns that every row must have; or several such groups, of which the first
            row says which one the data keeps to.
        path_or_name: a str or several; or a datasets.Dataset, or a list of rows, dicts, in their
            place. NAME:CONFIG/SPLIT names a dataset's configuration and split; either may be
            left out.
        held_out: of several splits take "validation" or "test" instead of "train".
        prompt_column: what the column "prompt" is called in the data.

    Raises:
        UserError: no such data, a malformed line, a row without a required column, a prompt that
            is neither text nor messages; file and line (or row) are named.
    """
    groups = (tuple(required),) if isinstance(required[0], str) else tuple(map(tuple, required))
    are_names = isinstance(path_or_name, list | tuple) and isinstance(
        next(iter(path_or_name), 0), str
    )
    names = list(path_or_name) if are_names else [path_or_name]
    text = {prompt_column if name == "prompt" else name for name in itertools.chain(*groups)}
    pieces = [_read(name, text, held_out) for name in names]
    rows = pieces[0] if len(pieces) == 1 else joined(pieces)
    if not len(rows):
        raise UserError(f"{path_or_name}: the file has no rows")
    return check_rows(rows, groups, prompt_column)


def check_rows(rows: Rows, groups: Sequence[tuple[str, ...]], prompt_column: str) -> Rows:
    """The rows with the column "prompt" called so, and tools beside their messages.

    Raises:
        UserError: a row that does not work, which is named.
    """
    if prompt_column != "prompt":
        if prompt_column not in rows.column_names:
            found = ", ".join(map(repr, rows.column_names))
            raise UserError(
                f"prompt_column {prompt_column!r} is no column of the data, but {found}"
            )
        rows = rows.renamed(prompt_column, "prompt")
    group = _check(rows, groups)
    if TOOLS in rows.column_names:
        rows = rows.mapped(functools.partial(told_of_tools, names=group))
    rows.group = group
    return rows


def _read(path_or_name: Any, text: Collection[str], held_out: bool) -> Rows:
    from rlcore.data.tables import TABLES, read_dataset, read_split, read_table

    if not isinstance(path_or_name, str):
        return read_dataset(path_or_name, "eval_dataset" if held_out else "dataset")
    path, kind = Path(path_or_name), file_type(path_or_name)
    is_ours = kind in READERS
    is_table = kind in TABLES and path.suffix.lower() == kind
    if not is_ours and not is_table:
        if path.is_file():
            known = ", ".join((*READERS, *TABLES))
            raise UserError(
                f"cannot load the dataset {path_or_name!r}: a file's name must end in one of "
                f"{known}, the first {len(READERS)} also with {', '.join(OPENERS)} behind"
            )
        name, config, split = parts_of(path_or_name)
        if Path(name).is_file():
            raise UserError(f"{path_or_name}: {name} is a file, without configurations or splits")
        return read_split(name, held_out=held_out, text=text, config=config, split=split)
    if not path.is_file():
        raise UserError(f"cannot load the dataset {path_or_name!r}: no data file at {str(path)!r}")
    return read_file(path, text=text) if is_ours else read_table(path_or_name)


def _check(rows: Rows, groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The group that every row has; it is the one that row one keeps to."""
    for index, row in enumerate(rows):
        fitting = [group for group in groups if all(row.get(name) is not None for name in group)]
        if not fitting:
            raise UserError(f"{rows.where(index)}: {_lacking(row, groups)}")
        groups = fitting[:1]
        for name in groups[0]:
            if not _is_content(row[name]):
                raise UserError(
                    f"{rows.where(index)}: {name!r} must be text or a list of messages "
                    f'[{{"role": ..., "content": ...}}], not {row[name]!r:.80}'
                )
        try:
            read_tools(row.get(TOOLS) if _has_messages(row, groups[0]) else None)
        except UserError as error:
            raise UserError(f"{rows.where(index)}: {error}") from error
    return groups[0]


def _has_messages(row: dict[str, Any], group: tuple[str, ...]) -> bool:
    return any(isinstance(row[name], list) for name in group)


def _lacking(row: dict[str, Any], groups: tuple[tuple[str, ...], ...]) -> str:
    needed = " or ".join(" + ".join(map(repr, group)) for group in groups)
    names = dict.fromkeys(itertools.chain(*groups))
    null = [repr(name) for name in names if name in row and row[name] is None]
    if null:
        return f"needs the column {needed}; {' and '.join(null)} is null"
    return f"needs the column {needed}; columns found: {', '.join(map(repr, row)) or 'none'}"


def _is_content(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_message, value))
    return isinstance(value, str)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()
