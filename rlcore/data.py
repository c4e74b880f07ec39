"""Rows of data from a file or the hub, checked where they are read.

A row is TRL's: {"prompt", ...} for a policy to complete, {"prompt", "completion"}, {"text"} or
{"messages"} to imitate, {"prompt", "chosen", "rejected"} to prefer; prompts and completions are
text or chat messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlcore.errors import UserError

FILE_FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SFT_COLUMNS = (("prompt", "completion"), ("text",), ("messages",))
# without a prompt of their own, what chosen and rejected begin with alike is the prompt
PREFERENCE_COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def load_rows(
    path_or_name: str, required: Sequence[str] | Sequence[Sequence[str]] = ("prompt",)
) -> Any:
    """A `datasets.Dataset` from a file (.jsonl, .json, .csv, .parquet) or from the hub's name.

    Args:
        required: the columns that every row must have; or several such groups, of which the first
            row says which one the file keeps to.

    Raises:
        UserError: no such file, a malformed line, a row without a required column, a prompt that
            is neither text nor messages; file and line (or row) are named.
    """
    groups = (tuple(required),) if isinstance(required[0], str) else tuple(map(tuple, required))
    path = Path(path_or_name)
    if path.suffix == ".jsonl":
        return _from_jsonl(path, groups)
    rows = _from_datasets(path_or_name)
    numbered = enumerate(rows, start=1)
    if not sum(1 for _ in _checked(numbered, groups, path_or_name, "row")):
        raise UserError(f"the dataset {path_or_name!r} has no rows")
    return rows


def _from_jsonl(path: Path, groups: tuple[tuple[str, ...], ...]) -> Any:
    from datasets import Dataset

    if not path.is_file():
        raise UserError(f"no data file at {str(path)!r}")
    rows = list(_checked(_json_lines(path), groups, str(path), "line"))
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    try:
        return Dataset.from_list(_with_all_columns(rows))
    except Exception as error:
        # Arrow's complaint about a column of two types says which ones.
        raise UserError(f"{path}: the rows do not make one table: {error}") from error


def _with_all_columns(rows: list[dict]) -> list[dict]:
    """The rows with None where a column is missing: `Dataset.from_list` looks at the first only."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    if all(len(row) == len(names) for row in rows):
        return rows
    return [{name: row.get(name) for name in names} for row in rows]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}") from error


def _from_datasets(path_or_name: str) -> Any:
    from datasets import load_dataset

    path = Path(path_or_name)
    try:
        if path.suffix in FILE_FORMATS:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        return load_dataset(path_or_name, split="train")
    except Exception as error:
        # The loader raises a dozen error types, for networks, names, formats and splits.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load the dataset {path_or_name!r}: {reason[0]}") from error


def _checked(
    numbered: Iterable[tuple[int, Any]],
    groups: tuple[tuple[str, ...], ...],
    source: str,
    unit: str,
) -> Iterator[dict[str, Any]]:
    """Each row, once its required columns are found; `groups` narrows to what row one keeps to."""
    for number, row in numbered:
        where = f"{source}, {unit} {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
        fitting = [group for group in groups if all(row.get(name) is not None for name in group)]
        if not fitting:
            needed = " or ".join(" + ".join(map(repr, group)) for group in groups)
            found = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where}: needs the column {needed}; columns found: {found}")
        groups = fitting[:1]
        for name in groups[0]:
            _check_content(row[name], f"{where}: {name!r}")
        yield row


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    is_chat = isinstance(content, list) and content and all(map(_is_message, content))
    if not is_chat:
        raise UserError(
            f"{where} must be text or a list of messages "
            f'[{{"role": ..., "content": ...}}], not {content!r:.80}'
        )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()
