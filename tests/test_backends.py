"""A backend is a module: both have the same functions, which take the same arguments."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from rlcore.kernels.backend import BACKENDS
from rlcore.kernels.implementation import IMPLEMENTATIONS, implementation

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CHOOSES = {"backend.py"}  # which name serves a call; everything after that is in the module


def signatures(backend: str) -> dict[str, object]:
    module = implementation(backend)
    return {
        name: list(inspect.signature(part).parameters) if callable(part) else type(part)
        for name, part in ((name, getattr(module, name)) for name in module.__all__)
    }


def test_every_backend_has_the_same_functions_with_the_same_arguments():
    assert set(IMPLEMENTATIONS) == set(BACKENDS)
    first, *others = map(signatures, BACKENDS)
    assert len(first) > 10
    for other in others:
        assert other == first


def comparisons(source: str) -> list[int]:
    """Lines on which something is compared with a backend's name."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(
            isinstance(side, ast.Constant) and side.value in BACKENDS
            for side in (node.left, *node.comparators)
        )
    ]


def test_the_search_finds_a_comparison():
    assert comparisons('x = 1\nif backend == "triton" or "torch" == name:\n    pass') == [2, 2]


@pytest.mark.parametrize(
    "file", sorted(str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.py"))
)
def test_no_backend_is_told_by_its_name(file):
    if file not in CHOOSES:
        assert not comparisons((KERNELS / file).read_text("utf-8"))
