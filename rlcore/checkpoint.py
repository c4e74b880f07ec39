"""Models and checkpoints that are whole or absent, and what is needed to go on from one exactly.

Everything is written into a hidden sibling directory first, flushed to the disk, and only then
renamed. A checkpoint holds a manifest of its files besides, written last: where a copy, a network
file system or a full disk broke it, `last_checkpoint` passes over it.

    output_dir/checkpoint-40/   model.safetensors, config.json, tokenizer: a model directory
                                optimizer, scheduler, random states (one per process)
                                trainer_state_<process>.pt, manifest.json
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from rlcore.adapters import has_adapter
from rlcore.atomic import MANIFEST_FILE, publish, staged, staging_path
from rlcore.errors import UserError
from rlcore.run_record import note_written

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_model(model: Any, tokenizer: Any, directory: str | Path) -> Path:
    """Write `model` (safetensors) and `tokenizer` (or None) as a directory that transformers loads.

    Where `directory` exists already, its config.json goes first and comes back last, so that it
    never looks like a model while it is half one.
    """
    directory = Path(directory)
    with staged(directory) as staging:
        model.save_pretrained(staging, safe_serialization=True)
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
    process); `load_checkpoint` gives it back. `keep` older checkpoints stay, all where None.
    """
    directory = Path(output_dir) / f"checkpoint-{step}"
    staging = staging_path(directory)
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # it warns at each save that a tied head is stored once
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator.save_state(str(staging))
    rank = accelerator.process_index
    torch.save({**(state or {}), "step": step}, staging / f"trainer_state_{rank}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save_configs(accelerator, tokenizer, staging)
        _write_manifest(staging, step, accelerator.num_processes)
        publish(staging, directory)
        _drop_old(Path(output_dir), keep)
    accelerator.wait_for_everyone()
    return directory


def load_checkpoint(accelerator: Any, directory: str | Path) -> dict[str, Any]:
    """Bring what `accelerator` prepared back to `directory`'s state; returns `state` and "step".

    Random states come last, so that nothing that happens while loading moves them.
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
    state = torch.load(
        directory / f"trainer_state_{accelerator.process_index}.pt", weights_only=True
    )
    accelerator.load_state(str(directory))
    return state


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `output_dir`, or None."""
    return next((path for _, path in reversed(checkpoints(output_dir))), None)


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint in `output_dir`, the first step first."""
    found = sorted(_checkpoints(Path(output_dir)))
    return [(step, path) for step, path in found if _manifest(path) is not None]


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.iterdir())
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def _drop_old(output_dir: Path, keep: int | None) -> None:
    if keep is None:
        return
    for _, path in sorted(_checkpoints(output_dir), reverse=True)[max(keep, 1) :]:
        # the manifest first: a half-deleted checkpoint must not look like a whole one
        (path / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)


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
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    manifest = {"step": step, "num_processes": num_processes, "files": files}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where it is missing or a file of it is."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        whole = all(
            (directory / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None
