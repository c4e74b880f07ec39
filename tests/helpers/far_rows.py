"""Rows of logits more than 2^31 elements apart, in memory that is only committed where touched.

A process of its own, `python -m helpers.far_rows OPERATION BACKEND`: it asserts that values,
gradients and gradients in place are right, and prints its peak memory in MiB.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import rlcore as rl
from helpers import DEVICE
from helpers.cases import policy_inputs
from helpers.checks import check_policy_loss, check_token_logprob, on

STRIDE = 2**30 + 8


def spread(rows: Tensor) -> Tensor:
    """A copy of three rows, the last of them beyond 2^31 elements from the first."""
    far = torch.empty_strided(rows.shape, (STRIDE, 1), dtype=rows.dtype, device=DEVICE)
    return far.copy_(rows)


class Spread(torch.autograd.Function):
    """`spread` as a step of a graph: its result is no leaf and may be overwritten."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        return spread(rows)

    @staticmethod
    def backward(ctx, drows: Tensor) -> Tensor:
        return drows


def assert_same_gradient_in_place(loss: Callable[..., Tensor], near: Tensor) -> None:
    """The gradient written over rows far apart has the bits of the one of neighbouring rows."""
    near = near.to(DEVICE).requires_grad_()
    (want,) = torch.autograd.grad(loss(near, inplace_backward=False), near)
    far = Spread.apply(near)
    (dfar,) = torch.autograd.grad(loss(far, inplace_backward=True), far)
    assert dfar.data_ptr() == far.data_ptr() and dfar.stride() == (STRIDE, 1)
    assert torch.equal(dfar.contiguous(), want)


def token_logprob(near: Tensor, backend: str) -> None:
    target = torch.tensor([0, 7, near.shape[1] - 1], device=DEVICE)
    check_token_logprob(rl.token_logprob, spread(near), target, device=DEVICE, backend=backend)
    assert_same_gradient_in_place(
        lambda z, **how: sum(rl.token_logprob(z, target, backend=backend, **how)).sum(), near
    )


def policy_loss(near: Tensor, backend: str) -> None:
    inputs = policy_inputs(near, "old_logp", "ref_logp", beta=0.1, entropy_coef=0.1)
    args = on(DEVICE, inputs.target), on(DEVICE, inputs.advantage)
    options = {name: on(DEVICE, value) for name, value in inputs.options.items()}
    inputs.logits = spread(near)
    check_policy_loss(rl.policy_loss, inputs, device=DEVICE, backend=backend)
    assert_same_gradient_in_place(
        lambda z, **how: rl.policy_loss(z, *args, backend=backend, **options, **how).loss, near
    )


if __name__ == "__main__":
    if DEVICE == "cpu":
        from helpers.interpreter import mend_interpreter

        mend_interpreter()
    torch.manual_seed(0)
    logits = torch.randn(3, 300).to(torch.bfloat16)
    {"token_logprob": token_logprob, "policy_loss": policy_loss}[sys.argv[1]](logits, sys.argv[2])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
    # autograd's threads on a GPU may abort a process that ends by itself
    os._exit(0)
