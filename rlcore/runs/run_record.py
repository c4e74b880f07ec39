"""What runs have written into a directory, so that nothing else is ever taken for theirs.

The record is a hidden file of JSON lines, appended to before the files that it names appear:

    {"trainer": "SFTConfig", "inputs": {"dataset": "1f3c...", "model": "77ab..."}}   at a start
    {"facts": {"rows": 294, "versions": {"torch": "2.13.0"}, ...}}                   there and later
    {"written": ["config.json", "model.safetensors"]}                                before a save
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_FILE = ".rlcore-run"
_SEAL = "<!-- as rlcore wrote it: "


@dataclass(frozen=True)
class Record:
    """What stands in a directory's record."""

    trainer: str  # the class of the last start's options
    inputs: Mapping[str, str]  # {option: fingerprint} of what the last start was given
    written: frozenset[str]  # names of files and directories
    facts: Mapping[str, Any]  # what a reader of the run wants to know besides


def read_record(directory: Path) -> Record | None:
    """The record of `directory`; None where no run of ours has written there."""
    try:
        lines = (directory / RECORD_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    trainer, inputs, written, facts = "", {}, set(), {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        trainer, inputs = entry.get("trainer", trainer), entry.get("inputs", inputs)
        written.update(entry.get("written", ()))
        facts |= entry.get("facts", {})
    return Record(trainer, inputs, frozenset(written), facts)


def note_start(directory: Path, trainer: str, inputs: Mapping[str, str]) -> None:
    """Begin a record, or go on with one: a run of `trainer` starts on these `inputs`."""
    _append(directory, {"trainer": trainer, "inputs": dict(inputs)})


def sealed(text: str) -> str:
    """The text with a last line by which `is_sealed` knows that nobody has changed it since."""
    return f"{text}\n{_SEAL}{_digest(text)} -->\n"


def is_sealed(path: Path) -> bool:
    """Whether a file is as a run wrote it, and not the user's."""
    try:
        text, seal, digest = path.read_text(encoding="utf-8").rpartition(
            "\n<!-- as rlcore wrote it: "
        )
    except (OSError, UnicodeDecodeError):
        return False
    return bool(seal) and digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def note_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Note what a reader of the run wants to know; a later value takes an earlier one's place."""
    _append(directory, {"facts": dict(facts)})


def note_written(directory: Path, names: Iterable[str]) -> None:
    """Note that a run is about to write `names`; nothing where `directory` has no record."""
    if (directory / RECORD_FILE).is_file():
        _append(directory, {"written": sorted(names)})


def _append(directory: Path, entry: dict[str, object]) -> None:
    with (directory / RECORD_FILE).open("a", encoding="utf-8") as record:
        record.write(json.dumps(entry) + "\n")
