"""rl.topk_divergence: held against float64, its identities, and its formulas changed."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.cases import LAYOUTS, flat
from helpers.checks import assert_masked_rows_get_zero, leaf
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from torch import Tensor

import rlcore as rl
import rlcore.kernels.rows.topk_divergence  # registers the operator tested here

INF = float("inf")
MUTANTS = read_mutants(TESTS / "mutants" / "divergences" / "topk_divergence.txt")


@pytest.fixture(autouse=True)
def seed(device) -> None:
    torch.manual_seed(0)


def teacher(shape, v: int, k: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, the ids of its k likeliest, their log-probabilities)"""
    logits = 2 * torch.randn(*shape, v, dtype=torch.float64)
    logp, ids = logits.log_softmax(-1).topk(k, -1)
    return logits, ids, logp.to(dtype)


def definition(logits, ids, logp, *, tail=True, temperature=1.0, mask=None) -> Tensor:
    """One row after another; by autograd."""
    rows = []
    counted = torch.ones(ids.shape[:-1], dtype=torch.bool) if mask is None else mask
    for z, own, q, count in zip(
        logits.flatten(0, -2), ids.flatten(0, -2), logp.flatten(0, -2), counted.flatten(),
        strict=True,
    ):  # fmt: skip
        if not count:
            rows.append(z.new_zeros(()))
            continue
        own, q = own[q > -INF], q[q > -INF].double().exp()
        p = torch.softmax(z / temperature, -1)
        if not tail:
            p, q = p[own] / p[own].sum(), q / q.sum()
            rows.append((torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum())
            continue
        others = torch.ones_like(z, dtype=torch.bool)
        others[own] = False
        kl = (torch.special.xlogy(q, q) - torch.special.xlogy(q, p[own])).sum()
        rest = (1 - q.sum()).clamp(min=0)
        if others.any():
            kl = kl + torch.special.xlogy(rest, rest) - torch.special.xlogy(rest, p[others].sum())
        rows.append(kl)
    return torch.stack(rows).view(logits.shape[:-1]) if rows else logits.sum(-1)


def check(op, logits, ids, logp, tolerance=2e-6, **options) -> None:
    mine, wide = leaf(logits.to(DEVICE)), leaf(logits.double())
    given = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in options.items()}
    found = op(mine, ids.to(DEVICE), logp.to(DEVICE), **given)
    expected = definition(wide, ids, logp, **options)
    close = {"rtol": 1e-4, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(found.cpu(), expected, **close)
    assert not (found < 0).any()
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    (dz,) = torch.autograd.grad(found, mine, upstream.to(found))
    (exact,) = torch.autograd.grad(expected, wide, upstream)
    assert dz.dtype == mine.dtype and dz.shape == mine.shape
    assert_masked_rows_get_zero(dz, given.get("mask"))
    if dz.dtype.itemsize == 2:
        close = {"rtol": 2e-2, "atol": 1e-3, "check_dtype": False}
    torch.testing.assert_close(dz.cpu(), exact, **close)


def every_check(op) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    for tail in (True, False):
        _, ids, logp = teacher((6,), 37, 5)
        check(op, flat(6, 37, torch.float32), ids, logp, tail=tail, temperature=0.7, mask=mask)
        # fewer than k ids in some rows
        logp[0, 3:], logp[2, 1:] = -INF, -INF
        ids[0, 3:] = ids[0, 0]
        check(op, flat(6, 37, torch.float32), ids, logp, tail=tail)
    _, ids, logp = teacher((6,), 7, 7)
    check(op, flat(6, 7, torch.float32), ids, logp)


def test_values_and_gradients_are_the_definitions():
    every_check(rl.topk_divergence)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_formula_is_refused(mutant, tmp_path):
    wrong = function(load_kernels(tmp_path, mutant), "topk_divergence")
    try:
        with pytest.raises(AssertionError):
            every_check(wrong)
    finally:
        unload()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("v", "k"), [(2, 1), (127, 8), (9001, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_width_and_dtype_is_served(tail, v, k, dtype):
    _, ids, logp = teacher((3,), v, k)
    check(rl.topk_divergence, flat(3, v, dtype), ids, logp, tail=tail)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_is_served(layout):
    logits = LAYOUTS[layout](torch.float32)
    _, ids, logp = teacher(logits.shape[:-1], logits.shape[-1], 3)
    check(rl.topk_divergence, logits, ids, logp)


@pytest.mark.parametrize("tail", [True, False])
def test_derivatives_by_differences_in_float64(tail):
    _, ids, logp = teacher((3,), 9, 4, torch.float64)
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: rl.topk_divergence(z, ids, logp, tail=tail, temperature=0.8), (logits,)
    )


def test_it_grows_with_k_to_the_exact_kl_and_keeps_its_digits_where_the_tail_is_thin():
    student = 2 * torch.randn(8, 50, dtype=torch.float64)
    other, *_ = teacher((8,), 50, 1)
    exact = rl.categorical_divergence(student, other, kind="forward_kl")
    before = torch.zeros(8, dtype=torch.float64)
    for k in (1, 2, 5, 20, 49, 50):
        logp, ids = other.log_softmax(-1).topk(k, -1)
        found = rl.topk_divergence(student, ids, logp)
        assert (found >= before - 1e-9).all() and (found <= exact + 1e-9).all()
        before = found
    torch.testing.assert_close(before, exact)
    # both models sure of the ids: 1 - sum p would leave nothing of the tail in float32
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    found = rl.topk_divergence(logits, torch.tensor([[0]]), torch.tensor([[-1e-3]]))
    expected = definition(logits.double(), torch.tensor([[0]]), torch.tensor([[-1e-3]]).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_where_the_student_bans_what_the_teacher_says_it_is_infinite_and_no_gradient_nan():
    logits = torch.randn(2, 6)
    _, ids, logp = teacher((2,), 6, 2)
    logits[0, ids[0, 0]] = -INF
    logits = leaf(logits)
    found = rl.topk_divergence(logits, ids, logp)
    assert found[0] == INF and found[1].isfinite()
    (dz,) = torch.autograd.grad(found.sum(), logits)
    assert dz.isfinite().all()


def test_what_stands_in_masked_rows_does_not_matter():
    logits, mask = torch.randn(3, 6), torch.tensor([True, False, True])
    _, ids, logp = teacher((3,), 6, 2)
    logits[1], ids[1], logp[1] = torch.nan, -7, torch.nan
    leaves = leaf(logits)
    found = rl.topk_divergence(leaves, ids, logp, mask=mask)
    (dz,) = torch.autograd.grad(found.sum(), leaves)
    assert found[1] == 0 and found.isfinite().all() and not dz[1].any() and dz.isfinite().all()


def test_the_operator_keeps_its_promises_and_compiles():
    logits = torch.randn(3, 9, requires_grad=True)
    _, ids, logp = teacher((3,), 9, 4)
    mask = torch.tensor([True, False, True])
    for given in ((mask, 0.7, True), (None, 1.0, False)):
        torch.library.opcheck(torch.ops.rlcore.topk_divergence, (logits, ids, logp, *given))
    compiled = torch.compile(rl.topk_divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ids, logp), rl.topk_divergence(logits, ids, logp))


IDS, LOGP = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.full((3, 2), -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_ids": IDS[:2]}, "teacher_ids must have shape"),
        ({"teacher_ids": IDS.int()}, "teacher_ids must be int64"),
        ({"teacher_ids": IDS + 1}, "teacher_ids must be in"),
        ({"teacher_logp": LOGP[:, :1]}, "teacher_logp must have the shape of teacher_ids"),
        ({"teacher_logp": LOGP.long()}, "teacher_logp must be"),
        ({"teacher_logp": torch.full((3, 2), -INF)}, "teacher_logp must not be -inf in its first"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    given = {"logits": torch.zeros(3, 4), "teacher_ids": IDS, "teacher_logp": LOGP} | options
    with pytest.raises(ValueError, match=message):
        rl.topk_divergence(**given)
