"""Data that the datasets library reads: Arrow tables, and directories and hub names with splits.

A table knows one type for a column, so whoever wrote it gave every nested object the fields of all
others. In chat messages and tools, which a template writes out, a field that is null is taken to be
absent; elsewhere values stay as the table has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from rlcore.data.readers import READERS, file_type, read_file
from rlcore.data.rows import Part, Rows, joined
from rlcore.data.tools import TOOLS
from rlcore.errors import UserError, reasons_of

TABLES = {".parquet": "parquet", ".arrow": "arrow"}
TRAIN_SPLITS = ("train",)
HELD_OUT_SPLITS = ("validation", "test", "train")


def read_table(path: str) -> Rows:
    """The rows of a .parquet or .arrow file.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import load_dataset

    with explained(path):
        return _rows(load_dataset(TABLES[file_type(path)], data_files=path, split="train"), path)


def read_split(
    name: str,
    *,
    held_out: bool,
    text: Collection[str],
    config: str | None = None,
    split: str | None = None,
) -> Rows:
    """The rows of a directory's or hub dataset's split; text files in it are read by `read_file`.

    Args:
        held_out: take "validation" or "test" where there is one, and not "train".
        text: see `read_file`.
        config: the dataset's configuration of that name.
        split: that split, whatever `held_out` says; also a part of it, as "train[:10%]".

    Raises:
        UserError: there is no such dataset, it cannot be read, or which split to take is not clear.
    """
    from datasets import DownloadManager, ReadInstruction, load_dataset, load_dataset_builder

    with explained(name):
        builder = load_dataset_builder(name, config)
        splits = _splits(builder)
        split = split or _choose(name, list(splits), held_out)
        if split.partition("[")[0] not in splits:
            known = ", ".join(splits) or "none"
            raise UserError(f"the dataset {name!r} has the splits {known}, and not {split!r}")
        whole = split.partition("[")[0]
        files = list(splits[whole]) if builder.config.data_files else []
        are_text = {file_type(file) for file in files} <= READERS.keys()
        if files and are_text and _has_defaults(builder.config):
            shown = [f"{name.rstrip('/')}/{Path(file).name}" for file in files]
            local = DownloadManager().download(files)
            rows = joined([read_file(*file, text) for file in zip(local, shown, strict=True)])
            if split != whole:
                (cut,) = ReadInstruction.from_spec(split).to_absolute({whole: len(rows)})
                rows = rows.part(cut.from_ or 0, len(rows) if cut.to is None else cut.to)
        else:
            rows = _rows(load_dataset(name, config, split=split), f"{name} ({split})")
    rows.notes = (f"{name}: the {len(rows)} rows of its split {split!r}",)
    return rows


def split_of(name: str, config: str | None) -> str:
    """The split of a directory's or hub dataset to train on.

    Raises:
        UserError: it is not clear which.
    """
    from datasets import load_dataset_builder

    return _choose(name, list(_splits(load_dataset_builder(name, config))), held_out=False)


def _splits(builder: Any) -> dict[str, Any]:
    """{split: files} of a dataset."""
    found = builder.config.data_files or builder.info.splits or {}
    return {str(split): files for split, files in found.items()}


def read_dataset(dataset: Any, option: str) -> Rows:
    """The rows of a datasets.Dataset, or of a list of dicts, that a caller has in the hand.

    Args:
        option: what messages call it.

    Raises:
        UserError: something else.
    """
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return _rows(dataset, option)
    if isinstance(dataset, Sequence) and all(isinstance(row, Mapping) for row in dataset):
        return Rows(list(dataset), [Part(option, "row", range(1, len(dataset) + 1))])
    kind = type(dataset).__name__
    hint = {
        "DatasetDict": f": give one of its splits, as {option}['train']",
        "IterableDataset": ": say streaming, or give datasets.Dataset.from_list(list(rows))",
        "DataFrame": ": give datasets.Dataset.from_pandas(frame)",
    }
    raise UserError(
        f"{option} must be a name, a datasets.Dataset or a list of rows, not "
        f"{kind}{hint.get(kind, '')}"
    )


def _choose(name: str, splits: Sequence[str], held_out: bool) -> str:
    for split in HELD_OUT_SPLITS if held_out else TRAIN_SPLITS:
        if split in splits:
            return split
    if len(splits) == 1:
        return splits[0]
    raise UserError(
        f"the dataset {name!r} has the splits {', '.join(splits) or 'none'}, and none of them is "
        f"called {' or '.join(HELD_OUT_SPLITS if held_out else TRAIN_SPLITS)}"
    )


def _has_defaults(config: Any) -> bool:
    """Whether the dataset's card asks for nothing of the files' reader."""
    own = {"name", "version", "data_dir", "data_files", "description"}
    plain = type(config)()
    names = {field.name for field in dataclasses.fields(config)} - own
    return all(getattr(config, name) == getattr(plain, name) for name in names)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Errors of the library as one of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The library raises a dozen error types, for networks, names, formats and splits.
        raise UserError(f"cannot load the dataset {name!r}: {reasons_of(error)}") from error


def _rows(dataset: Any, source: str) -> Rows:
    schema, written = dataset.features.arrow_schema, written_types(dataset.features)
    rows = Rows(
        _Table(dataset, written),
        [Part(source, "row", range(1, len(dataset) + 1))],
        dataset.column_names,
    )
    rows.null_fields = tuple(
        field.name
        for field in schema
        if field.name not in written
        and any(map(_has_null_fields, dataset.data.column(field.name).chunks))
    )
    return rows


class _Table(Sequence):
    """A dataset as rows, with what a template writes, columns of {name: type}, cleaned."""

    def __init__(self, dataset: Any, written: dict[str, pa.DataType]):
        self._dataset = dataset
        self._written = written

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._cleaned(self._dataset[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._cleaned, self._dataset)

    def _cleaned(self, row: dict[str, Any]) -> dict[str, Any]:
        return cleaned(row, self._written)


def written_types(features: Any) -> dict[str, pa.DataType]:
    """{name: type} of the columns that a template writes, of a dataset's features."""
    return {f.name: f.type for f in features.arrow_schema if _is_chat(f.type) or f.name == TOOLS}


def cleaned(row: dict[str, Any], written: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """The row, its columns of `written` without the null fields that their types brought."""
    return row | {name: _clean(row[name], kind) for name, kind in written.items()}


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _field_names(kind: pa.DataType) -> list[str]:
    return [kind.field(place).name for place in range(kind.num_fields)]


def _is_chat(kind: pa.DataType) -> bool:
    """A list of messages."""
    return (
        _is_list(kind)
        and types.is_struct(kind.value_type)
        and {"role", "content"} <= set(_field_names(kind.value_type))
    )


def _clean(value: Any, kind: pa.DataType) -> Any:
    """Without fields that are null, but for a message's content, which may be."""
    if isinstance(value, list) and _is_list(kind):
        return [_clean(each, kind.value_type) for each in value]
    if isinstance(value, dict) and types.is_struct(kind):
        names = _field_names(kind)
        stays = {"content"} if "role" in names else ()
        return {
            name: _clean(value[name], kind.field(name).type)
            for name in names
            if value[name] is not None or name in stays
        }
    return value


def _has_null_fields(array: pa.Array) -> bool:
    """Whether an object somewhere in it has a field that is null."""
    if types.is_struct(array.type):
        fields = array.flatten()  # null wherever their object is
        return any(each.null_count > array.null_count or _has_null_fields(each) for each in fields)
    return _is_list(array.type) and _has_null_fields(array.flatten())
