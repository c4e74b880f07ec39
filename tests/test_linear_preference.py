"""The fused preference loss against naive logits in float64: values, gradients, chunks, mutants."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DEVICE
from helpers.heads import ROUNDING, naive_logits
from helpers.judge import EPS32, assert_no_worse_than_eager
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from torch.utils.flop_counter import FlopCounterMode

import rlcore as rl
from rlcore.kernels.formulas.pair_losses import PREFERENCE_LOSSES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MUTANTS = [
    pytest.param(mutant, id=mutant.name)
    for mutant in read_mutants(TESTS / "mutants" / "heads" / "linear_preference_loss.txt")
]
B, T, H, V = 3, 5, 9, 37
GEMMA = {"softcap": 2.0, "logit_scale": 0.7, "temperature": 0.8}


@pytest.fixture(autouse=True)
def clean(device):
    torch.manual_seed(0)
    yield
    unload()


class Inputs:
    def __init__(self, dtype=torch.float64, bias=True, pairs=B, length=T):
        rows = 2 * pairs
        self.hidden = torch.randn(rows, length, H).to(DEVICE, dtype)
        self.weight = (0.3 * torch.randn(V, H)).to(DEVICE, dtype)
        self.bias = torch.randn(V).to(DEVICE, dtype) if bias else None
        self.target = torch.randint(0, V, (rows, length), device=DEVICE)
        self.mask = torch.rand(rows, length, device=DEVICE) < 0.6
        self.mask[:, -1:] = True
        self.ref_logp = -8 + torch.randn(rows).to(DEVICE, torch.float64)

    def leaves(self, dtype=None):
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]

    def reference(self, name):
        return self.ref_logp if PREFERENCE_LOSSES[name].uses_reference else None


def fused(op, inputs, leaves, name="sigmoid", **options):
    hidden, weight, *bias = leaves
    options = {"beta": 0.3, "bias": bias[0] if bias else None} | options
    return op(
        hidden,
        weight,
        inputs.target,
        inputs.mask,
        inputs.reference(name),
        loss_type=name,
        **options,
    )


def naive(inputs, leaves, name="sigmoid", head=None, ld_weight=None):
    """From all logits, with the functional loss on their sums."""
    hidden, weight, *bias = leaves
    head = dict(head or {})
    temperature = head.pop("temperature", 1.0)
    logits = naive_logits(hidden, weight, bias[0] if bias else None, **head) / temperature
    logits = torch.where(inputs.mask[..., None], logits, 0.0)
    logp = logits.log_softmax(-1).gather(-1, inputs.target[..., None]).squeeze(-1)
    logp = torch.where(inputs.mask, logp, 0.0)
    chosen, rejected = logp.sum(1).chunk(2)
    reference = inputs.reference(name)
    reference = () if reference is None else reference.to(logp.dtype).chunk(2)
    lengths = inputs.mask.sum(1).chunk(2)
    return rl.preference_loss(
        chosen, rejected, *reference, loss_type=name, beta=0.3, chosen_length=lengths[0],
        rejected_length=lengths[1],
    )  # fmt: skip


def budget(tokens, dtype=torch.float64):
    return tokens * V * dtype.itemsize


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("tokens", [None, 2 * T, T, 0], ids=["whole", "a pair", "less", "a token"])
def test_loss_rewards_and_gradients_are_the_naive_ones(name, tokens, backend):
    if backend == "triton" and name not in ("sigmoid", "ipo_avg", "orpo", "aot"):
        pytest.skip("the row kernels know nothing of the formula")
    inputs = Inputs()
    leaves, expected_leaves = inputs.leaves(), inputs.leaves()
    chunk_bytes = None if tokens is None else budget(tokens)
    result = fused(
        rl.linear_preference_loss, inputs, leaves, name, chunk_bytes=chunk_bytes, backend=backend
    )
    expected = naive(inputs, expected_leaves, name)
    gradients = torch.autograd.grad(3.0 * result.loss, leaves)
    wanted = torch.autograd.grad(3.0 * expected.loss, expected_leaves)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [{}, GEMMA], ids=["plain", "gemma"])
def test_every_dtype_is_no_worse_than_eager(dtype, head, backend):
    inputs = Inputs(dtype)
    wide = inputs.leaves(torch.float64)
    truth = naive(inputs, wide, head=head)
    truths = [truth.loss, *torch.autograd.grad(truth.loss, wide)]
    eager_leaves = inputs.leaves()
    eager = naive(inputs, eager_leaves, head=head)
    eagers = [eager.loss, *torch.autograd.grad(eager.loss, eager_leaves)]
    leaves = inputs.leaves()
    result = fused(rl.linear_preference_loss, inputs, leaves, backend=backend, **head)
    ours = [result.loss, *torch.autograd.grad(result.loss, leaves)]
    for mine, theirs, true in zip(ours, eagers, truths, strict=True):
        scale = true.detach().abs().max().item()
        mine, theirs = ((x.double() - true).abs().max().item() / scale for x in (mine, theirs))
        assert mine <= 1.5 * theirs + 8 * torch.finfo(mine_dtype(dtype)).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_dweight_does_not_depend_on_how_many_pairs_go_together(dtype, backend):
    """Some gradients of the logits stand in dweight's memory, some behind it, some are remade."""
    from rlcore.kernels.head.pairs import plan_pairs

    inputs = Inputs(dtype, pairs=14)
    small = 2 * 2 * T * V * 6
    rows, weight = inputs.hidden.flatten(0, 1), inputs.weight
    plan = plan_pairs(rows, weight, inputs.mask.sum(1), (True, True, True), chunk_bytes=small)
    counted = int(inputs.mask.sum())
    own = H * (1 if dtype == torch.bfloat16 else 2)
    assert plan.chunk_tokens < plan.dz_tokens < counted - own - 8

    def gradients(chunk_bytes):
        leaves = inputs.leaves()
        loss = fused(
            rl.linear_preference_loss, inputs, leaves, chunk_bytes=chunk_bytes, backend=backend
        ).loss
        return torch.autograd.grad(loss, leaves)

    wide = inputs.leaves(torch.float64)
    truths = torch.autograd.grad(naive(inputs, wide).loss, wide)
    for few, whole, truth in zip(gradients(small), gradients(None), truths, strict=True):
        errors = [(x.double() - truth).norm() / truth.norm() for x in (few, whole)]
        assert errors[0] <= 1.05 * errors[1] + 1e-6, errors
        assert (few != whole).double().mean() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_budget_loses_a_part_of_a_gradient(dtype):
    """Chunks of every size, with every remainder of what is kept and what is made again."""
    inputs = Inputs(dtype, pairs=7, length=3)
    inputs.mask[:] = True
    inputs.hidden, inputs.weight = inputs.hidden[..., :1], inputs.weight[:5, :1]
    inputs.bias, inputs.target = inputs.bias[:5], inputs.target % 5
    wide, eager_leaves = inputs.leaves(torch.float64), inputs.leaves()
    truths = torch.autograd.grad(naive(inputs, wide).loss, wide)
    eager = torch.autograd.grad(naive(inputs, eager_leaves).loss, eager_leaves)
    for chunk_bytes in range(0, 43 * 5 * 6, 5 * 6):
        leaves = inputs.leaves()
        loss = fused(rl.linear_preference_loss, inputs, leaves, chunk_bytes=chunk_bytes).loss
        for three in zip(torch.autograd.grad(loss, leaves), eager, truths, strict=True):
            eps = ROUNDING.get(dtype, EPS32)
            assert_no_worse_than_eager(*three, name=f"at {chunk_bytes} bytes", eps=eps)


def mine_dtype(dtype):
    """Gradients come back in the inputs' dtype, rounded once or twice."""
    return dtype


@pytest.mark.parametrize("op_name", ["linear_preference_loss"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_one_is_refused(op_name, mutant, tmp_path):
    package = load_kernels(tmp_path, mutant)
    op = function(package, op_name)
    with pytest.raises(Exception):  # noqa: B017
        battery(op)


def test_the_battery_that_refuses_mutants_passes():
    battery(rl.linear_preference_loss)


def battery(op):
    """What each mutant has to trip over."""
    inputs = Inputs(pairs=4, length=6)
    for tokens in (None, 14, 0):
        for options in ({}, {"ld_alpha": 0.3}, {"use_weighting": True}, GEMMA):
            leaves, wide = inputs.leaves(), inputs.leaves()
            chunk_bytes = None if tokens is None else 2 * budget(tokens)
            result = fused(
                op, inputs, leaves, chunk_bytes=chunk_bytes, backend="torch", num_items=5, **options
            )
            expected = token_by_token(inputs, wide, options)
            gradients = torch.autograd.grad(0.7 * result.loss, leaves)
            wanted = torch.autograd.grad(0.7 * expected[0], wide)
            torch.testing.assert_close(result.loss, expected[0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(result.chosen_logp, expected[1], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(result.rejected_reward, expected[2], rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-12)


def token_by_token(inputs, leaves, options):
    """(loss over 5 pairs, chosen sums, rejected rewards), pair by pair in plain loops."""
    hidden, weight, *bias = leaves
    head = {k: v for k, v in options.items() if k in GEMMA}
    temperature = head.pop("temperature", 1.0)
    logits = naive_logits(hidden, weight, bias[0], **head) / temperature
    half = len(hidden) // 2
    total, chosen_sums, rejected_rewards = 0.0, [], []
    for pair in range(half):
        counts = [int(inputs.mask[row].sum()) for row in (pair, pair + half)]
        sums, factor = [], 1.0
        for row in (pair, pair + half):
            value, seen, aligned = 0.0, 0, 0.0
            for token in range(hidden.shape[1]):
                if not inputs.mask[row, token]:
                    continue
                seen += 1
                logp = logits[row, token].log_softmax(-1)
                share = options.get("ld_alpha", 1.0) if seen > min(counts) else 1.0
                value = value + share * logp[inputs.target[row, token]]
                aligned = aligned + (
                    logp[inputs.target[row, token]] - logp.exp().square().sum().log()
                )
            sums.append(value)
            if options.get("use_weighting"):
                factor = factor * (aligned / seen).exp().detach()
        ratios = [
            s - inputs.ref_logp[row] for s, row in zip(sums, (pair, pair + half), strict=True)
        ]
        margin = 0.3 * (ratios[0] - ratios[1])
        total = total - factor * torch.nn.functional.logsigmoid(margin) / 5
        chosen_sums.append(sums[0].detach())
        rejected_rewards.append(0.3 * ratios[1].detach())
    return total, torch.stack(chosen_sums), torch.stack(rejected_rewards)


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("tokens", [None, 0])
def test_gradcheck_of_what_needs_a_gradient(needs, tokens):
    inputs = Inputs(pairs=2, length=3)
    leaves = inputs.leaves()
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(bool(need))
    chunk_bytes = None if tokens is None else budget(tokens)

    def loss(*given):
        return fused(rl.linear_preference_loss, inputs, given, chunk_bytes=chunk_bytes).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("frozen", "nhv"), [(False, 6), (True, 4)])
def test_whole_pairs_take_no_recompute(frozen, nhv):
    inputs = Inputs(torch.float32, bias=False)
    inputs.mask[:] = True
    hidden, weight = inputs.leaves()
    weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        fused(
            rl.linear_preference_loss, inputs, [hidden, weight],
            chunk_bytes=budget(2 * T, torch.float32), backend="torch",
        ).loss.backward()  # fmt: skip
    assert counter.get_total_flops() == nhv * inputs.mask.numel() * H * V


def test_masked_tokens_cost_no_product_and_may_hold_anything(backend):
    inputs = Inputs(torch.float32, bias=False)
    clean = fused(rl.linear_preference_loss, inputs, inputs.leaves(), backend=backend)
    inputs.hidden[~inputs.mask] = torch.nan
    inputs.target[~inputs.mask] = -100
    leaves = inputs.leaves()
    dirty = fused(rl.linear_preference_loss, inputs, leaves, backend=backend)
    assert torch.equal(dirty.loss, clean.loss)
    with FlopCounterMode(display=False) as counter:
        dirty.loss.backward()
        fused(rl.linear_preference_loss, inputs, inputs.leaves(), backend="torch").loss.backward()
    assert leaves[0].grad[~inputs.mask].eq(0).all() and leaves[1].grad.isfinite().all()
    assert counter.get_total_flops() <= 6 * int(inputs.mask.sum()) * H * V


def test_padding_on_either_side_and_order_of_pairs_change_no_pair(backend):
    inputs = Inputs(torch.float64)
    whole = fused(rl.linear_preference_loss, inputs, inputs.leaves(), backend=backend)
    wider = Inputs(torch.float64, length=T + 3)
    wider.weight, wider.bias = inputs.weight, inputs.bias
    wider.mask[:] = False
    order = [2, 0, 1]
    rows = order + [row + B for row in order]
    for name in ("hidden", "target", "mask"):
        getattr(wider, name)[:, 2:-1] = getattr(inputs, name)[rows]
    wider.ref_logp = inputs.ref_logp[rows]
    other = fused(rl.linear_preference_loss, wider, wider.leaves(), backend=backend)
    torch.testing.assert_close(other.loss, whole.loss)
    torch.testing.assert_close(other.chosen_logp, whole.chosen_logp[order])


def test_a_second_head_is_the_reference(backend):
    inputs, other = Inputs(), Inputs()
    with torch.no_grad():
        ref_logp = rl.linear_token_logprob(
            other.hidden, other.weight, inputs.target, bias=other.bias, mask=inputs.mask
        ).logp.sum(1)
    hidden, weight, bias = inputs.leaves()
    common = dict(bias=bias, beta=0.3, backend=backend)
    given = rl.linear_preference_loss(
        hidden, weight, inputs.target, inputs.mask, ref_logp, **common
    )
    asked = rl.linear_preference_loss(
        hidden, weight, inputs.target, inputs.mask, ref_hidden=other.hidden,
        ref_weight=other.weight, ref_bias=other.bias, **common,
    )  # fmt: skip
    torch.testing.assert_close(asked, given)


def test_the_same_bits_twice_and_no_pairs_at_all():
    inputs = Inputs(torch.float32)
    results = []
    for _ in range(2):
        leaves = inputs.leaves()
        loss = fused(rl.linear_preference_loss, inputs, leaves).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(map(torch.equal, *results))
    empty = Inputs(torch.float32, pairs=0)
    leaves = empty.leaves()
    loss = fused(rl.linear_preference_loss, empty, leaves).loss
    loss.backward()
    assert loss == 0 and leaves[1].grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_without_a_counted_token_have_a_loss_and_no_gradient(dtype, backend):
    inputs = Inputs(dtype)
    inputs.mask[:] = False
    leaves = inputs.leaves()
    loss = fused(rl.linear_preference_loss, inputs, leaves, name="simpo", backend=backend).loss
    # -log sigmoid(-simpo_gamma), as both answers' means are 0
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.5)), rel=1e-6)
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_it_compiles_with_the_model_around_it():
    inputs = Inputs(torch.float32)

    def loss(hidden, weight, bias):
        hidden = torch.tanh(hidden)
        return fused(rl.linear_preference_loss, inputs, [hidden, weight, bias]).loss

    eager_leaves, leaves = inputs.leaves(), inputs.leaves()
    eager = loss(*eager_leaves)
    compiled = torch.compile(loss, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, eager_leaves)
    )


def test_bad_arguments_are_refused():
    inputs = Inputs()
    hidden, weight, _ = inputs.leaves()
    call = rl.linear_preference_loss
    rest = (inputs.target, inputs.mask)
    for arguments, options, message in (
        ((hidden[:5], weight, inputs.target[:5], inputs.mask[:5]), {}, "rows .chosen; rejected"),
        ((hidden, weight, *rest), {}, "needs a reference"),
        ((hidden, weight, *rest, inputs.ref_logp), {"loss_type": "simpo"}, "has no use for a ref"),
        ((hidden, weight, *rest, inputs.ref_logp[:2]), {}, "ref_logp must have shape"),
        ((hidden, weight, *rest), {"ref_hidden": hidden}, "go together"),
        (
            (hidden, weight, *rest, inputs.ref_logp),
            {"ref_hidden": hidden, "ref_weight": weight},
            "not both",
        ),
        ((hidden, weight, *rest, inputs.ref_logp), {"ld_alpha": 1.5}, "ld_alpha must be in"),
        ((hidden, weight, *rest, inputs.ref_logp), {"beta": -1.0}, "beta must be positive"),
        (
            (hidden, weight, *rest, inputs.ref_logp),
            {"temperature": 0.0},
            "temperature must be positive",
        ),
        (
            (hidden, weight, *rest),
            {"ref_hidden": hidden[:, :2], "ref_weight": weight},
            "leading shape of ref_hidden",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments, **options)
