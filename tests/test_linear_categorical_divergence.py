"""rl.linear_categorical_divergence against naive logits in float64, and its code changed."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.head_pairs import ALL, HEADS, HIDDEN_ALONE, Pair, call, check_pair, make_pair, naive
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from torch.utils.flop_counter import FlopCounterMode

import rlcore as rl
import rlcore.kernels.head.divergence  # registers the operator tested here

MUTANTS = read_mutants(TESTS / "mutants" / "head_pairs" / "linear_categorical_divergence.txt")
LOSS_MUTANTS = read_mutants(TESTS / "mutants" / "head_pairs" / "linear_divergence_loss.txt")
DIVERGENCES = {
    "forward_kl": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "jsd": {"kind": "jsd", "jsd_beta": 0.5},
    "skewed": {"kind": "jsd", "jsd_beta": 0.1},
}
STUDENT_ALONE, FROZEN_HEADS = (True,) * 3 + (False,) * 3, (True,) + (False,) * 5


@pytest.fixture(autouse=True)
def clean(device):
    torch.manual_seed(0)
    yield
    unload()


def make(name: str, *given, **options) -> Pair:
    pair = make_pair(*given, **options)
    pair.divergence = DIVERGENCES[name]
    return pair


def few_at_a_time(pair: Pair) -> dict[str, int]:
    return {"chunk_bytes": 3 * 24 * pair.vocabulary}


def checks(op, backend: str):
    """What every wrong implementation trips over."""
    for name in DIVERGENCES:
        for head in HEADS:
            for needs in (ALL, HIDDEN_ALONE, STUDENT_ALONE):
                pair = make(name, head=head)
                yield lambda p=pair, n=needs: check_pair(op, p, backend=backend, needs=n)
                yield lambda p=pair, n=needs: check_pair(
                    op, p, backend=backend, needs=n, **few_at_a_time(p)
                )
        half = make(name, widths=(8, 8), dtypes=(torch.float16,) * 2)
        yield lambda p=half: check_pair(op, p, backend=backend, upstream=2e-5, **few_at_a_time(p))


def test_values_and_gradients_equal_naive_logits_in_float64(backend):
    for check in checks(rl.linear_categorical_divergence, backend):
        check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_one_is_refused(mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), "linear_categorical_divergence")
    for check in checks(op, "torch"):
        try:
            check()
        except (AssertionError, RuntimeError, IndexError):
            return
    pytest.fail(f"every check accepted the mutant {mutant.name!r}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_dtype_is_no_worse_than_eager(name, dtype, backend):
    pair = make(name, (40,), widths=(16, 24), vocabulary=101, dtypes=(dtype,) * 2, head="unlike")
    check_pair(rl.linear_categorical_divergence, pair, backend=backend, **few_at_a_time(pair))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("needs", [STUDENT_ALONE, FROZEN_HEADS, HIDDEN_ALONE])
def test_gradcheck(name, needs):
    pair = make(name, (4,), widths=(3, 2), vocabulary=7, masked=False, head="unlike")
    leaves = pair.leaves(needs)
    wanted = [t for t in leaves if t.requires_grad]

    def divergence(*given):
        given = iter(given)
        every = [next(given) if t.requires_grad else t for t in leaves]
        return call(
            rl.linear_categorical_divergence, pair, every, backend="torch", **few_at_a_time(pair)
        )

    assert torch.autograd.gradcheck(divergence, wanted)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_the_divergence_of_the_logits(name):
    pair = make(name, (2, 6), dtypes=(torch.float32,) * 2, bias=False, masked=False)
    hidden, weight, _, other, other_weight, _ = pair.tensors
    logits = hidden @ weight.T, other @ other_weight.T
    want = rl.categorical_divergence(*logits, temperature=0.8, **pair.divergence)
    got = call(rl.linear_categorical_divergence, pair, pair.tensors)
    assert got.shape == (2, 6)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # and the judge tells the two sides apart
    turned = Pair([*pair.tensors[3:], *pair.tensors[:3]], None, pair.options, pair.divergence)
    if name != "jsd":
        assert not torch.allclose(naive(turned, turned.tensors, torch.float32), want, rtol=0.02)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("needs", "operations"),
    [((False,) * 6, (1, 0)), (FROZEN_HEADS, (1, 1)), (STUDENT_ALONE, (2, 2))],
)
def test_a_frozen_teacher_costs_its_logits_alone(name, needs, operations):
    pair = make(name, (16,), widths=(6, 8), masked=False, dtypes=(torch.float32,) * 2)
    leaves = pair.leaves(needs)
    both, student = operations
    with FlopCounterMode(display=False) as counter:
        found = call(
            rl.linear_categorical_divergence, pair, leaves, backend="torch", **few_at_a_time(pair)
        )
        if any(needs):
            found.sum().backward()
    expected = 2 * 16 * pair.vocabulary * (14 * both + 6 * student)
    assert counter.get_total_flops() == expected


class Summed:
    """`op` as the loss that it is with num_items, one number a call, spread over the tokens."""

    def __init__(self, op):
        self.op = op

    def __call__(self, *given, **options):
        loss = self.op(*given, num_items=5.0, **options)
        assert loss.shape == ()
        return loss.expand(1)


def check_loss(op, pair, needs=ALL, **options):
    """The loss and its gradients for an upstream factor, against those of all logits in float64."""
    leaves, wide = pair.leaves(needs), pair.leaves(needs, torch.float64)
    loss = 3 * call(Summed(op), pair, leaves, **options).sum()
    exact = 3 * naive(pair, wide, torch.float64).sum() / 5
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6)
    asked = [[t for t in side if t is not None and t.requires_grad] for side in (leaves, wide)]
    found = torch.autograd.grad(loss, asked[0], retain_graph=True)
    again = torch.autograd.grad(loss, asked[0])
    for one, two, want in zip(found, again, torch.autograd.grad(exact, asked[1]), strict=True):
        assert torch.equal(one, two)
        close = 2e-2 if one.dtype.itemsize == 2 else 1e-4
        size = want.abs().max().item()
        torch.testing.assert_close(one.double(), want, rtol=close, atol=close * max(size, 1e-3))


def loss_checks(op, backend):
    for name in DIVERGENCES:
        for needs in (ALL, HIDDEN_ALONE, STUDENT_ALONE, (False, True) + (False,) * 4):
            for head in ("plain", "unlike"):
                pair = make(name, head=head, dtypes=(torch.float32,) * 2)
                more = few_at_a_time(pair) | {"backend": backend}
                yield lambda p=pair, n=needs, m=more: check_loss(op, p, n, **m)


def test_with_num_items_it_is_the_summed_loss(backend):
    for check in loss_checks(rl.linear_categorical_divergence, backend):
        check()


@pytest.mark.parametrize("mutant", LOSS_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_loss_is_refused(mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), "linear_categorical_divergence")
    for check in loss_checks(op, "torch"):
        try:
            check()
        except (AssertionError, RuntimeError, IndexError):
            return
    pytest.fail(f"every check accepted the mutant {mutant.name!r}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_of_every_dtype(name, dtype):
    pair = make(name, (40,), widths=(16, 24), vocabulary=101, dtypes=(dtype,) * 2)
    check_loss(rl.linear_categorical_divergence, pair, **few_at_a_time(pair))
    pair.mask[:] = False
    check_loss(rl.linear_categorical_divergence, pair, **few_at_a_time(pair))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_goes_through_the_tokens_once(name):
    """Both sides' logits, and two products of the student's."""
    pair = make(name, (16,), widths=(6, 8), masked=False, dtypes=(torch.float32,) * 2)
    leaves = pair.leaves(STUDENT_ALONE)
    with FlopCounterMode(display=False) as counter:
        call(
            Summed(rl.linear_categorical_divergence), pair, leaves, backend="torch",
            **few_at_a_time(pair),
        ).sum().backward()  # fmt: skip
    assert counter.get_total_flops() == 2 * 16 * pair.vocabulary * (14 + 2 * 6)


def test_the_operator_of_the_loss_keeps_its_promises_and_compiles(backend):
    torch.compiler.reset()
    pair = make("jsd", (6,), dtypes=(torch.float32,) * 2, masked=False)
    for needs in (ALL, STUDENT_ALONE):
        leaves = pair.leaves(needs)
        mask = torch.tensor([True, False, True, True, True, True], device=DEVICE)
        options = (torch.tensor(0.2), 0.8, None, 0.7, 2.0, 1.0, 600, 0.3, list(needs), backend)
        op = torch.ops.rlcore.linear_divergence_loss.default
        torch.library.opcheck(op, (*leaves, mask, *options))

    def loss(*given):
        return call(Summed(rl.linear_categorical_divergence), pair, given).sum()

    leaves = pair.leaves(STUDENT_ALONE)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    want = loss(*leaves)
    torch.testing.assert_close(got, want)
    for one, two in zip(*(torch.autograd.grad(x, leaves[:3]) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts a CPU's allocations")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_logits_of_all_tokens_are_ever_held(name):
    pair = make(name, (512,), widths=(8, 8), vocabulary=20000, masked=False, head="unlike",
                dtypes=(torch.float32,) * 2)  # fmt: skip
    leaves = pair.leaves(STUDENT_ALONE)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = call(rl.linear_categorical_divergence, pair, leaves, chunk_bytes=8 << 20)
        torch.autograd.grad(found.sum(), leaves[:3])
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most < 0.6 * 512 * 20000 * 4, "as much as the logits of one side would take"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_compiles_whole(name):
    torch.compiler.reset()
    pair = make(name, (6,), dtypes=(torch.float32,) * 2, masked=False)
    leaves = pair.leaves(STUDENT_ALONE)

    def loss(*given):
        return call(rl.linear_categorical_divergence, pair, given).sum()

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    want = loss(*leaves)
    torch.testing.assert_close(got, want)
    for one, two in zip(*(torch.autograd.grad(x, leaves[:3]) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, two)


HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(7, 3)
GIVEN = {"hidden": HIDDEN, "weight": WEIGHT, "other_hidden": HIDDEN, "other_weight": WEIGHT}


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": HIDDEN[0]}, "^hidden must have shape \\(N, H\\)"),
        ({"other_hidden": HIDDEN[:2]}, "hidden must have the leading shape"),
        ({"other_weight": WEIGHT[:, :2]}, "^other_weight must have shape"),
        ({"weight": WEIGHT[:5]}, "weight must have the same vocabulary"),
        ({"bias": torch.ones(3)}, "^bias must have shape"),
        ({"other_softcap": -1.0}, "^other_softcap must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"jsd_beta": 1.0}, "jsd_beta"),
        ({"num_items": 0}, "num_items must be positive"),
        ({"num_items": torch.ones(2)}, "num_items must be one number"),
        ({"kind": "kl"}, "kind must be one of"),
        ({"mask": torch.ones(4)}, "mask must be bool"),
    ],
)
def test_wrong_arguments_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        rl.linear_categorical_divergence(**GIVEN | {"kind": kind} | options)
