"""The fused categorical KL against naive logits in float64: gradients, chunks, masks, mutants."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DEVICE
from helpers.head_pairs import (
    ALL,
    HEADS,
    HIDDEN_ALONE,
    Pair,
    call,
    check_pair,
    make_pair,
    naive,
    pair_checks,
    token_bytes,
)
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rlcore as rl
import rlcore.kernels.head.kl
from rlcore.kernels.head.kl_passes import make_pair_plan

OP = rl.linear_categorical_kl
INF = float("inf")
MUTANTS = [
    pytest.param(mutant, id=mutant.name)
    for mutant in read_mutants(TESTS / "mutants" / "head_pairs" / "linear_categorical_kl.txt")
]
BOTH, P_ALONE, Q_ALONE = ALL, (True,) * 3 + (False,) * 3, (False,) * 3 + (True,) * 3
CHUNKS = [None, 0, 3]


@pytest.fixture(autouse=True)
def clean(device):
    torch.manual_seed(0)
    yield
    unload()


def budget(pair: Pair, tokens: int | None) -> int | None:
    return None if tokens is None else tokens * token_bytes(pair)


# Values and gradients


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_equal_naive_logits_in_float64(head, tokens, backend):
    pair = make_pair(head=head)
    check_pair(OP, pair, backend=backend, chunk_bytes=budget(pair, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [BOTH, HIDDEN_ALONE])
@pytest.mark.parametrize("head", ["plain", "unlike"])
def test_every_dtype_is_no_worse_than_eager(dtype, needs, head, backend):
    pair = make_pair((40,), widths=(16, 24), vocabulary=101, dtypes=(dtype,) * 2, head=head)
    check_pair(OP, pair, backend=backend, needs=needs, chunk_bytes=budget(pair, 9))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str
)
def test_the_two_sides_may_differ_in_dtype(dtypes, backend):
    pair = make_pair(dtypes=dtypes)
    check_pair(OP, pair, backend=backend, chunk_bytes=budget(pair, 4))


@pytest.mark.parametrize("vocabulary, width", [(1, 1), (2, 3), (127, 31), (1000, 17)])
def test_odd_sizes_are_served(vocabulary, width, backend):
    pair = make_pair((5,), vocabulary=vocabulary, widths=(width, width + 2), bias=False)
    check_pair(OP, pair, backend=backend, chunk_bytes=budget(pair, 2))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (1, 1), (2, 5)])
@pytest.mark.parametrize("tokens", CHUNKS)
def test_any_number_of_tokens_in_any_number_of_chunks(shape, tokens, backend):
    pair = make_pair(shape)
    for needs in (BOTH, HIDDEN_ALONE):
        check_pair(OP, pair, backend=backend, needs=needs, chunk_bytes=budget(pair, tokens))


def test_it_is_the_kl_of_the_logits_in_the_same_direction(backend):
    """KL(p || q), by torch's own kl_div, whose arguments come the other way about."""
    pair = make_pair(masked=False, temperature=1.0)
    p, q = (torch.log_softmax(h @ w.T + b, -1) for h, w, b in (pair.tensors[:3], pair.tensors[3:]))
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(call(OP, pair, pair.tensors, backend=backend), want, **tolerance)


def test_a_head_against_itself_gives_zero_and_a_zero_gradient(backend):
    pair = make_pair(widths=(5, 5), dtypes=(torch.float32,) * 2)
    pair.tensors[3:] = pair.tensors[:3]
    leaves = pair.leaves()
    kl = call(OP, pair, leaves, backend=backend)
    assert not kl.any()
    for gradient in torch.autograd.grad(kl.sum(), leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_a_token_that_q_alone_bans_makes_the_kl_infinite_and_no_gradient_nan(backend):
    pair = make_pair(masked=False)
    pair.tensors[5][7] = -INF
    leaves = pair.leaves((True,) * 6)
    kl = call(OP, pair, leaves, backend=backend, chunk_bytes=budget(pair, 3))
    assert (kl == INF).all()
    dp_hidden, dp_weight, _, dq_hidden, *_ = torch.autograd.grad(kl.sum(), leaves)
    assert not dp_hidden.any() and not dp_weight.any()
    assert dq_hidden.isfinite().all() and dq_hidden.any()


def test_a_token_that_both_ban_contributes_nothing(backend):
    pair, fewer = make_pair(masked=False), make_pair(masked=False)
    fewer.tensors = [t if t.shape[0] == 11 else t[:-1] for t in pair.tensors]
    pair.tensors[2][-1] = pair.tensors[5][-1] = -INF
    got, want = (call(OP, x, x.tensors, backend=backend) for x in (pair, fewer))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_batch_with_every_token_masked_gives_a_differentiable_zero(backend):
    pair = make_pair()
    pair.mask[:] = False
    for needs in (BOTH, HIDDEN_ALONE):
        leaves = [t for t in pair.leaves(needs)]
        kl = call(OP, pair, leaves, backend=backend, chunk_bytes=0)
        assert not kl.any()
        wanted = [t for t in leaves if t.requires_grad]
        assert not any(g.any() for g in torch.autograd.grad(kl.sum(), wanted))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4))[:-1])
@pytest.mark.parametrize("tokens", CHUNKS)
def test_gradcheck_of_what_needs_a_gradient(needs, tokens):
    pair = make_pair((4,), widths=(3, 2), vocabulary=7, masked=False, head="unlike")
    p_needs, q_needs = needs[:2], needs[2:]
    leaves = pair.leaves((*p_needs, p_needs[1], *q_needs, q_needs[1]))
    wanted = [t for t in leaves if t.requires_grad]

    def kl(*given):
        given = iter(given)
        every = [next(given) if t.requires_grad else t for t in leaves]
        return call(OP, pair, every, chunk_bytes=budget(pair, tokens), backend="torch")

    assert torch.autograd.gradcheck(kl, wanted)


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("needs", [BOTH, HIDDEN_ALONE])
def test_a_second_backward_over_a_retained_graph_gives_the_same(needs, tokens, backend):
    pair = make_pair(masked=False)
    leaves = pair.leaves(needs)
    wanted = [t for t in leaves if t.requires_grad]
    kl = call(OP, pair, leaves, backend=backend, chunk_bytes=budget(pair, tokens)).sum()
    first, second = (torch.autograd.grad(kl, wanted, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_nan_row_spoils_no_other(backend):
    pair = make_pair(masked=False, bias=False)
    pair.tensors[0][3] = torch.nan
    for needs in (BOTH, HIDDEN_ALONE):
        leaves = pair.leaves(needs)
        kl = call(OP, pair, leaves, backend=backend, chunk_bytes=0)
        assert kl.isnan().nonzero().tolist() == [[3]]
        # without a gradient of its own it leaves the others' alone
        chosen = torch.arange(11, device=DEVICE) != 3
        (dhidden,) = torch.autograd.grad(kl[chosen].sum(), leaves[0])
        assert dhidden.isfinite().all()


# Operations and memory


# needs of hidden, weight, bias for p and q; tokens of a chunk; strategy; operations over N V,
# in hidden sizes of (both for logits, p's gradients, q's gradients)
PLANS = [
    ((False,) * 6, 3, "forward", (1, 0, 0)),
    (BOTH, 64, "kept-logits", (1, 2, 2)),
    (P_ALONE, 64, "kept-logits", (1, 2, 0)),
    (HIDDEN_ALONE, 3, "unit-gradient", (1, 1, 1)),
    ((True,) + (False,) * 5, 3, "unit-gradient", (1, 1, 0)),
    (P_ALONE, 3, "recompute", (2, 2, 0)),
    (Q_ALONE, 3, "recompute", (2, 0, 2)),
    (BOTH, 3, "recompute", (2, 2, 2)),
    ((False, True, False, False, False, False), 3, "recompute", (2, 1, 0)),
]


@pytest.mark.parametrize("needs, tokens, strategy, products", PLANS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_operations_are_those_of_the_plan_and_the_docs(needs, tokens, strategy, products, softcap):
    pair = make_pair((16,), widths=(6, 8), masked=False, dtypes=(torch.float32,) * 2)
    pair.options |= {"p_softcap": softcap, "q_softcap": softcap}
    leaves = pair.leaves(needs)
    chunk_bytes = budget(pair, tokens)
    plan = make_pair_plan(
        [(leaves[0], leaves[1]), (leaves[3], leaves[4])], [needs[:3], needs[3:]],
        softcaps=[softcap] * 2, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    assert plan.strategy == strategy
    both, p, q = products
    assert plan.operations == 2 * 16 * pair.vocabulary * (14 * both + 6 * p + 8 * q)
    with FlopCounterMode(display=False) as counter:
        kl = call(OP, pair, leaves, chunk_bytes=chunk_bytes, backend="torch")
        if any(needs):
            kl.sum().backward()
    assert counter.get_total_flops() == plan.operations


def test_masked_tokens_and_those_without_a_gradient_cost_no_product():
    pair = make_pair((16,), widths=(6, 8), dtypes=(torch.float32,) * 2)
    pair.mask[:] = torch.arange(16, device=DEVICE) < 8
    leaves = pair.leaves()
    with FlopCounterMode(display=False) as counter:
        kl = call(OP, pair, leaves, chunk_bytes=budget(pair, 4), backend="torch")
        kl[:4].sum().backward()
    assert counter.get_total_flops() == 2 * pair.vocabulary * 14 * (8 + 4 + 4 + 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts a CPU's allocations")
@pytest.mark.parametrize("needs", [BOTH, P_ALONE, HIDDEN_ALONE])
@pytest.mark.parametrize("head", ["plain", "unlike"])
def test_peak_memory_is_what_the_plan_says(needs, head):
    """Allocations as a profiler of torch's allocator sees them, the row op's blocks beside."""
    pair = make_pair((512,), widths=(8, 8), vocabulary=20000, masked=False, head=head,
                     dtypes=(torch.float32,) * 2)  # fmt: skip
    leaves = pair.leaves(needs)
    chunk_bytes = 8 << 20
    plan = make_pair_plan(
        [(leaves[0], leaves[1]), (leaves[3], leaves[4])], [needs[:3], needs[3:]],
        softcaps=[pair.options.get(f"{side}_softcap") for side in "pq"], chunk_bytes=chunk_bytes,
    )  # fmt: skip
    wanted = [t for t in leaves if t.requires_grad]
    with torch.profiler.profile(profile_memory=True) as profile:
        kl = call(OP, pair, leaves, chunk_bytes=chunk_bytes, backend="torch")
        gradients = torch.autograd.grad(kl.sum(), wanted)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    returned = sum(g.nbytes for g in gradients)
    blocks = 4 * (3 << 20) * torch.get_num_threads()
    assert plan.peak_bytes <= chunk_bytes + (512 * 16 * 4 if needs == HIDDEN_ALONE else 0)
    assert most - returned <= plan.peak_bytes + blocks
    assert most - returned < 0.3 * 2 * 512 * 20000 * 4, "as much as the logits would take"


# PyTorch's machinery


def test_the_operators_serve_torch_compile():
    torch.compiler.reset()
    pair = make_pair((6,), dtypes=(torch.float32,) * 2, head="unlike")
    pair.tensors[0].nan_to_num_()
    leaves = pair.leaves()

    def model(*given):
        return call(OP, pair, [torch.tanh(given[0]), *given[1:]], chunk_bytes=budget(pair, 2)).sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for called in (compiled, model):
        kl = called(*leaves)
        results = [kl.detach(), *torch.autograd.grad(kl, leaves)]
        if called is compiled:
            wanted = results
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needs", [BOTH, HIDDEN_ALONE])
@pytest.mark.parametrize("tokens", [None, 2])
def test_gradient_checkpointing_around_the_heads_gives_the_same_gradients(needs, tokens, backend):
    pair = make_pair((6,), dtypes=(torch.float32,) * 2)
    more = {"backend": backend, "chunk_bytes": tokens and budget(pair, tokens)}

    def loss(*leaves):
        return call(OP, pair, leaves, **more).sum()

    plain, checkpointed = pair.leaves(needs), pair.leaves(needs)
    loss(*plain).backward()
    checkpoint(loss, *checkpointed, use_reentrant=False).backward()
    for got, want, needed in zip(checkpointed, plain, needs, strict=True):
        assert not needed or torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("needs", [BOTH, P_ALONE])
@pytest.mark.parametrize("jsd_beta", [None, 0.3])
def test_opcheck_accepts_the_operators(needs, jsd_beta, backend):
    pair = make_pair((6,), dtypes=(torch.float32,) * 2)
    tensors = [t.nan_to_num() for t in pair.tensors]
    options = (0.8, None, 0.7, 2.0, 1.0, 600, jsd_beta, list(needs), backend)
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    torch.library.opcheck(
        torch.ops.rlcore.linear_categorical_kl.default, (*leaves, pair.mask, *options)
    )
    tensors = [t.detach() for t in tensors]
    statistics = torch.ops.rlcore.linear_categorical_kl(*tensors, pair.mask, *options)
    dkl = torch.randn(6, device=DEVICE)
    torch.library.opcheck(
        torch.ops.rlcore.linear_categorical_kl_backward.default,
        (*tensors, pair.mask, list(statistics), dkl, *options),
    )


def test_fake_tensors_give_the_shape():
    with FakeTensorMode():
        hidden, weight = torch.empty(2, 3, 4), torch.empty(9, 4)
        kl = OP(hidden, weight, hidden, weight, backend="torch")
        assert kl.shape == (2, 3) and kl.dtype == torch.float32


def test_autocast_chooses_the_products_dtype_and_not_the_statistics():
    pair = make_pair((12,), dtypes=(torch.float32,) * 2, masked=False)
    rounded = pair.leaves((False,) * 6, torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = call(OP, pair, pair.tensors)
    torch.testing.assert_close(got, call(OP, pair, rounded), rtol=1e-5, atol=1e-6)


# Wrong input and wrong code


HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(7, 3)
REFUSED = {
    "p_hidden must have shape \\(N, H\\)": ((HIDDEN[0], WEIGHT, HIDDEN, WEIGHT), {}),
    "q_hidden must have the leading shape": ((HIDDEN, WEIGHT, HIDDEN[:2], WEIGHT), {}),
    "q_weight must have shape": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:, :2]), {}),
    "same vocabulary.*\\(7, 3\\).*\\(5, 3\\)": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:5]), {}),
    "p_bias must have shape": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"p_bias": torch.ones(3)}),
    "temperature must be positive": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"temperature": 0.0}),
    "q_softcap must be positive": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"q_softcap": -1.0}),
    "mask must be bool": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"mask": torch.ones(4)}),
    "mask must have the leading": (
        (HIDDEN, WEIGHT, HIDDEN, WEIGHT),
        {"mask": torch.ones(3).bool()},
    ),
    "chunk_bytes must not be negative": ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"chunk_bytes": -1}),
    "q_weight must be the head's weight tensor": (
        (HIDDEN, WEIGHT, HIDDEN, torch.nn.Linear(3, 7)),
        {},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_named(message):
    given, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        OP(*given, **options)


def test_the_battery_that_refuses_mutants_passes(backend):
    for check in pair_checks(OP, backend):
        check()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_one_is_refused(mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), "linear_categorical_kl")
    for check in pair_checks(op, "torch"):
        try:
            check()
        except (AssertionError, RuntimeError, IndexError):
            return
    pytest.fail(f"every check accepted the mutant {mutant.name!r}")


def test_the_judge_knows_the_two_directions_apart():
    pair = make_pair(widths=(5, 5))
    swapped = Pair([*pair.tensors[3:], *pair.tensors[:3]], pair.mask, pair.options)
    forward, backward = (naive(x, x.tensors, torch.float64) for x in (pair, swapped))
    assert not torch.allclose(forward, backward, rtol=0.05)
