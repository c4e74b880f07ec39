"""What a policy loss must be apart from accurate: the algorithms' properties, and good manners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.batteries import ALL, EVERYTHING
from helpers.cases import PolicyInputs, batch, flat, policy_inputs, random_target
from helpers.checks import check_policy_loss, promised_bits
from torch import Tensor

import rlcore as rl

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
CLIPPED = [(1.0, 2.0, None, 1.2), (-1.0, 0.5, None, 0.8), (-1.0, 4.0, 3.0, 3.0)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(inputs: PolicyInputs, device: str, backend: str, rows=slice(None), **more):
    """policy_loss on some rows of the inputs, and the gradient of its loss."""

    def part(x):
        # moved whole: a row moved alone would begin at another address
        return x.to(device)[rows] if isinstance(x, Tensor) else x

    z = part(inputs.logits).requires_grad_()
    options = {name: part(value) for name, value in inputs.options.items()} | more
    out = rl.policy_loss(z, part(inputs.target), part(inputs.advantage), backend=backend, **options)
    return out, torch.autograd.grad(out.loss, z)[0]


def one_token(ratio: float, device: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, target, logp, and the old_logp at which the token's ratio is `ratio`."""
    z = flat(1, 50, torch.float32).to(device).requires_grad_()
    target = torch.tensor([3], device=device)
    logp = rl.token_logprob(z, target, backend=backend).logp
    return z, target, logp, logp.detach() - torch.tensor(ratio).log().item()


@pytest.mark.parametrize("advantage, ratio, delta, held", CLIPPED)
def test_ppo_has_zero_gradient_when_clipped(advantage, ratio, delta, held, device, backend):
    z, target, _, old_logp = one_token(ratio, device, backend)
    advantage = torch.tensor([advantage], device=device)
    out = rl.policy_loss(z, target, advantage, old_logp=old_logp, delta=delta, backend=backend)
    torch.testing.assert_close(out.loss, -advantage[0] * held)
    assert out.clipped.all()
    assert not torch.autograd.grad(out.loss, z)[0].any()


@pytest.mark.parametrize("advantage, ratio", [(1.0, 0.5), (-1.0, 2.0)])
def test_ppo_is_not_clipped_where_the_move_is_to_be_undone(advantage, ratio, device, backend):
    z, target, logp, old_logp = one_token(ratio, device, backend)
    advantage = torch.tensor([advantage], device=device)
    out = rl.policy_loss(z, target, advantage, old_logp=old_logp, backend=backend)
    torch.testing.assert_close(out.loss, -advantage[0] * ratio)
    assert not out.clipped.any()
    (want,) = torch.autograd.grad(logp.sum() * -advantage[0] * ratio, z)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], want)


def test_on_policy_ppo_has_the_gradient_of_reinforce_and_a_ratio_of_exactly_one(device, backend):
    inputs = policy_inputs(flat(6, 127, torch.float32))
    z, target = inputs.logits.to(device).requires_grad_(), inputs.target.to(device)
    old_logp = rl.token_logprob(z, target, backend=backend).logp.detach()
    ppo, dppo = run(inputs, device, backend, old_logp=old_logp)
    assert torch.equal(ppo.logp, old_logp)
    _, dreinforce = run(inputs, device, backend, surrogate="reinforce")
    torch.testing.assert_close(dppo, dreinforce)


@pytest.mark.parametrize("surrogate", ["reinforce", "ppo_clip"])
def test_fused_loss_equals_token_logprob_and_the_formula(surrogate, device, backend):
    names = ("old_logp",) if surrogate == "ppo_clip" else ()
    inputs = policy_inputs(flat(16, 127, torch.float32), *names, surrogate=surrogate)
    fused, dfused = run(inputs, device, backend)
    z, target = inputs.logits.to(device).requires_grad_(), inputs.target.to(device)
    logp = rl.token_logprob(z, target, backend=backend).logp
    ratio = torch.exp(logp - inputs.options["old_logp"].to(device)) if names else logp * 0 + 1
    loss = oracle.SURROGATES[surrogate](ratio, logp, inputs.advantage.to(device))[0].mean()
    torch.testing.assert_close(fused.loss, loss)
    torch.testing.assert_close(dfused, torch.autograd.grad(loss, z)[0])


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_with_num_items_add_up_to_the_full_batch(mode, device, backend):
    inputs = policy_inputs(batch(4, 5, 40, torch.float32), *ALL, masked=0.3, beta=0.1)
    mask = inputs.options["mask"]
    items = int(mask.sum() if mode == "token-mean" else mask.any(1).sum())
    inputs.options |= {"loss_agg_mode": mode, "num_items": items}
    full, dfull = run(inputs, device, backend)
    local, _ = run(inputs, device, backend, num_items=None)
    parts = [run(inputs, device, backend, rows) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), full.loss)
    torch.testing.assert_close(torch.cat([dz for _, dz in parts]), dfull)
    torch.testing.assert_close(local.loss, full.loss)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode, device, backend):
    inputs = policy_inputs(batch(2, 5, 40, torch.float32), *ALL, loss_agg_mode=mode)
    inputs.options["mask"][:, 3:] = False
    if mode == "seq-mean-token-sum-norm":
        inputs.options["norm_length"] = 5
    padded, dpadded = run(inputs, device, backend)
    short, dshort = run(inputs, device, backend, rows=(slice(None), slice(0, 3)))
    torch.testing.assert_close(padded.loss, short.loss)
    torch.testing.assert_close(dpadded[:, :3], dshort)
    assert not dpadded[:, 3:].any()


def test_tokens_without_advantage_get_exactly_no_gradient(device, backend):
    inputs = policy_inputs(flat(6, 130, torch.float32))
    inputs.advantage[[1, 4]] = 0
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)
    _, dz = run(inputs, device, backend)
    assert dz.any(1).tolist() == [True, False, True, True, False, True]


def test_a_second_backward_over_a_retained_graph_gives_the_same(device, backend):
    inputs = policy_inputs(flat(4, 127, torch.float32))
    z = inputs.logits.to(device).requires_grad_()
    args = (inputs.target.to(device), inputs.advantage.to(device))
    loss = rl.policy_loss(z, *args, backend=backend).loss
    first = torch.autograd.grad(3 * loss, z, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(3 * loss, z)[0]
    assert torch.equal(first, second) and torch.equal(first, kept)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_inplace_backward_gives_the_same_gradient_in_the_logits(upstream, device, backend):
    inputs = policy_inputs(flat(4, 127, torch.bfloat16), "old_logp")
    args = (inputs.target.to(device), inputs.advantage.to(device))
    options = {"old_logp": inputs.options["old_logp"].to(device), "backend": backend}
    source = inputs.logits.to(device).requires_grad_()
    loss = rl.policy_loss(source, *args, **options).loss
    (want,) = torch.autograd.grad(loss * upstream, source)
    z = source * 1
    out = rl.policy_loss(z, *args, inplace_backward=True, **options)
    (dz,) = torch.autograd.grad(out.loss * upstream, z)
    assert torch.equal(dz, want) and dz.data_ptr() == z.data_ptr()


def test_inplace_backward_through_a_slice_of_the_models_logits(device, backend):
    source = batch(2, 4, 50, torch.float32).to(device).requires_grad_()
    args = (random_target(source[:, :-1]).to(device), torch.randn(2, 3).to(device))

    def gradient(inplace: bool) -> Tensor:
        logits = (source * 2)[:, :-1]
        loss = rl.policy_loss(logits, *args, inplace_backward=inplace, backend=backend).loss
        return torch.autograd.grad(loss, source)[0]

    assert torch.equal(gradient(inplace=True), gradient(inplace=False))


def test_without_inplace_backward_the_logits_stay_as_they_were(device, backend):
    inputs = policy_inputs(flat(4, 127, torch.bfloat16))
    before = inputs.logits.clone()
    run(inputs, device, backend)
    assert torch.equal(inputs.logits, before)


def test_logits_that_need_no_gradient_give_the_same_numbers(device, backend):
    inputs = policy_inputs(flat(4, 127, torch.float32), "ref_logp", beta=0.1)
    taped, _ = run(inputs, device, backend)
    with torch.no_grad():
        plain = rl.policy_loss(
            inputs.logits.detach().to(device),
            inputs.target.to(device),
            inputs.advantage.to(device),
            ref_logp=inputs.options["ref_logp"].to(device),
            beta=0.1,
            backend=backend,
        )
    assert not plain.loss.requires_grad
    for a, b in zip(plain, taped, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_the_same_row_gives_the_same_bits_in_any_batch(device, backend):
    promised_bits(backend)
    # The torch backend goes through 50257 columns in blocks of a few rows.
    n, v = (12, 1003) if backend == "triton" else (40, 50257)
    inputs = policy_inputs(flat(n, v, torch.bfloat16), *ALL, num_items=n, **EVERYTHING)

    def bits(rows: slice) -> tuple[Tensor, ...]:
        out, dz = run(inputs, device, backend, rows)
        return *out[1:], dz

    whole = bits(slice(0, n))
    for rows in (slice(0, n), slice(0, 1), slice(5, 6), slice(3, n)):
        for a, b in zip(bits(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_a_row_at_a_16_byte_boundary_has_the_same_bits_alone(device, backend):
    """A copy of one row at an address of its own; elsewhere tiles begin at other columns."""
    n, v = 5, 1008
    inputs = policy_inputs(flat(n, v, torch.bfloat16), *ALL, num_items=n, **EVERYTHING)
    out, dz = run(inputs, device, backend)
    for row in range(n):
        one = slice(row, row + 1)
        alone = replace(inputs, logits=inputs.logits[one].clone())
        alone.target, alone.advantage = inputs.target[one], inputs.advantage[one]
        alone.options = {
            k: x[one] if isinstance(x, Tensor) else x for k, x in inputs.options.items()
        }
        other, other_dz = run(alone, device, backend)
        for a, b in zip((*other[1:], other_dz), (*out[1:], dz), strict=True):
            assert torch.equal(a, b[one])


def test_a_target_out_of_range_shows(device, backend):
    z, target = flat(3, 127, torch.float32).to(device), torch.arange(3, device=device)
    target[1], advantage = 127, torch.ones(3, device=device)
    if backend == "torch" and device == "cpu":
        with pytest.raises(ValueError, match=r"target.*\[0, 127\).*127"):
            rl.policy_loss(z, target, advantage, backend=backend)
        return
    z.requires_grad_()
    out = rl.policy_loss(z, target, advantage, backend=backend)
    assert out.logp.isnan().tolist() == [False, True, False] and out.loss.isnan()
    (dz,) = torch.autograd.grad(out.loss, z)
    assert dz[1].isnan().all() and dz[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(dtype, device, backend):
    inputs = policy_inputs(flat(6, 2100, dtype), *ALL, **EVERYTHING)
    out, gradient = run(inputs, device, backend)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        again, same = run(inputs, device, backend)
    assert torch.equal(gradient, same)
    for mine, other in zip(out, again, strict=True):
        assert torch.equal(mine, other)
