"""The registered operators and the autograd around them: what PyTorch asks of an operator."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cases import flat, policy_inputs
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import rlcore as rl
import rlcore.kernels.rows.policy_loss  # registers every operator of the row kernels

pytestmark = pytest.mark.usefixtures("poisoned_empty")
both = pytest.mark.parametrize("name", ["token_logprob", "policy_loss"])
OPTIONS = {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.5, "delta": 3.0}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def token_logprob_sample(device: str, backend: str) -> tuple:
    z = flat(3, 37, torch.float32).to(device).requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    return z, torch.arange(3, device=device), mask, 0.7, True, backend


def token_logprob_backward_sample(device: str, backend: str) -> tuple:
    z, target, mask, temperature, _, backend = token_logprob_sample(device, backend)
    z = z.detach()
    statistics = torch.ops.rlcore.token_logprob(z, target, mask, temperature, True, backend)
    _, entropy, _, row_max, log_sum = statistics
    upstream = torch.randn(3, 3, device=device).unbind()
    return z, target, mask, entropy, row_max, log_sum, *upstream, temperature, backend


def policy_loss_sample(device: str, backend: str) -> tuple:
    z, target, mask, temperature, _, backend = token_logprob_sample(device, backend)
    per_token = torch.randn(4, 3, device=device).unbind()
    weight = torch.where(mask, 0.5, 0.0)
    options = ("ppo_clip", "k3", [0.1, 0.05, 0.2, 0.3, 3.0])
    return z, target, *per_token, weight, *options, temperature, backend


SAMPLES = {
    "rlcore::token_logprob": token_logprob_sample,
    "rlcore::token_logprob_backward": token_logprob_backward_sample,
    "rlcore::policy_loss": policy_loss_sample,
}


def test_every_operator_of_the_row_kernels_has_a_sample():
    """Operators of other modules are checked by the modules' own tests."""
    names = torch._C._dispatch_get_all_op_names()
    prefixes = ("rlcore::token_logprob", "rlcore::policy_loss")
    assert {name for name in names if name.startswith(prefixes)} == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_pass_opcheck(name, device, backend):
    operator = getattr(torch.ops.rlcore, name.removeprefix("rlcore::")).default
    torch.library.opcheck(operator, SAMPLES[name](device, backend))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("used", ["logp", "entropy", "lse", "all"])
def test_token_logprob_passes_gradcheck_in_float64(used, temperature, device, backend):
    z = flat(2, 7, torch.float64).to(device).requires_grad_()
    target = torch.tensor([0, 6], device=device)

    def run(z):
        out = rl.token_logprob(z, target, temperature=temperature, backend=backend)
        return tuple(out) if used == "all" else getattr(out, used)

    assert torch.autograd.gradcheck(run, z)


@pytest.mark.parametrize(
    "surrogate, kl_estimator",
    [
        *itertools.product(["reinforce", "ppo_clip"], ["k1", "k2", "k3"]),
        # without old_logp the ratio is 1 wherever a finite difference looks
        ("ppo_clip", "k3_ratio"),
    ],
)
def test_policy_loss_passes_gradcheck_in_float64(surrogate, kl_estimator, device, backend):
    names = ["ref_logp", "importance_sampling_ratio"] + ["old_logp"] * (surrogate == "ppo_clip")
    inputs = policy_inputs(flat(3, 4, torch.float64), *names, temperature=0.5)
    options = {k: v.to(device) if k in names else v for k, v in inputs.options.items()}
    options |= {"kl_estimator": kl_estimator, "surrogate": surrogate}
    options |= {"beta": 0.25, "entropy_coef": 0.125}
    args = (inputs.target.to(device), inputs.advantage.to(device))
    z = inputs.logits.to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: rl.policy_loss(z, *args, backend=backend, **options).loss, z
    )


def losses(device: str, backend: str):
    """Functions of the logits that use each public operation, and the logits."""
    inputs = policy_inputs(flat(6, 37, torch.float32), "old_logp", "ref_logp", "mask", masked=0.3)
    options = {name: value.to(device) for name, value in inputs.options.items()} | OPTIONS
    target, advantage = inputs.target.to(device), inputs.advantage.to(device)

    def token_logprob(z):
        out = rl.token_logprob(z, target, temperature=0.5, mask=options["mask"], backend=backend)
        return (out.logp * advantage + out.entropy - 0.1 * out.lse).sum()

    def policy_loss(z):
        return rl.policy_loss(z, target, advantage, backend=backend, **options).loss

    return {"token_logprob": token_logprob, "policy_loss": policy_loss}, inputs.logits.to(device)


@both
def test_operations_compile_as_one_graph(name, device, backend):
    torch._dynamo.reset()
    functions, logits = losses(device, backend)

    def step(z):
        return functions[name](z * 1.5)

    z = logits.requires_grad_()
    compiled = torch.compile(step, fullgraph=True)
    loss, want = compiled(z), step(z)
    torch.testing.assert_close(loss, want)
    (dz,), (want_dz,) = torch.autograd.grad(loss, z), torch.autograd.grad(want, z)
    torch.testing.assert_close(dz, want_dz)


@both
def test_the_registered_operator_and_the_short_way_agree(name, device, backend):
    functions, logits = losses(device, backend)
    z = logits.requires_grad_()
    short = functions[name](z)
    with FlopCounterMode(display=False):
        long = functions[name](z)
    torch.testing.assert_close(long, short)
    (a,), (b,) = (torch.autograd.grad(x, z) for x in (long, short))
    torch.testing.assert_close(a, b)


@both
def test_a_double_backward_raises(name, device, backend):
    functions, logits = losses(device, backend)
    z = logits.requires_grad_()
    (dz,) = torch.autograd.grad(functions[name](z), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(dz.square().sum(), z)


@both
def test_forward_mode_raises(name, device, backend):
    functions, logits = losses(device, backend)
    tangent = torch.ones_like(logits)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(functions[name], (logits,), (tangent,))
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with forward_ad.dual_level(), mode, pytest.raises(NotImplementedError):
            functions[name](forward_ad.make_dual(logits, tangent))


@both
def test_function_transforms_raise(name, device, backend):
    functions, logits = losses(device, backend)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(functions[name])(logits)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(functions[name])(logits.expand(2, *logits.shape))


@both
def test_rows_may_lie_more_than_two_to_the_31_elements_apart(name, backend):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, "-m", "helpers.far_rows", name, backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 2048, "the memory between the rows was touched"
