"""transformers' `from_pretrained`: its errors in our words, and nothing on the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlcore.errors import UserError, reason_of


def from_pretrained(auto_class: Any, what: str, name_or_path: str, **options: Any) -> Any:
    """What `auto_class` makes of a directory or a name on the hub.

    Raises:
        UserError: nothing loadable there; `what` says what was looked for.
    """
    path = Path(name_or_path)
    # A path that is not there would be asked for on the hub, with a message about repositories.
    looks_local = path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if path.is_file():
        raise UserError(f"no {what} at {name_or_path!r}: it is a file, not a model's directory")
    if looks_local and not path.is_dir():
        raise UserError(f"no {what} at {name_or_path!r}: there is no such directory")
    try:
        with no_progress_bars():
            given = {name: value for name, value in options.items() if value is not None}
            return auto_class.from_pretrained(name_or_path, **{"trust_remote_code": False} | given)
    except Exception as error:
        # Everything from a missing file to a broken header: transformers knows many error types.
        reason = _why_not_loaded(path, error)
        raise UserError(f"cannot load a {what} from {name_or_path!r}: {reason}") from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    """What the user can see to; without a configuration transformers speaks of anything else."""
    if not path.is_dir():
        return f"there is no such directory here, and as a name on the hub: {reason_of(error)}"
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "the directory has no config.json, so it holds no model"
    return reason_of(error)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers without its bars, which would tear a run's own display."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """transformers without its table of weights that are missing or left over, seen to here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
