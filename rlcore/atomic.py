"""Directories that are whole or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST_FILE = "manifest.json"
_MAKES_WHOLE = (MANIFEST_FILE, "config.json", "adapter_config.json")


def staging_path(directory: Path, tag: str | int = "") -> Path:
    """The hidden sibling that `directory` is written in; nobody takes it for the directory."""
    directory = directory.absolute()
    return directory.with_name(f".{directory.name}.partial{tag}")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A fresh sibling of `directory` that takes its place when the block ends without an error."""
    staging = staging_path(directory, os.getpid())
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, directory: Path) -> None:
    """Flush `staging` to the disk and let it take the place of `directory`.

    Where `directory` holds something already, its other files stay, and what makes it loadable
    (config, manifest) goes first and comes back last: it never looks whole while it is not.
    """
    for path in staging.iterdir():
        _flush(path)
    _flush(staging)
    if directory.is_dir() and any(directory.iterdir()):
        _replace_files(staging, directory)
    else:
        os.replace(staging, directory)
    _flush(directory.parent)


def _replace_files(staging: Path, directory: Path) -> None:
    for name in _MAKES_WHOLE:
        (directory / name).unlink(missing_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name in _MAKES_WHOLE):
        os.replace(path, directory / path.name)
    staging.rmdir()


def _flush(path: Path) -> None:
    """Have the disk hold what `path` (a file or a directory) shows now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
