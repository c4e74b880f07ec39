"""docs/architecture.md says what is there: folders, paths, floors, and the names in its tables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_layers import FLOORS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MOST_LINES = 300
PLACES = "kernels|rlcore|tests|tests_integrations|benchmarks|recipes|examples|docs"
PATH = re.compile(rf"(?<![\w./-])(?:{PLACES})/(?:[\w.-]+/?)*")
NAMES = re.compile(r"(?P<indent> *)(?P<names>[\w.]+(?:\.py|/)(?:, [\w.]+\.py)*)")


def block(heading: str) -> list[str]:
    """The lines of the first fenced block under a heading."""
    return PAGE.partition(f"\n## {heading}\n")[2].split("```")[1].strip("\n").splitlines()


def tree() -> list[str]:
    """The paths in the drawn tree; those of folders end in a slash."""
    above: list[str] = []
    paths = []
    for line in block("The tree"):
        found = NAMES.match(line)
        assert found, f"no name at the beginning of {line!r}"
        del above[len(found["indent"]) // 2 :]
        names = found["names"].split(", ")
        paths += ["".join(above) + name for name in names]
        above += names[:1]
    return paths


def folders() -> set[str]:
    """The folders of the library that hold modules."""
    return {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for half in ("kernels", "rlcore")
        for path in (ROOT / half).rglob("*.py")
        if not path.is_relative_to(ROOT / "rlcore" / "kernels")
    }


def room(path: str) -> str:
    """A path of the drawn floors as the layer test calls it."""
    dotted = path.removesuffix(".py").removesuffix("/*").removesuffix("/__init__").replace("/", ".")
    return f"rlcore.{dotted}" if dotted.startswith("kernels") else dotted


def defined(path: str) -> set[str]:
    """The functions, classes and variables of a file."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text("utf-8"))))
    assigned = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return assigned | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def rows() -> list[tuple[str, list[str]]]:
    """(file, names in it) of every row of the tables."""
    found = re.findall(r"^\| `([\w./]+)` \| ([^|]*) \|", PAGE, re.MULTILINE)
    return [(path, re.findall(r"`(\w+)`", names)) for path, names in found]


def test_the_tree_names_every_folder_once_and_no_other():
    drawn = [path for path in tree() if path.endswith("/")]
    assert sorted(drawn) == sorted(folders())


def test_the_tree_names_files_that_are_there():
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_path_on_the_page_is_there():
    paths = {found.rstrip(".") for found in PATH.findall(PAGE)}
    assert len(paths) > 50
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_the_floors_are_those_of_the_layer_test():
    drawn = [{room(path) for path in line.split(" | ")} for line in block("The import rule")]
    assert drawn == [set(rooms) for rooms in FLOORS]


@pytest.mark.parametrize("path", sorted({path for path, _ in rows()}))
def test_a_file_of_the_tables_defines_what_they_name(path):
    named = {name for place, names in rows() if place == path for name in names}
    assert sorted(named - defined(path)) == []


@pytest.mark.parametrize("half", ["kernels", "rlcore"])
def test_a_file_has_at_most_300_lines(half):
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in (ROOT / half).rglob("*.py")
        if (lines := len(path.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_the_halves_show_few_entries():
    """What `ls` shows, without caches and what packaging leaves behind."""
    for half, most in {"kernels": 12, "rlcore": 16}.items():
        shown = [p for p in (ROOT / half).iterdir() if p.name[0] not in "._" or p.suffix == ".py"]
        assert len(shown) <= most, sorted(p.name for p in shown)
