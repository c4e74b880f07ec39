"""`rlcore doctor`: it must see a wrong kernel, old versions, and pairs that do not go together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from rlcore.bench import doctor
from rlcore.bench.cases import check
from rlcore.bench.contestants.rows import CONTESTANTS, Contestant


def said(config: doctor.DoctorConfig = doctor.DoctorConfig()) -> tuple[int, str]:  # noqa: B008
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    status = doctor.doctor(config, console)
    return status, console.export_text()


def test_all_is_well_here_and_every_operation_is_checked():
    status, text = said()
    assert status == 0 and "broken" not in text
    for op in {case.op for case in check()}:
        assert f"{op}: error against float64" in text
    assert "backend 'torch' serves" in text or torch.cuda.is_available()


def test_a_wrong_kernel_is_named_with_what_to_do(monkeypatch):
    right = CONTESTANTS["gae"]["rlcore torch"]
    wrong = Contestant(lambda inputs: tuple(1.1 * x for x in right.run(inputs)))
    monkeypatch.setitem(CONTESTANTS["gae"], "rlcore torch", wrong)
    monkeypatch.setitem(CONTESTANTS["gae"], "rlcore triton", wrong)
    status, text = said()
    assert status == 1 and "gae: float32: error 1.0e-01" in text and "to fix: report gae" in text


def test_a_kernel_that_raises_is_named_too(monkeypatch):
    def raises(inputs):
        raise RuntimeError("no such instruction")

    for name in ("rlcore torch", "rlcore triton"):
        monkeypatch.setitem(CONTESTANTS["gae"], name, Contestant(raises))
    status, text = said()
    assert status == 1 and "gae: float32: RuntimeError: no such instruction" in text


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "level"),
    [
        ("2.11.0", "3.6.0", "ok"),
        ("2.13.0+cpu", "3.7.1", "ok"),
        ("2.15.1+cu130", "3.9.0", "ok"),
        ("2.13.0", "3.6.0", "warning"),
        ("2.11.0", "3.8.0", "warning"),
        ("3.0.0", "4.0.0", "ok"),
    ],
)
def test_pairs_that_do_not_ship_together_are_warned_of(torch_version, triton_version, level):
    (finding,) = doctor.pair(torch_version, triton_version)
    assert finding.level == level
    assert bool(finding.fix) == (level != "ok")


def test_versions_below_the_oldest_are_broken(monkeypatch):
    old = {"torch": "2.10.1", "triton": "3.6.0", "transformers": None}
    monkeypatch.setattr(doctor.machine, "version", old.get)
    found = {finding.what: finding for finding in doctor.versions()}
    assert found["torch 2.10.1 is older than 2.11"].level == "broken"
    assert found["torch 2.10.1 is older than 2.11"].fix == "pip install 'torch>=2.11'"
    assert found["transformers is not installed"].level == "broken"
    assert found["triton 3.6.0"].level == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton serves a GPU")
def test_a_backend_that_cannot_serve_is_broken_and_the_exit_status_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["RLCORE_BACKEND"] = "triton"
    command = [sys.executable, "-m", "rlcore", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "needs tensors on a GPU" in done.stdout
    assert "to fix: unset RLCORE_BACKEND" in done.stdout
