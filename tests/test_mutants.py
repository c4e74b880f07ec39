"""Wrong versions of the kernels, each of which the ordinary assertions must refuse.

A mutant is one change of the source, listed in tests/mutants/. Its test fails where every check of
the operation's battery accepts it, or where the text that it changes is no longer there.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.batteries import BATTERIES
from helpers.mutants import REFUSALS, TESTS, Mutant, function, load_kernels, read_mutants, unload

BACKENDS = {"triton": ["triton"], "torch": ["torch"], "both": ["triton", "torch"]}
FILES = sorted((TESTS / "mutants").glob("*.txt"))
CASES = [
    pytest.param(operation, backend, mutant, id=f"{operation}-{backend}-{mutant.name}")
    for path in FILES
    for operation, family in [path.stem.split(".")]
    for backend in BACKENDS[family]
    for mutant in read_mutants(path)
]


@pytest.fixture(autouse=True)
def clean_modules(device: str):
    torch.manual_seed(0)
    yield
    unload()


@pytest.mark.parametrize("operation", BATTERIES)
def test_an_unchanged_copy_passes_its_battery(operation, backend, tmp_path):
    for check in BATTERIES[operation](function(load_kernels(tmp_path), operation), backend):
        check()


@pytest.mark.parametrize("operation", BATTERIES)
def test_each_kernel_has_six_mutants_at_least(operation, backend):
    assert sum(case.values[:2] == (operation, backend) for case in CASES) >= 6


@pytest.mark.parametrize("operation, backend, mutant", CASES)
def test_a_wrong_kernel_is_refused(operation: str, backend: str, mutant: Mutant, tmp_path):
    if mutant.name.startswith("rows at unlike boundaries") and DEVICE != "cpu":
        pytest.skip("a GPU ends the whole process at an address that is not aligned")
    op = function(load_kernels(tmp_path, mutant), operation)
    for check in BATTERIES[operation](op, backend):
        try:
            check()
        except REFUSALS:
            return
    pytest.fail(f"every check of {operation} accepted the mutant {mutant.name!r}")
