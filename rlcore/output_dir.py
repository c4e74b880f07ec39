"""The directory that a run writes into: whether it may, making it, and taking it back."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlcore.checkpoint import last_checkpoint
from rlcore.errors import UserError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "training.yaml"


def check_output_dir(
    directory: str | Path, *, overwrite: bool = False, resume: bool = False
) -> Path:
    """Raise UserError where a run may not write into `directory`; touches nothing itself."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output directory {directory} is a file")
    if resume:
        if last_checkpoint(directory) is None:
            raise UserError(f"nothing to resume: {directory} holds no complete checkpoint")
    elif directory.is_dir() and any(directory.iterdir()) and not _is_unstarted(directory):
        if not overwrite:
            raise UserError(
                f"output directory {directory} is not empty: choose another, go on with --resume, "
                "or replace it with --overwrite-output-dir"
            )
        if not (directory / METRICS_FILE).exists():
            raise UserError(
                f"output directory {directory} does not hold a training run (no {METRICS_FILE}), "
                "so it is not overwritten: choose another"
            )
    return directory


def prepare_output_dir(
    directory: str | Path, *, overwrite: bool = False, resume: bool = False
) -> Path:
    """Check `directory`, then make it, empty unless the run resumes. Main process only.

    Call it when model and data are loaded, so that a mistake there costs no earlier run.
    """
    directory = check_output_dir(directory, overwrite=overwrite, resume=resume)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in () if resume else directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (directory / METRICS_FILE).touch()
    except OSError as error:
        raise UserError(f"cannot write into output directory {directory}: {error}") from error
    return directory


def discard_unstarted(directory: str | Path) -> None:
    """Remove what `prepare_output_dir` made, where the run ended before its first result."""
    directory = Path(directory)
    if directory.is_dir() and _is_unstarted(directory):
        shutil.rmtree(directory)


def _is_unstarted(directory: Path) -> bool:
    """True where there is nothing but an empty metrics.jsonl and, perhaps, the config."""
    names = {path.name for path in directory.iterdir()}
    metrics = directory / METRICS_FILE
    return (
        METRICS_FILE in names
        and names <= {METRICS_FILE, CONFIG_FILE}
        and metrics.stat().st_size == 0
    )
