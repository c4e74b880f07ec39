"""Wrong versions of the surrogates, each of which the ordinary assertions must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from helpers import DEVICE
from helpers.cases import batch, flat, policy_inputs
from helpers.checks import check_policy_loss
from helpers.mutants import TESTS, Mutant, function, load_kernels, read_mutants, unload
from helpers.surrogates import OPTIONS

CASES = [
    pytest.param(path.stem.split(".")[1], mutant, id=f"{path.stem}-{mutant.name}")
    for path in sorted((TESTS / "mutants" / "surrogates").glob("*.txt"))
    for mutant in read_mutants(path)
]


@pytest.fixture(autouse=True)
def clean_modules(device: str):
    torch.manual_seed(0)
    yield
    unload()


def surrogate_checks(op: Callable, backend: str, first: str = "") -> Iterator[Callable[[], None]]:
    """The battery; it starts with the surrogates that are named in `first`, to save time."""

    def check(inputs, level="token", **options):
        inputs.options |= {"importance_sampling_level": level, **options}
        return partial(check_policy_loss, op, inputs, device=DEVICE, backend=backend)

    yield partial(assert_overflow_keeps_its_place, op, backend)
    if backend == "triton" or DEVICE != "cpu":
        yield partial(assert_a_target_out_of_range_shows, op, backend)
    if backend == "torch" or "dppo_kl" in first:
        # enough tokens that some lie between two bounds, and between two directions of the KL
        tokens = 200 if backend == "triton" else 1000
        inputs = policy_inputs(flat(tokens, 10, torch.float32), "old_logp")
        inputs.options["old_logp"].clamp_(max=-0.05)
        yield check(inputs, surrogate="dppo_kl", epsilon=0.02, epsilon_high=0.05)
    for name in sorted(
        set(OPTIONS) - {"gmpo", "vespo", "reinforce"}, key=lambda n: (n not in first, n)
    ):
        torch.manual_seed(0)  # the same tokens in whatever order
        inputs = policy_inputs(flat(32, 30, torch.float32), "old_logp", "mask", masked=0.2)
        yield check(inputs, surrogate=name, **OPTIONS[name])
    if backend == "triton":
        return  # the sequence level is the torch formulas' on either backend
    for name in ("ppo_clip", "gmpo", "vespo", "cispo"):
        inputs = policy_inputs(batch(4, 8, 30, torch.float32), "old_logp", "mask", masked=0.3)
        yield check(inputs, "sequence", surrogate=name, **OPTIONS[name])
    inputs = policy_inputs(flat(12, 30, torch.float32), "old_logp")
    cu_seqlens = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    yield check(inputs, "sequence", cu_seqlens=cu_seqlens)


def assert_a_target_out_of_range_shows(op: Callable, backend: str) -> None:
    z = torch.randn(2, 30, device=DEVICE, requires_grad=True)
    target, advantage = torch.tensor([3, 30], device=DEVICE), torch.ones(2, device=DEVICE)
    loss = op(z, target, advantage, surrogate="reinforce", backend=backend).loss
    assert torch.autograd.grad(loss, z)[0][1].isnan().all()


def assert_overflow_keeps_its_place(op: Callable, backend: str) -> None:
    """Of e^100 or e^1000: nothing from no advantage or a clip; the product where it is finite."""
    z = torch.tensor([[0.0, 0, -200], [0.0, 0, -200]], device=DEVICE)
    target = torch.zeros(2, dtype=torch.long, device=DEVICE)
    old_logp, lower = (torch.full((2,), x, device=DEVICE) for x in (-100.0, -1000.0))

    def run(advantage, logits=z, **options):
        leaf = logits.clone().requires_grad_()
        given = {"old_logp": old_logp[: len(logits)], "backend": backend, **options}
        advantage = torch.tensor(advantage, device=DEVICE)
        loss = op(leaf, target[: len(logits)], advantage, **given).loss
        return loss.item(), torch.autograd.grad(loss, leaf)[0].cpu()

    for surrogate in ("ppo_clip", "sapo", "dppo_tv", "dppo_kl"):
        assert run([0.0, 1.0], surrogate=surrogate, old_logp=lower)[1].isfinite().all()
    loss, dz = run([0.0, 0.0], old_logp=lower)
    assert loss == 0 and not dz.any()
    small = 1e-30  # times e^99.3 it is 1.3e13
    loss, dz = run([-small, 0.0], num_items=1)
    assert abs(loss / (small * math.exp(100) / 2) - 1) < 1e-3
    assert abs(dz[0, 0].item() / (small * math.exp(100) / 4) - 1) < 1e-3 and not dz[1].any()
    loss, dz = run([-1.0, 0.0])
    assert loss > 1e37 and not dz.isnan().any()
    penalty = {"surrogate": "ppo_penalty", "surrogate_params": {"kl_coef": 2.0}}
    loss, dz = run([2.0, 2.0], **penalty)
    assert abs(loss - (-2 - 2 * (100 - math.log(2)))) < 1e-3 and dz.isfinite().all()
    taus = {"tau_pos": 100.0, "tau_neg": 100.0}
    far = {"old_logp": torch.zeros(1, device=DEVICE), "surrogate_params": taus}
    assert run([1.0], z[:1] - z[:1] * 0.0, surrogate="sapo", **far)[1].isfinite().all()
    if backend == "torch":
        # a clipped or unweighted sequence, where autograd goes through the formula
        shared = {"importance_sampling_level": "sequence", "old_logp": lower[None]}
        for advantage, ratio in ((1.0, 1.0), (-1.0, 0.0)):
            advantage, ratio = (torch.full((1, 2), x, device=DEVICE) for x in (advantage, ratio))
            leaf = z[None].clone().requires_grad_()
            out = op(leaf, target[None], advantage, importance_sampling_ratio=ratio,
                     backend=backend, **shared)  # fmt: skip
            assert not torch.autograd.grad(out.loss, leaf)[0].any()


def test_unchanged_surrogates_pass_the_battery(backend, tmp_path):
    for check in surrogate_checks(function(load_kernels(tmp_path), "policy_loss"), backend):
        check()


@pytest.mark.parametrize("backend, mutant", CASES)
def test_a_wrong_surrogate_is_refused(backend: str, mutant: Mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), "policy_loss")
    for check in surrogate_checks(op, backend, first=mutant.name):
        try:
            check()
        except AssertionError:
            return
    pytest.fail(f"every check accepted the mutant {mutant.name!r}")
