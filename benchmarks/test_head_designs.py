"""The designs that the fused head was weighed against: their results, repeatability, machine code.

Their times come from `python benchmarks/head_design_times.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_designs import by_the_row_kernel, loss_and_gradients, with_old_lse

import rlcore as rl
from rlcore.bench.cases import head
from rlcore.bench.operations import OPERATIONS

HERE = Path(__file__).parent


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    """The JSON lines that a script here prints in a fresh process."""
    left = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=left | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def inputs_of(dtype: str, masked: float = 0.25) -> dict:
    case = head("linear_policy_loss", dtype, 48, 24, 517, masked)
    return with_old_lse(OPERATIONS[case.op].make(case, torch.device("cpu")))


def naive(inputs: dict) -> list[torch.Tensor]:
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in inputs.items()}  # fmt: skip
    leaves = [exact[name].requires_grad_() for name in ("hidden", "weight")]
    loss = OPERATIONS["linear_policy_loss"].formula(exact)[0]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("chunk_bytes", [1, 517 * 4 * 7, None])
@pytest.mark.parametrize("dtype, least", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_exponentials_over_the_old_lse_give_the_loss_and_gradients(dtype, least, chunk_bytes):
    inputs = inputs_of(dtype)
    found = loss_and_gradients(inputs, chunk_bytes)
    for got, want in zip(found, naive(inputs), strict=True):
        assert error(got, want) < least


@pytest.mark.parametrize("old_lse", [-200.0, 300.0])
def test_rows_that_would_overflow_or_vanish_go_to_the_row_kernel(old_lse):
    inputs = inputs_of("float32")
    inputs["old_lse"][::3] = old_lse
    for got, want in zip(loss_and_gradients(inputs), naive(inputs), strict=True):
        assert error(got, want) < 1e-5


def test_a_confident_token_keeps_its_small_gradient():
    """Its own exponential is near S: rounded to bfloat16 beside the others it would drown them."""
    inputs = inputs_of("bfloat16", masked=0.0)
    strong = inputs["weight"][inputs["target"]].float()
    inputs["hidden"] = (14.0 * strong / strong.square().sum(1, keepdim=True)).bfloat16()
    logp = rl.linear_token_logprob(inputs["hidden"], inputs["weight"], inputs["target"]).logp
    inputs["old_logp"] = logp
    assert logp.median() > -0.3
    ours = by_the_row_kernel(inputs, torch.arange(48))
    for got, row_kernel, want in zip(
        loss_and_gradients(with_old_lse(inputs)), ours, naive(inputs), strict=True
    ):
        assert error(got, want) < max(1.2 * error(row_kernel, want), 5e-3)


def test_the_kernel_is_right_reads_nothing_outside_and_repeats_its_bits():
    (found,) = run("head_design_checks.py", "right", TRITON_INTERPRET="1")
    assert found["out of bounds"] == 0 and found["same bits"]
    assert found["linear_token_logprob"] < 1e-6 and found["linear_policy_loss"] < 1e-5


def test_the_kernel_spills_nothing_and_moves_16_bytes_at_once():
    for entry in run("head_design_checks.py", "compiled"):
        assert entry["LDGSTS bytes"] == [16] and entry["tensor-core instructions"] > 0
        if entry["chosen"]:
            assert entry["spills"] == 0
