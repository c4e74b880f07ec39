"""Files and directories that are whole or absent: written beside their place, flushed, renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rlcore.errors import UserError

MANIFEST_FILE = "manifest.json"
IN_PLACE = "model"  # what is written for a directory that is there already
_MAKES_WHOLE = (MANIFEST_FILE, "config.json", "adapter_config.json")
# how the libraries that write in C++ and Rust say that the disk took no more
_DISK_ERROR = re.compile(r"os error \d+|I/O error|inline_container|PytorchStreamWriter")
_THREADS = 4
_BLOCK = 1 << 20


def staging_path(directory: Path, tag: str | int = "") -> Path:
    """The hidden sibling that `directory` is written in; nobody takes it for the directory."""
    directory = directory.absolute()
    return directory.with_name(f".{directory.name}.partial{tag}")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A fresh sibling of `directory` that takes its place when the block ends without an error.

    A directory that is there may be a mount or a link, with another disk beside it: then what is
    yielded lies in it, and its files take their places one by one.

    Raises UserError, and leaves nothing, where the disk is full or cannot be written.
    """
    place = directory / IN_PLACE if directory.is_dir() else directory.absolute()
    staging = staging_path(place, os.getpid())
    remove_leftovers(staging.parent, re.escape(place.name))
    with writing(directory):
        try:
            staging.mkdir(parents=True)
            with _held(staging):
                yield staging
                publish(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """The same for a single file."""
    staging = staging_path(path)
    with writing(path):
        try:
            yield staging
            _flush(staging)
            os.replace(staging, path)
            _flush(path.parent)
        finally:
            staging.unlink(missing_ok=True)


def remove_leftovers(parent: Path, names: str) -> None:
    """Remove what dead processes left half written of what `names`, a regex, matches."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if re.fullmatch(rf"\.({names})\.partial\d*", path.name) and not _is_held(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError where writing `path` fails in the block; it says what the disk has left."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _DISK_ERROR.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"cannot write {path}: {reason} ({_free(path)} free there); nothing half written is "
            "left of it"
        ) from error


def publish(staging: Path, directory: Path) -> None:
    """Flush `staging` to the disk and let it take the place of `directory`.

    Where `directory` holds something already, its other files stay, and what makes it loadable
    (config, manifest) goes first and comes back last: it never looks whole while it is not.
    """
    for path in (*staging.rglob("*"), staging):
        _flush(path)
    if directory.is_dir() and any(directory.iterdir()):
        _replace_files(staging, directory)
    else:
        os.replace(staging, directory)
    _flush(directory.parent)


def fingerprints(directory: Path) -> dict[str, dict[str, int | str]]:
    """{name: {"bytes", "sha256"}} of all files below `directory`, flushed to the disk meanwhile."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(_THREADS) as processor:
        # the disk writes while the processor computes
        flushed = [disk.submit(_flush, path) for path in paths]
        sums = list(processor.map(sha256, paths))
        for each in flushed:
            each.result()
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, sums, strict=True)
    }


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _replace_files(staging: Path, directory: Path) -> None:
    for name in _MAKES_WHOLE:
        (directory / name).unlink(missing_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name in _MAKES_WHOLE):
        target = directory / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()


def _flush(path: Path) -> None:
    """Have the disk hold what `path` (a file or a directory) shows now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Mark `directory` as being written: the mark goes with the process, however that ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # a file system without locks: nobody else can take it then, and its remains stay
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _free(path: Path) -> str:
    """What is free on the disk of `path`: "12.3 MB"."""
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB"
