"""Programs for the sandbox, read from tests/programs/.

A file holds `## name` and below it a program, then perhaps `#? tests` and `#? right`.

    tricks.txt    wrong programs that try to pass WANTED all the same
    pleasing.txt  wrong programs that try to pass tests of another kind, and right ones beside them
    right.txt     right programs of many shapes
"""

from __future__ import annotations

import re
from pathlib import Path

WANTED = "assert f(2) == 4\nassert f(3) == 9\nassert f(-1) == 1"
# These would harm other processes of the machine where no process namespace holds them.
NEEDS_NAMESPACE = {"everything killed"}


def read(name: str) -> dict[str, list[str]]:
    """{name: [program, tests, ...]} of one file."""
    text = Path(__file__).parents[1].joinpath("programs", f"{name}.txt").read_text("utf-8")
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        found[title] = [piece.strip() for piece in re.split(r"^#\? \w+$", body, flags=re.MULTILINE)]
    return found


TRICKS = {name: program for name, (program,) in read("tricks").items()}
PLEASING, RIGHT = read("pleasing"), read("right")
