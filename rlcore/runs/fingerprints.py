"""Short names for what data and models hold, to tell whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16
_BLOCKS = 16  # of each file: training moves every weight, so any sample of them shows it
_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer*", "chat_template*")


def of_rows(rows: Iterable[Any]) -> str:
    """The fingerprint of rows in their order, all columns of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def of_model(directory: Path) -> str:
    """The fingerprint of a model's directory: of a sample of its weights, and of its tokenizer."""
    digest = hashlib.sha256()
    files = {path for pattern in _MODEL_FILES for path in directory.glob(pattern)}
    for path in sorted(filter(Path.is_file, files)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek(max(size - _BLOCK, 0) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
