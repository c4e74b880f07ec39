"""Models and checkpoints that are whole or absent, and what is needed to go on from one exactly.

Everything is written into a hidden sibling directory first, flushed to the disk, and only then
renamed. A checkpoint holds a manifest of its files besides, written last, with the size and the
SHA-256 of each: what a copy, a network file system or a bad disk broke is passed over.

    output_dir/checkpoint-40/   model.safetensors, config.json, tokenizer: a model directory
                                optimizer; each process's own state and random states
                                (trainer_state_<process>.pt); manifest.json
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.models.adapters import has_adapter
from rlcore.runs.atomic import (
    MANIFEST_FILE,
    fingerprints,
    publish,
    sha256,
    staged,
    staging_path,
    writing,
)
from rlcore.runs.random_state import random_state, set_random_state
from rlcore.runs.run_record import note_written
from rlcore.runs.unpickling import data_alone

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_model(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `model` (safetensors) and `tokenizer` (or None) as a directory that transformers loads.

    `weights` are its whole ones, where it holds only shards of them itself.

    Where `directory` exists already, its config.json goes first and comes back last, so that it
    never looks like a model while it is half one.
    """
    directory = Path(directory)
    with staged(directory) as staging:
        model.save_pretrained(staging, state_dict=weights, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        note_written(directory, (path.name for path in staging.iterdir()))
    return directory


def save_checkpoint(
    accelerator: Any,
    output_dir: str | Path,
    step: int,
    *,
    tokenizer: Any = None,
    state: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Write output_dir/checkpoint-`step`: all that `accelerator` prepared, and `state`.

    Every process calls it. `state` is the trainer's own (tensors and plain values, one per
    process); `load_checkpoint` gives it back. `keep` complete checkpoints stay, all where None.

    Raises:
        UserError: the disk is full, or cannot be written; older checkpoints are as they were.
    """
    output_dir = Path(output_dir)
    directory = output_dir / f"checkpoint-{step}"
    staging = staging_path(directory)

    def make_room() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def write() -> None:
        # it warns at each save that a tied head is stored once
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        accelerator.save_state(str(staging))
        _save_process_state(accelerator, staging, {**(state or {}), "step": step})

    def complete() -> None:
        _save_configs(accelerator, tokenizer, staging)
        _write_manifest(staging, step, accelerator.num_processes)
        _remove(directory)
        publish(staging, directory)
        _drop_old(output_dir, step, keep)

    is_main = accelerator.is_main_process
    try:
        for task in (make_room if is_main else None, write, complete if is_main else None):
            _together(accelerator, directory, task)
    finally:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def _together(accelerator: Any, directory: Path, task: Callable[[], None] | None) -> None:
    """Do the task, wait for the other processes, and fail on all where one cannot write."""
    failure = None
    try:
        with writing(directory):
            if task is not None:
                task()
    except UserError as error:
        failure = error
    _agree(accelerator, failure, f"cannot write {directory}: another process failed to")


def _agree(accelerator: Any, failure: UserError | None, otherwise: str) -> None:
    """Raise where any process failed: its own error, or one that says `otherwise`."""
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum").item():
        raise failure or UserError(otherwise)


def load_checkpoint(accelerator: Any, directory: str | Path) -> dict[str, Any]:
    """Bring what `accelerator` prepared back to `directory`'s state; returns `state` and "step".

    Nothing that stands in the files is run. Random states come last, so that nothing that happens
    while loading moves them.

    Raises:
        UserError: an incomplete checkpoint, one of another number of processes, or one that holds
            anything but data for this run's model and optimizer.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} is not a complete checkpoint")
    if manifest["num_processes"] != accelerator.num_processes:
        raise UserError(
            f"{directory} was written by {manifest['num_processes']} processes and cannot be "
            f"resumed exactly by {accelerator.num_processes}: start as many"
        )
    own, failure = None, None
    try:
        own = _load_everything(accelerator, directory)
    except Exception as error:
        # from a missing key to a pickle that wants to run something: each library has its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        failure = UserError(f"cannot go on from {directory}: {reason}")
        failure.__cause__ = error
    _agree(accelerator, failure, f"cannot go on from {directory}: another process failed to")
    return own


def _load_everything(accelerator: Any, directory: Path) -> dict[str, Any]:
    place = directory / f"trainer_state_{accelerator.process_index}.pt"
    own = torch.load(place, weights_only=True)
    with data_alone():
        accelerator.load_state(str(directory))
    set_random_state(own["random_state"], accelerator.device)
    return own["state"]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `output_dir`, or None."""
    return next((path for _, path in reversed(checkpoints(output_dir))), None)


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint in `output_dir`, the first step first.

    Complete by its files' names and sizes; `newest_intact` reads them too.
    """
    found = _checkpoints(Path(output_dir))
    return [(step, path) for step, path in found if _manifest(path) is not None]


def newest_intact(directories: Iterable[Path]) -> tuple[Path, list[str]]:
    """The newest checkpoint in any of `directories` whose every byte is what was written.

    Returns:
        Its path, and a line for each newer one, which is damaged.

    Raises:
        UserError: there is none.
    """
    damaged: list[str] = []
    for _, path in sorted(each for home in directories for each in _checkpoints(home))[::-1]:
        reason = _damage(path)
        if reason is None:
            return path, [f"{line}: going on from {path.name}" for line in damaged]
        damaged.append(f"{path} is damaged ({reason})")
    raise UserError(f"nothing to resume: {'; '.join(damaged) or 'there is no checkpoint'}")


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything called a checkpoint, the first step first."""
    if not output_dir.is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def _drop_old(output_dir: Path, newest: int, keep: int | None) -> None:
    """Leave the `keep` last complete checkpoints up to step `newest`.

    A run that is at `newest` went on from there or before: what lies beyond is damaged.
    """
    if keep is None:
        return
    kept = [path for step, path in checkpoints(output_dir) if step <= newest][-max(keep, 1) :]
    for _, path in _checkpoints(output_dir):
        if path not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # the manifest first: a half-deleted checkpoint must not look like a whole one
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)


def _save_process_state(accelerator: Any, staging: Path, state: dict[str, Any]) -> None:
    """What is this process's own: `state`, and its random states."""
    from accelerate.utils.constants import RNG_STATE_NAME

    rank = accelerator.process_index
    # accelerate goes on without random states that it cannot read
    (staging / f"{RNG_STATE_NAME}_{rank}.pkl").unlink()
    own = {"state": state, "random_state": random_state(accelerator.device)}
    torch.save(own, staging / f"trainer_state_{rank}.pt")


def _save_configs(accelerator: Any, tokenizer: Any, staging: Path) -> None:
    """Configuration and tokenizer beside the weights make the checkpoint a model directory."""
    for model in accelerator._models:
        model = accelerator.unwrap_model(model)
        # an adapter's own configuration names its model; another would hide that
        if has_adapter(model):
            continue
        for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if hasattr(config, "save_pretrained"):
                config.save_pretrained(staging)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)


def _write_manifest(directory: Path, step: int, num_processes: int) -> None:
    manifest = {"step": step, "num_processes": num_processes, "files": fingerprints(directory)}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where it is missing or a file is missing or cut short."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        whole = {"step", "num_processes"} <= manifest.keys() and all(
            (directory / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _damage(directory: Path) -> str | None:
    """How a checkpoint's files differ from those that were written; None where they do not."""
    manifest = _manifest(directory)
    if manifest is None:
        return "a file is missing or cut short"
    for name, file in manifest["files"].items():
        try:
            if sha256(directory / name) != file["sha256"]:
                return f"{name} is not what was written"
        except (OSError, LookupError, TypeError) as error:
            return f"{name} cannot be read: {error}"
    return None
