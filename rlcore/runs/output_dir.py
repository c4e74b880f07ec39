"""The directory that a run writes into: one run at a time, and an old one goes last.

    output_dir/.rlcore-lock   held while a run writes there
    output_dir/.rlcore-run    the record of what runs wrote: nothing else is ever moved or deleted
    output_dir/.replaced      an earlier run, until the one that replaces it has finished

A run that ends before its first result puts the earlier one back; one that was killed leaves that
to the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlcore.errors import UserError
from rlcore.runs.atomic import IN_PLACE
from rlcore.runs.checkpoint import checkpoints, newest_intact
from rlcore.runs.locking import LOCK_FILE, check_unlocked, locked
from rlcore.runs.run_record import RECORD_FILE, is_sealed, read_record

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
COMPLETIONS_TABLE = "completions.parquet"
CONFIG_FILE = "training.yaml"
PAGE = "report.html"  # for the readers of a finished run, like the card
CARD = "README.md"  # the user's own, unless it is sealed
BEST = "best"  # the model that did best on what is held out
REPLACED = ".replaced"
_HALF_MOVED = ".replaced.partial"  # on its way into REPLACED, or back from there
# what runs write besides what their record names: without a result, and with one
_EARLY = {METRICS_FILE, COMPLETIONS_FILE, CONFIG_FILE, RECORD_FILE, "tensorboard", "wandb"}
_EARLY |= {"swanlab", "metrics.partial", "completions.partial"}
_PIECES = (
    rf"checkpoint-\d+|{BEST}|value_model|value_head\.safetensors"  # what a run writes as a whole
)
STAGED = rf"{_PIECES}|{IN_PLACE}"  # what it may leave half written
_RESULTS = re.compile(_PIECES)
_HALF_WRITTEN = re.compile(rf"\.({STAGED})\.partial\d*")


def check_output_dir(
    directory: str | Path, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Raise UserError where a run may not write into `directory`; touches nothing."""
    directory = Path(directory)
    if overwrite and resume:
        raise UserError("resume and overwrite_output_dir exclude each other: go on, or replace")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output directory {directory} is a file")
    # a slower process of the same run would meet the lock that its first one holds by now
    if os.environ.get("RANK", "0") == "0":
        check_unlocked(directory)
    _check_free(directory, overwrite, resume)


def check_apart(directory: str | Path, inputs: Mapping[str, str | None]) -> None:
    """Raise UserError where an input lies in the output directory, or that in an input.

    Args:
        inputs: {what: its path}; what is not on this machine (a hub's name, None) is nowhere.
    """
    output = Path(directory).resolve()
    for name, given in inputs.items():
        if given is None or not Path(given).exists():
            continue
        path = Path(given).resolve()
        if _lies_in(path, output):
            raise UserError(
                f"{name} {given} lies in output_dir {directory}, which the run writes over: choose "
                "another output_dir"
            )
        if _lies_in(output, path):
            raise UserError(
                f"output_dir {directory} lies in {name} {given}: choose one outside of it"
            )


def last_resumable(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of the run that `--resume` goes on with, or None."""
    found = [step for home in _homes(Path(directory)) for step in checkpoints(home)]
    return max(found)[1] if found else None


def last_intact(directory: str | Path) -> tuple[Path, list[str]]:
    """The same after every byte was read, and a line on each newer one that is damaged.

    Raises:
        UserError: there is none.
    """
    return newest_intact(_homes(Path(directory)))


def file_of_run(directory: str | Path, name: str) -> Path | None:
    """That file of the run that `--resume` goes on with; None where it has none."""
    places = (home / name for home in _homes(Path(directory)))
    return next((place for place in places if place.is_file()), None)


@contextlib.contextmanager
def claimed(
    directory: str | Path, *, overwrite: bool = False, resume: bool = False
) -> Iterator[list[str]]:
    """Hold `directory` for one run, made and empty but for what no run wrote (main process only).

    Enter it when model and data are loaded, so that a mistake there costs no earlier run. When
    the block ends without an error, the run that was there before is deleted; when it raises
    before the new run's first result, that run is back. Yields what the user should know.

    Raises:
        UserError: the directory is not free, another run holds it, or it cannot be written.
    """
    directory = Path(directory)
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.callback(discard_empty, directory)
        with _explained(directory):
            works = held.enter_context(locked(directory))
            _put_back(directory)
            _check_free(directory, overwrite, resume)
            aside = None if resume else _set_aside(directory)
        notes = [] if works else [f"no file locks in {directory}: nothing keeps a second run out"]
        if aside:
            notes.append(f"the earlier run is kept in {aside} until this one has finished")
        try:
            yield notes
        except BaseException:
            if not _has_result(directory):
                _clear(directory)
                _put_back(directory)
            raise
        shutil.rmtree(directory / REPLACED, ignore_errors=True)


def discard_empty(directory: str | Path) -> None:
    """Remove an empty metrics file, and the directory where there is nothing else in it."""
    metrics = Path(directory) / METRICS_FILE
    with contextlib.suppress(OSError):
        if metrics.stat().st_size == 0:
            metrics.unlink()
    with contextlib.suppress(OSError):
        Path(directory).rmdir()


def _check_free(directory: Path, overwrite: bool, resume: bool) -> None:
    if resume:
        if last_resumable(directory) is None:
            kept = directory / REPLACED
            hint = f" (the run before it is kept in {kept})" if kept.is_dir() else ""
            raise UserError(
                f"nothing to resume: {directory} holds no complete checkpoint{hint}; start "
                "without --resume"
            )
        return
    if not directory.is_dir() or _is_free(directory):
        return
    if not overwrite:
        raise UserError(
            f"output directory {directory} is not empty: choose another, go on with --resume, "
            "or replace it with --overwrite-output-dir"
        )
    if all(read_record(home) is None for home in _homes(directory)):
        raise UserError(
            f"output directory {directory} does not hold a training run of rlcore's (no "
            f"{RECORD_FILE}), so nothing there is replaced: choose another"
        )


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or somewhere below it, under whatever names."""
    return outer.exists() and any(
        place.exists() and place.samefile(outer) for place in (inner, *inner.parents)
    )


def _is_free(directory: Path) -> bool:
    """True where nothing is there but, at most, the remains of a run without a result."""
    if read_record(directory) is None:
        # the caller's tracker may have come first
        metrics = directory / METRICS_FILE
        remains = {metrics} if metrics.is_file() and not metrics.stat().st_size else set()
    else:
        remains = set() if _has_result(directory) else set(_written(directory))
    return set(directory.iterdir()) - {directory / LOCK_FILE} <= remains


def _has_result(directory: Path) -> bool:
    """Whether a run has left something there: a step in its metrics, a checkpoint, a model."""
    left = any(
        path.name not in _EARLY and not _HALF_WRITTEN.fullmatch(path.name)
        for path in _written(directory)
    )
    return left or _has_steps(directory / METRICS_FILE)


def _has_steps(metrics: Path) -> bool:
    """Whether a line is of an optimizer step; an evaluation before the first is of step 0."""
    if not metrics.is_file():
        return False
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] == 0:
                continue
        except (ValueError, TypeError, KeyError):
            pass
        return True
    return False


def _homes(directory: Path) -> list[Path]:
    """Where the files of the run in `directory` lie: there, unless a killed one had moved them."""
    if not directory.is_dir():
        return []
    replaced = [] if _has_result(directory) else [directory / REPLACED]
    return [*filter(Path.is_dir, [directory / _HALF_MOVED, *replaced]), directory]


def _written(directory: Path) -> list[Path]:
    """What runs wrote into `directory`, the record last; not the lock, not what is set aside."""
    record = read_record(directory)
    if record is None:
        return []
    names = _EARLY | record.written | ({CARD} if is_sealed(directory / CARD) else set())
    patterns = (_RESULTS, _HALF_WRITTEN)
    found = [
        path
        for path in directory.iterdir()
        if path.name in names or any(pattern.fullmatch(path.name) for pattern in patterns)
    ]
    return sorted(found, key=lambda path: path.name == RECORD_FILE)


def _set_aside(directory: Path) -> Path | None:
    """Move the run in `directory`, and what that one had set aside, to where it is kept."""
    if not _has_result(directory):
        _clear(directory)
        return None
    half, replaced = directory / _HALF_MOVED, directory / REPLACED
    half.mkdir()
    try:
        # the record goes last: without it, what is left could not be told from a user's files
        for path in (*filter(Path.exists, [replaced]), *_written(directory)):
            if path.name == METRICS_FILE:
                # the caller's tracker may have it open
                partial = Path(shutil.copy2(path, half / "metrics.partial"))
                partial.rename(half / METRICS_FILE)
                path.write_text("")
            else:
                path.rename(half / path.name)
        half.rename(replaced)
    except BaseException:
        _put_back(directory)
        raise
    return replaced


def _put_back(directory: Path) -> None:
    """Bring a run that was set aside back, where the one that was to replace it got nowhere."""
    half, replaced = directory / _HALF_MOVED, directory / REPLACED
    if not half.is_dir():
        if not replaced.is_dir() or _has_result(directory):
            return
        _clear(directory)
        replaced.rename(half)
    (half / "metrics.partial").unlink(missing_ok=True)  # the original is still there
    for path in sorted(half.iterdir(), key=lambda path: path.name != RECORD_FILE):
        path.rename(directory / path.name)
    half.rmdir()


def _clear(directory: Path) -> None:
    """Remove what a run without a result wrote."""
    for path in _written(directory):
        if path.name == METRICS_FILE:
            # the caller's tracker may have it open
            path.write_text("")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Errors of the file system as a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write into output directory {directory}: {error}") from error
