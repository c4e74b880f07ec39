"""The direction of dependency: kernels <- rlcore <- trainers <- tasks <- command line.

Read from the source with `ast`, imports inside functions included; what stands under
`if TYPE_CHECKING:` does not run and does not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module may import its own layer and those below it. The longest prefix decides.
LAYERS = {
    "rlcore.kernels": 0,
    "rlcore": 1,
    "rlcore.trainers": 2,
    "rlcore.integrations": 2,
    "rlcore.demo": 3,
    "rlcore.bench": 4,
    "rlcore.demo.demo": 4,
    "rlcore.bench.doctor": 4,
    "rlcore.demo.survey": 4,
    "rlcore.cli": 4,
    "rlcore.__main__": 4,
}
# (module, what it may import from above, when it is called by that name)
LOOKED_UP_BY_NAME = {("rlcore.sampling.rewards", "rlcore.demo.arithmetic")}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def modules() -> dict[str, str]:
    """{dotted name: source} of the library, kernels under the name they install as."""
    files = {
        path: ["rlcore", "kernels", *path.relative_to(ROOT / "kernels").parts]
        for path in (ROOT / "kernels").rglob("*.py")
    } | {
        path: ["rlcore", *path.relative_to(ROOT / "rlcore").parts]
        for path in (ROOT / "rlcore").rglob("*.py")
        if not path.is_relative_to(ROOT / "rlcore" / "kernels")
    }
    return {
        ".".join(parts).removesuffix(".py").removesuffix(".__init__"): path.read_text("utf-8")
        for path, parts in files.items()
    }


def is_package(name: str) -> bool:
    return (ROOT.joinpath(*name.split("."))).is_dir()


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from running_nodes(child)


def imports(name: str, source: str) -> set[str]:
    """The dotted names that a module imports; `from a import b` gives a.b where that is one."""
    found = set()
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            up = node.level - is_package(name) if node.level else 0
            home = ".".join(parts[: len(parts) - up]) if node.level else ""
            base = ".".join(filter(None, [home, node.module]))
            members = [f"{base}.{alias.name}" for alias in node.names]
            found |= {member if member in MODULES else base for member in members}
    return found


MODULES = modules()


def layer(name: str) -> int:
    fitting = [prefix for prefix in LAYERS if name == prefix or name.startswith(f"{prefix}.")]
    return LAYERS[max(fitting, key=len)]


def violations(name: str, source: str) -> list[str]:
    """What the module imports from a layer above its own."""
    return sorted(
        f"{name} imports {target}"
        for target in imports(name, source)
        if target.split(".")[0] == "rlcore"
        and layer(target) > layer(name)
        and (name, target) not in LOOKED_UP_BY_NAME
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_from_its_own_layer_and_below(name):
    assert violations(name, MODULES[name]) == []


@pytest.mark.parametrize("name", sorted(n for n in MODULES if layer(n) == 0))
def test_kernels_import_torch_triton_and_themselves(name):
    targets = imports(name, MODULES[name])
    outside = {target for target in targets if not target.startswith("rlcore.kernels")}
    assert {target.split(".")[0] for target in outside} <= KERNELS_MAY_IMPORT


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_library_imports_neither_tests_nor_benchmarks(name):
    roots = {target.split(".")[0] for target in imports(name, MODULES[name])}
    assert not roots & {"tests", "benchmarks", "helpers", "kernels"}


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        (
            "rlcore.kernels.triton_backend.sweep",
            "import rlcore.functional.losses",
            "rlcore.functional.losses",
        ),
        (
            "rlcore.kernels.triton_backend.sweep",
            "from .. import rollout",
            "rlcore.sampling.rollout",
        ),
        (
            "rlcore.models.loading",
            "def f():\n    from rlcore.trainers import sft",
            "rlcore.trainers.sft",
        ),
        ("rlcore.trainers.sft", "from ..cli import main", "rlcore.cli"),
        ("rlcore.trainers.grpo", "import rlcore.demo.demo as d", "rlcore.demo.demo"),
    ],
)
def test_an_import_from_above_is_found(name, source, wrong):
    assert violations(name, source) == [f"{name} imports {wrong}"]


def test_an_import_from_below_or_for_types_alone_is_not_a_violation():
    assert (
        violations("rlcore.trainers.sft", "import rlcore as rl\nfrom ..kernels import rows") == []
    )
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlcore.trainers.sft"
    assert violations("rlcore.models.loading", typed) == []
