"""The direction of dependency, read from the folders and the imports.

    kernels: ground <- formulas <- triton_backend | torch_backend <- implementation <- rows, scans
             <- pairs <- head
    rlcore:  kernels <- functional, data <- models <- sampling, runs <- `rl` <- trainers/options
             <- trainers/shared <- trainers, integrations <- demo <- bench <- commands <- cli

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
# A module may import from its own room and from those on lower floors; the longest prefix decides.
FLOORS = [
    ("rlcore.errors",),
    ("rlcore.kernels",),
    ("rlcore.kernels.formulas",),
    ("rlcore.kernels.triton_backend", "rlcore.kernels.torch_backend"),
    ("rlcore.kernels.implementation",),
    ("rlcore.kernels.rows", "rlcore.kernels.scans"),
    ("rlcore.kernels.pairs",),
    ("rlcore.kernels.head",),
    ("rlcore.functional", "rlcore.data"),
    ("rlcore.models",),
    ("rlcore.sampling", "rlcore.runs"),
    ("rlcore",),
    ("rlcore.trainers.options",),
    ("rlcore.trainers.shared",),
    ("rlcore.trainers", "rlcore.integrations"),
    ("rlcore.demo",),
    ("rlcore.bench",),  # its steps are measured on the demo's task
    ("rlcore.commands",),
    ("rlcore.cli",),
    ("rlcore.__main__",),
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# (module, what it may import from above, when it is called by that name)
LOOKED_UP_BY_NAME = {("rlcore.sampling.rewards", "rlcore.demo.arithmetic")}
# copied by the mutants of the tests, and run by the sandbox's processes, under another name
RELATIVE = ("rlcore.kernels.", "rlcore.sampling.sandbox")
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


def room(name: str) -> str:
    """The room that a module stands in."""
    fitting = [prefix for prefix in FLOOR_OF if name == prefix or name.startswith(f"{prefix}.")]
    return max(fitting, key=len)


def violations(name: str, source: str) -> list[str]:
    """What the module imports from a room above its own or beside it."""
    home = room(name)
    return sorted(
        f"{name} imports {target}"
        for target in imports(name, source)
        if target.split(".")[0] == "rlcore"
        and room(target) != home
        and FLOOR_OF[room(target)] >= FLOOR_OF[home]
        and (name, target) not in LOOKED_UP_BY_NAME
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_from_its_own_layer_and_below(name):
    assert violations(name, MODULES[name]) == []


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("rlcore.kernels.")))
def test_kernels_import_torch_triton_and_themselves(name):
    targets = imports(name, MODULES[name])
    outside = {target for target in targets if not target.startswith("rlcore.kernels")}
    assert {target.split(".")[0] for target in outside} <= KERNELS_MAY_IMPORT


def private(name: str, source: str) -> list[str]:
    """Names with one leading underscore that the module takes from another of ours."""
    nodes = list(running_nodes(ast.parse(source)))
    found, aliases = set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").partition(".")[0] == "rlcore":
                found |= {alias.name for alias in node.names if hidden(alias.name)}
            aliases |= {alias.asname or alias.name for alias in node.names}
    ours = {module.rpartition(".")[2] for module in imports(name, source) if module in MODULES}
    ours |= {
        alias.asname
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.asname and alias.name.rpartition(".")[2] in ours
    }
    attributes = (n for n in nodes if isinstance(n, ast.Attribute) and hidden(n.attr))
    return sorted(
        found
        | {
            n.attr
            for n in attributes
            if isinstance(n.value, ast.Name) and n.value.id in ours & aliases
        }
    )


def hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_private_name_crosses_a_file(name):
    assert private(name, MODULES[name]) == []


def test_the_search_finds_private_names():
    source = "from . import token_losses as t\nfrom .kl import _k\nt._ppo\nself._own\nt.__name__"
    assert private("rlcore.kernels.formulas.surrogates", source) == ["_k", "_ppo"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_library_imports_neither_tests_nor_benchmarks(name):
    roots = {target.split(".")[0] for target in imports(name, MODULES[name])}
    assert not roots & {"tests", "benchmarks", "helpers", "kernels"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_kernels_import_each_other_relatively_and_all_others_by_full_names(name):
    nodes = list(running_nodes(ast.parse(MODULES[name])))
    relative = {node.level > 0 for node in nodes if isinstance(node, ast.ImportFrom)}
    if name.startswith(RELATIVE):
        targets = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        targets |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
        assert "rlcore" not in {target.split(".")[0] for target in targets}
    else:
        assert True not in relative


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("rlcore.kernels.rows.fisher", "import rlcore.functional.losses", "functional.losses"),
        ("rlcore.kernels.backend", "from ..sampling import rollout", "sampling.rollout"),
        ("rlcore.kernels.rows.fisher", "from ..scans import scan", "kernels.scans.scan"),
        (
            "rlcore.kernels.torch_backend.rows",
            "from ..triton_backend.sweep import Launch",
            "kernels.triton_backend.sweep",
        ),
        ("rlcore.models.loading", "def f():\n    from rlcore.trainers import sft", "trainers.sft"),
        ("rlcore.trainers.shared.run", "from ..grpo import train_grpo", "trainers.grpo"),
        ("rlcore.trainers.sft", "from ..cli import main", "cli"),
        ("rlcore.trainers.grpo", "import rlcore.demo.demo as d", "demo.demo"),
    ],
)
def test_an_import_from_above_or_beside_is_found(name, source, wrong):
    assert violations(name, source) == [f"{name} imports rlcore.{wrong}"]


def test_an_import_from_below_or_for_types_alone_is_not_a_violation():
    below = "import rlcore as rl\nfrom ..kernels.rows import fisher"
    assert violations("rlcore.trainers.sft", below) == []
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlcore.trainers.sft"
    assert violations("rlcore.models.loading", typed) == []


def test_every_floor_has_its_folder():
    for name in FLOOR_OF:
        place = ROOT.joinpath(*name.split("."))
        assert place.is_dir() or place.with_suffix(".py").is_file(), f"{name} is no longer there"
