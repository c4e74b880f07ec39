"""The fused head among PyTorch's machinery: compile, tracers, autocast, checkpoints, FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE
from helpers.heads import GEMMA
from helpers.sharded_head import loss_of, make_head
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rlcore as rl

N, H, V = 10, 8, 31
HEADS = [{}, GEMMA]


@pytest.fixture(autouse=True)
def seed(device):
    torch.manual_seed(0)


def make(dtype=torch.float32):
    hidden, weight, bias = (
        torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    target = torch.randint(V, (N,), device=DEVICE)
    return hidden, weight, bias, target, torch.randn(N, device=DEVICE)


def policy(hidden, weight, bias, target, advantage, **options):
    out = rl.linear_policy_loss(
        hidden, weight, target, advantage, bias=bias, chunk_bytes=600, entropy_coef=0.1, **options
    )
    return out.loss


def logprob(hidden, weight, bias, target, advantage, **options):
    out = rl.linear_token_logprob(hidden, weight, target, bias=bias, chunk_bytes=600, **options)
    return (out.logp * advantage).mean() + 0.1 * out.entropy.mean() + 0.01 * out.lse.sum()


LOSSES = [policy, logprob]


def gradients(loss, inputs, **options):
    scalar = loss(*inputs, **options)
    return [scalar.detach(), *torch.autograd.grad(scalar, inputs[:3])]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_torch_compile_of_the_whole_graph_gives_the_same_result(loss, head):
    torch.compiler.reset()
    inputs = make()

    def model(hidden, weight, bias, target, advantage):
        return loss(torch.tanh(hidden), weight, bias, target, advantage, **head) * 3

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs), gradients(model, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]])
def test_opcheck_accepts_the_operators(needs, dtype):
    hidden, weight, bias, target, advantage = make(dtype)
    for tensor, need in zip((hidden, weight, bias), needs, strict=True):
        tensor.requires_grad_(need)
    mask, statistic = torch.ones(N, dtype=torch.bool, device=DEVICE), torch.rand(N, device=DEVICE)
    head = (1.3, 2.0, 0.7, 600, needs, "torch")
    # fp16 sums run in another order under AOT's graph only where they are compared loosely
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.float32:
        tests = (*tests, "test_aot_dispatch_dynamic")
    calls = {
        "linear_policy_loss": (
            hidden, weight, bias, target, advantage, statistic, None, None, statistic,
            "ppo_clip", "k3", [0.0, 0.1, 0.2, 0.2, 9.0], *head,
        ),
        "linear_token_logprob": (hidden, weight, bias, target, mask, True, *head),
        "linear_token_logprob_backward": (
            hidden.detach(), weight.detach(), bias.detach(), target, mask,
            [-statistic, statistic, statistic, statistic],
            statistic, statistic, None, *head,
        ),
    }  # fmt: skip
    for name, arguments in calls.items():
        op = getattr(torch.ops.rlcore, name).default
        torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_the_operators_give_what_eager_mode_gives(loss, head, monkeypatch, backend):
    from rlcore.kernels.head import tokens as linear_head

    inputs = make()
    eager = gradients(loss, inputs, backend=backend, **head)
    monkeypatch.setattr(linear_head, "is_plain", lambda *_: False)
    for got, want in zip(gradients(loss, inputs, backend=backend, **head), eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_takes_its_dtype_for_the_products(loss):
    inputs = make()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = gradients(loss, inputs)
    rounded = [t.detach().bfloat16().requires_grad_() for t in inputs[:3]]
    outside = gradients(loss, (*rounded, *inputs[3:]))
    assert [g.dtype for g in inside] == [torch.float32] * 4
    for got, want in zip(inside, outside, strict=True):
        torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_the_head_gives_the_same_gradient(loss, reentrant):
    inputs = make()

    def checkpointed(*arguments):
        return checkpoint(loss, *arguments, use_reentrant=reentrant)

    want = gradients(loss, inputs)[1:]
    checkpointed(*inputs).backward()
    for tensor, gradient in zip(inputs[:3], want, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_derivatives_raise(loss):
    hidden, *rest = make()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            loss(dual, *rest)
    with pytest.raises(NotImplementedError, match=r"no torch\.func rule"):
        torch.func.grad(lambda h: loss(h, *rest))(hidden.detach())


def test_an_fsdp2_weight_is_gathered_once_and_gets_the_mean_gradient_of_all_ranks(tmp_path):
    script = Path(__file__).parent / "helpers" / "sharded_head.py"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert all("hidden.to_local()" in result["refused"] for result in results)
    for result in results:
        assert set(result["gathers"].values()) == {1}, "each loss gathers the weight once"
    for name in ("policy", "logprob"):
        head = make_head()
        losses = [loss_of(head, rank, name) for rank in range(2)]
        want = torch.autograd.grad(sum(losses) / 2, (head.weight, head.bias))
        for loss, result in zip(losses, results, strict=True):
            assert result[name]["type"] == "DTensor"
            torch.testing.assert_close(result[name]["loss"], loss.detach())
            for got, exact in zip(result[name]["gradients"], want, strict=True):
                torch.testing.assert_close(got, exact)


def test_a_float16_loss_scalers_factor_reaches_small_gradients(backend):
    hidden, weight, bias, target, advantage = make(torch.float16)
    scalar = policy(hidden, weight, bias, target, advantage, num_items=1e8, backend=backend)
    scaled = torch.autograd.grad(scalar * 65536.0, hidden, retain_graph=True)[0]
    again = torch.autograd.grad(scalar * 65536.0, hidden)[0]
    whole = policy(hidden, weight, bias, target, advantage, num_items=1.0, backend=backend)
    unscaled = torch.autograd.grad(whole, hidden)[0]
    assert torch.equal(scaled, again) and unscaled.any()
    expected = unscaled.float() * (65536.0 / 1e8)
    assert (scaled.float() - expected).norm() < 2e-3 * expected.norm()
