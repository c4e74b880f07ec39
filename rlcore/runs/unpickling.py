"""Reading a sharded checkpoint without running what stands in it.

torch.distributed.checkpoint keeps the index of a folder, and every value that is no tensor, as a
pickle, and a pickle may name any function to be called. Within `data_alone` both are read as data.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

_METADATA = "torch.distributed.checkpoint.metadata"
# what an index is made of
_KNOWN = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index; refuses every name that has no business in one."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


@contextlib.contextmanager
def data_alone() -> Iterator[None]:
    """torch.distributed.checkpoint runs nothing that it reads, for a while.

    Raises, where a file names anything but data: pickle.UnpicklingError.
    """
    from torch.distributed.checkpoint import default_planner, filesystem

    def load_index(file: Any) -> Any:
        return _IndexUnpickler(file).load()

    def load_value(file: Any, **options: Any) -> Any:
        return torch.load(file, **(options | {"weights_only": True}))

    # both modules look these names up when they read
    reading = SimpleNamespace(**vars(pickle) | {"load": load_index})
    loading = SimpleNamespace(**vars(torch) | {"load": load_value})
    with (
        mock.patch.object(filesystem, "pickle", reading),
        mock.patch.object(default_planner, "torch", loading),
    ):
        yield
