"""What the kernels read and write, counted element by element under the interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.cases import LAYOUTS, flat, policy_inputs, random_target

import rlcore as rl
from rlcore.bench.static.traffic import Traffic, count_memory

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="counted by the interpreter"),
    pytest.mark.usefixtures("poisoned_empty"),
]
SHAPES = [(3, 1), (3, 127), (3, 1000), (2, 8192), (2, 50257)]
UNIT_STRIDE = [name for name in LAYOUTS if name not in ("transposed", "one_row_expanded")]


def assert_moved(traffic: Traffic, tensor: torch.Tensor, loads: int, stores: int) -> None:
    """Each element of `tensor` was loaded and stored exactly so many times."""
    moved = traffic.of(tensor)
    assert moved.loads_each.unique().tolist() == [loads] * bool(tensor.numel())
    assert moved.stores_each.unique().tolist() == [stores] * bool(tensor.numel())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage that `tensor` is a view of."""
    flat = torch.empty(0, dtype=tensor.dtype)
    return flat.set_(tensor.untyped_storage())


def assert_written(traffic: Traffic, dz: torch.Tensor, target: torch.Tensor) -> None:
    """Each element was stored once; the target's, which is written at the end, once more."""
    is_target = torch.arange(dz.shape[-1]) == target[..., None]
    moved = traffic.of(dz)
    assert torch.equal(moved.stores_each, 1 + is_target.long()) and not moved.loads


def run_token_logprob(logits: torch.Tensor, target: torch.Tensor):
    """Traffic of the forward, traffic of the backward, statistics, gradient."""
    z = logits.detach().requires_grad_()
    with count_memory() as forward:
        out = rl.token_logprob(z, target, backend="triton")
    with count_memory() as backward:
        (dz,) = torch.autograd.grad(sum(out).sum(), z)
    return forward, backward, out, dz


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_logprob_reads_each_logit_once_forward_and_once_backward(shape, dtype):
    logits = flat(*shape, dtype)
    target = random_target(logits)
    forward, backward, out, dz = run_token_logprob(logits, target)
    is_target = (torch.arange(shape[1]) == target[:, None]).long()
    for traffic in (forward, backward):
        assert torch.equal(traffic.of(logits).loads_each, 1 + is_target), "the target's logit again"
        assert not traffic.of(logits).stores
    for statistic in out:
        assert_moved(forward, statistic, loads=0, stores=1)
    assert_written(backward, dz, target)
    assert not forward.out_of_bounds and not backward.out_of_bounds


@pytest.mark.parametrize("layout", UNIT_STRIDE)
def test_nothing_between_the_rows_is_touched(layout):
    logits = LAYOUTS[layout](torch.bfloat16)
    target = random_target(logits)
    forward, backward, _, dz = run_token_logprob(logits, target)
    for traffic in (forward, backward):
        inside, everything = traffic.of(logits), traffic.of(whole(logits))
        assert (inside.loads, inside.stores) == (everything.loads, everything.stores)
        assert not traffic.out_of_bounds
    assert backward.of(whole(dz)).stores == dz.numel() + target.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy_loss_reads_each_logit_at_most_twice_and_writes_it_once(shape, dtype):
    inputs = policy_inputs(flat(*shape, dtype), "ref_logp", beta=0.1, entropy_coef=0.1)
    z = inputs.logits.requires_grad_()
    with count_memory() as traffic:
        out = rl.policy_loss(z, inputs.target, inputs.advantage, backend="triton", **inputs.options)
        (dz,) = torch.autograd.grad(out.loss, z)
    is_target = torch.arange(shape[1]) == inputs.target[:, None]
    assert torch.equal(traffic.of(z).loads_each, 2 + is_target.long()), "the target's once more"
    assert not traffic.of(z).stores
    assert_written(traffic, dz, inputs.target)
    for x in (out.logp, out.entropy, out.kl, out.clipped):
        assert_moved(traffic, x, loads=0, stores=1)
    assert not traffic.out_of_bounds


def test_inplace_backward_needs_no_memory_but_the_logits():
    inputs = policy_inputs(flat(3, 1000, torch.bfloat16))
    z = inputs.logits.requires_grad_() * 1
    with count_memory() as traffic:
        out = rl.policy_loss(
            z, inputs.target, inputs.advantage, inplace_backward=True, backend="triton"
        )
    assert (traffic.of(z).stores_each == 1).sum() == z.numel() - z.shape[0], "targets' twice"
    biggest = max(storage.nbytes() for storage in traffic.storages.values())
    assert biggest == z.untyped_storage().nbytes() and out.loss.isfinite()
    assert sum(s.nbytes() >= biggest for s in traffic.storages.values()) == 1


def test_masked_rows_are_not_read():
    inputs = policy_inputs(flat(4, 1000, torch.float32), "old_logp")
    mask = torch.tensor([True, False, False, True])
    z = inputs.logits.requires_grad_()
    with count_memory() as traffic:
        out = rl.policy_loss(
            z, inputs.target, inputs.advantage, mask=mask, backend="triton", **inputs.options
        )
        (dz,) = torch.autograd.grad(out.loss, z)
        again = rl.token_logprob(z, inputs.target, mask=mask, backend="triton")
        torch.autograd.grad(again.logp.sum(), z)
    assert not traffic.of(z).loads_each[~mask].any()
    assert traffic.of(dz).stores_each.unique().tolist() in ([1], [1, 2])


def test_rows_without_gradient_are_read_once():
    inputs = policy_inputs(flat(4, 9001, torch.float32))
    inputs.advantage[[0, 2]] = 0
    z = inputs.logits.requires_grad_()
    with count_memory() as traffic:
        rl.policy_loss(z, inputs.target, inputs.advantage, backend="triton")
    reads = traffic.of(z).loads_each.sum(1)
    assert (reads[[0, 2]] <= 9002).all() and (reads[[1, 3]] > 9002).all()


def test_a_target_out_of_range_reads_nothing_outside_its_row():
    z, target = flat(3, 127, torch.float32).requires_grad_(), torch.tensor([-1, 127, 2**40])
    with count_memory() as traffic:
        out = rl.policy_loss(z, target, torch.ones(3), backend="triton")
        torch.autograd.grad(out.loss, z)
        torch.autograd.grad(rl.token_logprob(z, target, backend="triton").logp.sum(), z)
    assert not traffic.out_of_bounds
