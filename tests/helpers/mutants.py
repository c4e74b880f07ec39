"""Loads copies of kernels/ with one place changed, to prove that the assertions would notice.

A file tests/mutants/OPERATION.BACKEND.txt lists mutants of an operation: the name, the file of
kernels/ and how often the text stands there (once unless told), the text, and what replaces it.

    # the edge not counted (triton_backend/sweep.py)
    - tl.sum(s * weight, 0) + tl.sum(e, 0)
    + tl.sum(s * weight, 0)
"""

from __future__ import annotations

import importlib
import itertools
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from triton.runtime.errors import InterpreterError

import rlcore

# how a check refuses: by its own assertion, or by one that the interpreter makes inside a kernel
REFUSALS = (AssertionError, InterpreterError)
TESTS = Path(__file__).resolve().parents[1]
KERNELS = TESTS.parent / "kernels"
PREFIX = "mutated_kernels_"
HEADING = re.compile(r"# (?P<name>.*) \((?P<file>\S+\.py)(?: x(?P<count>\d+))?\)")
_serial = itertools.count()


@dataclass
class Mutant:
    """`find` in kernels/`file` becomes `replace`; it must stand there `count` times."""

    name: str
    file: str
    count: int
    find: list[str] = field(default_factory=list)
    replace: list[str] = field(default_factory=list)

    def apply(self, folder: Path) -> None:
        source = (folder / self.file).read_text()
        find, replace = "\n".join(self.find), "\n".join(self.replace)
        found = source.count(find)
        if found != self.count:
            raise LookupError(f"{self.file} holds {found} of {find!r}, not {self.count}: mend it")
        (folder / self.file).write_text(source.replace(find, replace))


def read_mutants(path: Path) -> list[Mutant]:
    """The mutants of a file, in its order."""
    mutants: list[Mutant] = []
    for line in filter(None, path.read_text().splitlines()):
        if heading := HEADING.fullmatch(line):
            mutants.append(Mutant(heading["name"], heading["file"], int(heading["count"] or 1)))
        else:
            assert line[:2] in ("- ", "+ "), f"{path.name} has a line of no meaning: {line!r}"
            (mutants[-1].find if line[0] == "-" else mutants[-1].replace).append(line[2:])
    assert all(mutant.find and mutant.replace for mutant in mutants), f"a gap in {path.name}"
    return mutants


def load_kernels(folder: Path, mutant: Mutant | None = None) -> ModuleType:
    """A copy of kernels/, mutated, as a package of its own; import its modules from `folder`.

    Its operators register under a namespace of their own, so the real ones stay as they are.
    """
    package = ModuleType(f"{PREFIX}{next(_serial)}")
    copy = folder / package.__name__
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        mutant.apply(copy)
    for path in copy.rglob("*.py"):
        text = path.read_text().replace('"rlcore::', f'"{package.__name__}::')
        path.write_text(text.replace("torch.ops.rlcore.", f"torch.ops.{package.__name__}."))
    package.__path__ = [str(copy)]
    sys.modules[package.__name__] = package
    return package


def function(package: ModuleType, name: str):
    """What `package`, a copy of kernels/, has for rl.`name`."""
    home = rlcore._HOMES[name].removeprefix("kernels.")
    return getattr(importlib.import_module(f"{package.__name__}.{home}"), name)


def unload() -> None:
    """Forgets every copy that was loaded."""
    for name in [name for name in sys.modules if name.startswith(PREFIX)]:
        del sys.modules[name]
