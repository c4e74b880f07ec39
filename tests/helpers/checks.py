"""The assertions on the row kernels, as functions: the tests call them, and mutants must fail them.

Each runs an operation, the same formula in float32 (`eager`) and in float64 (the oracle), and
judges values and gradients by `assert_no_worse_than_eager`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import DEVICE, oracle
from helpers.cases import PolicyInputs
from helpers.judge import (
    EPS32,
    assert_gradient_no_worse_than_eager,
    assert_no_worse_than_eager,
)


def on(device: str, value):
    """The value on the device with its strides kept; what is no tensor as it is."""
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    if 0 in value.stride() and value.numel():
        # what is expanded is moved as it was before
        first = tuple(slice(None) if stride else slice(1) for stride in value.stride())
        return value[first].to(device).expand(value.shape)
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def promised_bits(backend: str) -> None:
    """Leaves the test out where no bits are promised: PyTorch's sums on a GPU follow the shape."""
    if backend == "torch" and DEVICE != "cpu":
        pytest.skip("the torch backend promises a row's bits on a CPU alone")


def leaf(logits: Tensor) -> Tensor:
    return logits.detach().requires_grad_()


def arithmetic(logits: Tensor) -> tuple[torch.dtype, float]:
    """The dtype that eager computes in, and its rounding."""
    if logits.dtype == torch.float64:
        return torch.float64, 16 * torch.finfo(torch.float64).eps
    return torch.float32, EPS32


def assert_masked_rows_get_zero(gradient: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        assert not gradient[~mask.bool()].any(), "a masked row has a gradient"


def check_token_logprob(
    op: Callable,
    logits: Tensor,
    target: Tensor,
    *,
    device: str,
    backend: str,
    upstream: tuple[Tensor, ...] | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
) -> None:
    """Judges logp, entropy, lse and dlogits for gradients arriving at all of them."""
    logits, target, mask = on(device, logits), on(device, target), on(device, mask)
    upstream = upstream or torch.randn(3, *target.shape).unbind()
    upstream = tuple(on(device, g) for g in upstream)
    shared = {"temperature": temperature, "mask": mask}

    z = leaf(logits)
    result = op(z, target, backend=backend, entropy=entropy, **shared)
    asked = [0, 1, 2] if entropy else [0, 2]
    actual = [(result.logp, result.entropy, result.lse)[i] for i in asked]
    dtype, eps = arithmetic(logits)
    assert all(x.dtype == dtype for x in actual), "statistics are float32 (float64 of float64)"
    eager_z, oracle_z = leaf(logits), leaf(logits.double())
    every_eager = oracle.token_logprob(eager_z.to(dtype), target, **shared)
    every_truth = oracle.token_logprob(oracle_z, target, **shared)
    eager, truth = ([every[i] for i in asked] for every in (every_eager, every_truth))
    for i, *three in zip(asked, actual, eager, truth, strict=True):
        name = ("logp", "entropy", "lse")[i]
        assert_no_worse_than_eager(*three, name=name, eps=eps, scale=1.0)

    upstream = [upstream[i].to(dtype) for i in asked]
    (dz,) = torch.autograd.grad(actual, z, upstream)
    assert dz.dtype == logits.dtype
    (eager_dz,) = torch.autograd.grad(eager, eager_z, upstream)
    (oracle_dz,) = torch.autograd.grad(truth, oracle_z, [g.double() for g in upstream])
    assert_masked_rows_get_zero(dz, mask)
    assert_gradient_no_worse_than_eager(dz, eager_dz, oracle_dz, target, name="dlogits", eps=eps)


def check_policy_loss(
    op: Callable, inputs: PolicyInputs, *, device: str, backend: str, upstream: float = 1.0, **more
) -> None:
    """Judges loss, logp, entropy, kl, clipped and dlogits; `more` goes to `op` alone."""
    logits, target, advantage = (
        on(device, x) for x in (inputs.logits, inputs.target, inputs.advantage)
    )
    options = {name: on(device, value) for name, value in inputs.options.items()}
    dtype, eps = arithmetic(logits)

    # The operation may be asked to overwrite its logits, so it gets its own.
    z = leaf(on(device, logits.clone() if more.get("inplace_backward") else logits))
    actual = op(z, target, advantage, backend=backend, **options, **more)
    eager_z, oracle_z = leaf(logits), leaf(logits.double())
    eager = oracle.policy_loss(eager_z.to(dtype), target, advantage, **options)
    truth = oracle.policy_loss(oracle_z, target, advantage, **options)
    (dz,) = torch.autograd.grad(actual.loss * upstream, z)
    (eager_dz,) = torch.autograd.grad(eager[0] * upstream, eager_z)
    (oracle_dz,) = torch.autograd.grad(truth[0] * upstream, oracle_z)

    names = ("loss", "logp", "entropy", "kl")
    for name, want_eager, want in zip(names, eager, truth, strict=False):
        got = getattr(actual, name)
        assert (got is None) == (want is None), f"{name} is {got}"
        if got is not None:
            assert name == "loss" or not got.requires_grad, f"{name} is not detached"
            assert_no_worse_than_eager(got, want_eager, want, name=name, eps=eps, scale=1.0)
    assert torch.equal(actual.clipped, truth[4]), "clipped differs"
    assert_masked_rows_get_zero(dz, options.get("mask"))
    # A gradient made in the forward is rounded once more where the backward scales it.
    factor = None if upstream == 1 or dz.dtype == torch.float32 else 1.6
    assert_gradient_no_worse_than_eager(
        dz, eager_dz, oracle_dz, target, name="dlogits", eps=eps, factor=factor
    )
