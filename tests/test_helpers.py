"""The helpers themselves: a proof that cannot fail proves nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DEVICE, oracle
from helpers.interpreter import narrow, widen
from helpers.judge import assert_gradient_no_worse_than_eager, assert_no_worse_than_eager
from triton.runtime.errors import InterpreterError

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter runs where no GPU is")


def floats_of_every_kind() -> torch.Tensor:
    """Random bit patterns, every tie between two bfloat16 numbers, and the extremes."""
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64)
    ties = (torch.arange(65536, dtype=torch.int64) << 16 | 0x8000) - 2**31
    extremes = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38, 1e-45])
    return torch.cat([torch.cat([bits, ties]).int().view(torch.float32), extremes])


def test_bf16_is_rounded_and_widened_as_torch_does():
    x = floats_of_every_kind()
    want = x.to(torch.bfloat16)
    got = torch.from_numpy(narrow(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(got.isnan(), want.isnan())
    wide = torch.from_numpy(widen(want.view(torch.int16).numpy().view(np.uint16)))
    assert torch.equal(wide.nan_to_num(7), want.float().nan_to_num(7))


if DEVICE == "cpu":
    import triton
    import triton.language as tl

    @triton.jit
    def cast_kernel(X, Y, N: tl.constexpr):
        lane = tl.arange(0, N)
        tl.store(Y + lane, tl.load(X + lane).to(Y.dtype.element_ty))

    @triton.jit
    def square_and_add_kernel(X, Y, N: tl.constexpr):
        lane = tl.arange(0, N)
        x = tl.load(X + lane)
        tl.store(Y + lane, tl.where(x > 0, x * x + x, -x))

    @triton.jit
    def scale_kernel(X, Y, scale, N: tl.constexpr):
        lane = tl.arange(0, N)
        tl.store(Y + lane, tl.load(X + lane) * scale.to(tl.float64))

    @triton.jit
    def promise_kernel(X, Y, N: tl.constexpr):
        lane = tl.arange(0, N)
        tl.store(tl.multiple_of(Y, 16) + lane, tl.load(X + lane))

    @triton.jit
    def overrun_kernel(X, Y, N: tl.constexpr):
        lane = tl.arange(0, N)
        x = tl.load(X + lane) + tl.load(X + lane)
        tl.store(Y + lane, x, mask=lane < N - 1)
        tl.store(Y + lane * 0, x, mask=lane < 1)


@interpreted
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_interpreted_cast_to_bf16_rounds_to_nearest_even(source):
    x = torch.randn(1024).mul(300).to(source)
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=1024)
    assert torch.equal(y, x.to(torch.bfloat16))
    back = torch.empty_like(x)
    cast_kernel[(1,)](y, back, N=1024)
    assert torch.equal(back, y.to(source))


@interpreted
def test_interpreted_bf16_arithmetic_is_torchs():
    x = torch.randn(1024).to(torch.bfloat16)
    y = torch.empty_like(x)
    square_and_add_kernel[(1,)](x, y, N=1024)
    assert torch.equal(y, torch.where(x > 0, x * x + x, -x))


@interpreted
def test_a_false_promise_of_an_address_at_a_16_byte_boundary_is_found():
    x, y = torch.randn(16), torch.zeros(20)
    assert y.data_ptr() % 16 == 0
    promise_kernel[(1,)](x, y[4:], N=16)
    assert torch.equal(y[4:], x)
    with pytest.raises(InterpreterError, match="promised a multiple of 16"):
        promise_kernel[(1,)](x, y[3:], N=16)


@interpreted
def test_interpreted_float_arguments_are_float32_as_in_a_compiled_kernel():
    x = torch.ones(16, dtype=torch.float64)
    y = torch.empty_like(x)
    scale_kernel[(1,)](x, y, 0.1, N=16)
    assert torch.equal(y, torch.full((16,), 0.1, dtype=torch.float32).double())


@interpreted
def test_traffic_sees_double_accesses_and_overruns():
    from rlcore.bench.static.traffic import count_memory

    x, y = torch.randn(64), torch.zeros(64)
    with count_memory() as traffic:
        overrun_kernel[(1,)](x, y, N=64)
    assert (traffic.of(x).loads, traffic.of(x).stores) == (128, 0)
    assert traffic.of(y).stores_each.tolist() == [2] + [1] * 62 + [0]
    assert not traffic.out_of_bounds
    with count_memory() as traffic:
        overrun_kernel[(1,)](x, y, N=32)
        traffic.storages.pop(y.untyped_storage().data_ptr())
    assert traffic.out_of_bounds == 32


@pytest.mark.parametrize("flaw", [float("nan"), float("inf"), 1e-4])
def test_judge_refuses_a_single_wrong_entry_among_many(flaw):
    truth = torch.randn(4, 1000, dtype=torch.float64)
    eager = truth.float()
    assert_no_worse_than_eager(eager, eager, truth, name="x")
    wrong = eager.clone()
    wrong[2, 500] += flaw
    with pytest.raises(AssertionError, match="x: "):
        assert_no_worse_than_eager(wrong, eager, truth, name="x")


def test_judge_refuses_a_bf16_gradient_without_its_softmax_term():
    logits = torch.randn(8, 128_256)
    target = torch.arange(8)
    z = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(oracle.token_logprob(z, target)[0].sum(), z)
    eager = truth.to(torch.bfloat16)
    only_label = torch.where(torch.arange(128_256) == target[:, None], eager, 0)
    with pytest.raises(AssertionError, match="other columns"):
        assert_gradient_no_worse_than_eager(only_label, eager, truth, target, name="dz")


def test_oracle_gives_hand_computed_numbers():
    logits = torch.tensor([[0.0, float(np.log(3))]], dtype=torch.float64)
    logp, entropy, lse = oracle.token_logprob(logits, torch.tensor([1]))
    assert np.isclose(logp.item(), np.log(0.75))
    assert np.isclose(lse.item(), np.log(4))
    assert np.isclose(entropy.item(), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))


def test_empty_memory_is_poisoned(device):
    for fresh in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == -1).all()
