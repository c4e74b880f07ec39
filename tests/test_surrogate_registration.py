"""A user's own surrogate: served at once on every path, and refused where it is wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.cases import batch, flat, policy_inputs

import rlcore as rl
from rlcore.kernels.formulas.surrogates import SURROGATES


@pytest.fixture(autouse=True)
def table():
    """Leaves the table as it was."""
    torch.manual_seed(0)
    before = dict(SURROGATES)
    yield
    SURROGATES.clear()
    SURROGATES.update(before)


def squared(logp, old_logp, advantage, parameters):
    """-r A + weight (log r)^2."""
    log_ratio = logp - old_logp
    loss = -advantage * torch.exp(log_ratio) + parameters[0] * log_ratio * log_ratio
    dlogp = -advantage * torch.exp(log_ratio) + 2 * parameters[0] * log_ratio
    return loss, dlogp, torch.zeros_like(logp, dtype=torch.bool)


@triton.jit
def squared_twin(logp, old_logp, advantage, parameters):
    log_ratio = logp - old_logp
    loss = -advantage * tl.exp(log_ratio) + parameters[0] * log_ratio * log_ratio
    dlogp = -advantage * tl.exp(log_ratio) + 2 * parameters[0] * log_ratio
    return loss, dlogp, logp < logp


@triton.jit
def squared_with_half_the_derivative(logp, old_logp, advantage, parameters):
    log_ratio = logp - old_logp
    loss = -advantage * tl.exp(log_ratio) + parameters[0] * log_ratio * log_ratio
    dlogp = -advantage * tl.exp(log_ratio) + parameters[0] * log_ratio
    return loss, dlogp, logp < logp


@triton.jit
def squared_that_clips(logp, old_logp, advantage, parameters):
    loss, dlogp, _ = squared_twin(logp, old_logp, advantage, parameters)
    return loss, dlogp, dlogp > 0


def run(backend, device, level="token", **more):
    torch.manual_seed(0)
    inputs = policy_inputs(batch(4, 5, 30, torch.float32), "old_logp")
    z = inputs.logits.to(device).requires_grad_()
    out = rl.policy_loss(
        z, inputs.target.to(device), inputs.advantage.to(device), surrogate="squared",
        old_logp=inputs.options["old_logp"].to(device), importance_sampling_level=level,
        backend=backend, **more,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, z)[0], inputs


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("twin", [None, squared_twin], ids=["torch alone", "with twin"])
def test_a_registered_surrogate_works_at_once(twin, level, backend, device):
    rl.register_surrogate("squared", squared, twin, parameters=("weight",), defaults={"weight": 1})
    out, dz, inputs = run(backend, device, level, surrogate_params={"weight": 0.3})
    z = inputs.logits.to(device).requires_grad_()
    log_ratio = rl.token_logprob(z, inputs.target.to(device), backend="torch").logp
    log_ratio = log_ratio - inputs.options["old_logp"].to(device)
    if level == "sequence":
        log_ratio = log_ratio.mean(1, keepdim=True)
    want = (-log_ratio.exp() * inputs.advantage.to(device) + 0.3 * log_ratio**2).mean()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(dz, torch.autograd.grad(want, z)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("twin, fused", [(None, False), (squared_twin, True)])
def test_a_twin_brings_the_one_launch_path(twin, fused, device):
    rl.register_surrogate("squared", squared, twin, parameters=("weight",), defaults={"weight": 1})
    out, _, _ = run("triton", device)
    assert ("_PolicyLoss" in str(out.loss.grad_fn)) == fused


def test_a_penalty_reaches_the_fused_head_where_the_advantage_is_zero(backend, device):
    rl.register_surrogate("squared", squared, squared_twin, parameters=("weight",))
    inputs = policy_inputs(flat(6, 30, torch.float32), "old_logp")
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight, target = torch.randn(30, 8, device=device), inputs.target.to(device)
    loss = rl.linear_policy_loss(
        hidden, weight, target, torch.zeros(6, device=device), surrogate="squared",
        old_logp=inputs.options["old_logp"].to(device), surrogate_params={"weight": 1.0},
        backend=backend,
    ).loss  # fmt: skip
    assert torch.autograd.grad(loss, hidden)[0].any(1).all()


def test_defaults_are_taken_and_a_parameter_without_one_must_be_given(device):
    rl.register_surrogate("squared", squared, parameters=("weight",))
    with pytest.raises(ValueError, match=r"squared.*needs surrogate_params \['weight'\]"):
        run("torch", device)
    SURROGATES.pop("squared")
    rl.register_surrogate("squared", squared, parameters=("weight",), defaults={"weight": 0.3})
    default, _, _ = run("torch", device)
    given, _, _ = run("torch", device, surrogate_params={"weight": 0.3})
    assert torch.equal(default.loss, given.loss)


def test_levels_bound_where_it_may_be_used(device):
    rl.register_surrogate(
        "squared", squared, parameters=("weight",), defaults={"weight": 1}, levels=("token",)
    )
    with pytest.raises(ValueError, match=r"squared.*sequence level"):
        run("torch", device, "sequence")


def wrong(change):
    """squared with its returned parts changed."""
    return lambda *arguments: change(*squared(*arguments))


REFUSED = {
    "sign of the derivative": (wrong(lambda a, d, c: (a, -d, c)), None, "derivative.*256 of 256"),
    "derivative of a part": (
        lambda *x: (squared(*x)[0], -x[2] * torch.exp(x[0] - x[1]), squared(*x)[2]),
        None,
        "derivative is not that of its loss",
    ),
    "derivative that is NaN": (wrong(lambda a, d, c: (a, d * torch.nan, c)), None, "derivative"),
    "loss that is a constant": (wrong(lambda a, d, c: (a.detach(), d, c)), None, "derivative"),
    "clipped where it moves": (wrong(lambda a, d, c: (a, d, ~c)), None, "clipped is true"),
    "mean over the batch": (
        wrong(lambda a, d, c: (a - a.mean().detach(), d, c)),
        None,
        "depends on the other tokens",
    ),
    "two parts": (wrong(lambda a, d, c: (a, d)), None, "must return a tuple"),
    "scalar loss": (wrong(lambda a, d, c: (a.sum(), d, c)), None, "logp's shape"),
    "clipped of floats": (wrong(lambda a, d, c: (a, d, c.float())), None, "bool clipped.*float32"),
    "twin of another derivative": (
        squared,
        squared_with_half_the_derivative,
        "triton_formula's dlogp is not torch_formula's",
    ),
    "twin that clips": (squared, squared_that_clips, "triton_formula clips other tokens"),
    "twin in plain Python": (squared, squared, "decorated with triton.jit"),
}


@pytest.mark.parametrize("formula, twin, message", REFUSED.values(), ids=REFUSED)
def test_a_wrong_surrogate_is_refused_and_leaves_no_trace(formula, twin, message):
    with pytest.raises(ValueError, match=message):
        rl.register_surrogate("squared", formula, twin, parameters=("weight",))
    assert "squared" not in SURROGATES


@pytest.mark.parametrize("name", SURROGATES)
def test_a_taken_name_is_refused(name):
    before = SURROGATES[name]
    with pytest.raises(ValueError, match=f"{name!r} is taken"):
        rl.register_surrogate(name, squared, parameters=("weight",))
    assert SURROGATES[name] is before


BAD = {
    "default of nothing": ({"defaults": {"wight": 1.0}}, r"\['weight'\].*\['wight'\]"),
    "default of epsilon": (
        {"parameters": ("epsilon",), "defaults": {"epsilon": 0.1}},
        r"\[\].*\['epsilon'\]",
    ),
    "level unknown": ({"levels": ("word",)}, "levels.*'token', 'sequence'.*'word'"),
    "no level": ({"levels": ()}, "levels"),
}


@pytest.mark.parametrize("changed, message", BAD.values(), ids=BAD)
def test_bad_options_of_a_registration_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.register_surrogate("squared", squared, **{"parameters": ("weight",)} | changed)


@pytest.mark.parametrize("name", [n for n, entry in SURROGATES.items() if "token" in entry.levels])
def test_the_tables_own_surrogates_pass_the_registrations_checks(name):
    entry = SURROGATES[name]
    rl.register_surrogate(
        f"{name} again", entry.torch, entry.triton, parameters=entry.parameters,
        defaults=entry.defaults,
    )  # fmt: skip
    assert SURROGATES[f"{name} again"].parameters == entry.parameters


def test_an_unknown_name_lists_a_registered_one():
    rl.register_surrogate("squared", squared, parameters=("weight",))
    with pytest.raises(ValueError, match=r"'squared'.*'sqared'"):
        inputs = policy_inputs(flat(2, 5, torch.float32))
        rl.policy_loss(inputs.logits, inputs.target, inputs.advantage, surrogate="sqared")
