"""Fixtures of all tests: kernels run on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import DEVICE

if DEVICE == "cpu":
    # Triton reads this when it is first imported, so it stands before every such import.
    os.environ["TRITON_INTERPRET"] = "1"
# Both ways through a long row are held; the kernels read this at their import.
os.environ["RLCORE_SCAN_LOOK_BACK"] = "1"

from helpers.interpreter import mend_interpreter, poisoned

if DEVICE == "cpu":
    mend_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin come filled with NaN, so that an unwritten output shows."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def device(poisoned_empty: None) -> str:
    """The device to test kernels on."""
    return DEVICE


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn: the same tests hold both."""
    return request.param
