"""rl.categorical_divergence: held against float64, its identities, and its formulas changed."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.cases import LAYOUTS, flat
from helpers.checks import assert_masked_rows_get_zero, leaf
from helpers.distributions import categorical_divergence
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from torch import Tensor

import rlcore as rl
import rlcore.kernels.rows.categorical_divergence  # registers the operator tested here

INF = float("inf")
KINDS = ["forward_kl", "reverse_kl", "jsd"]
MUTANTS = read_mutants(TESTS / "mutants" / "divergences" / "categorical_divergence.txt")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(op, logits, other, *, backend="torch", tolerance=2e-6, **options) -> None:
    """Value and both gradients against the definition in float64."""
    leaves = leaf(logits.to(DEVICE)), leaf(other.to(DEVICE))
    wide = leaf(logits.double()), leaf(other.double())
    upstream = torch.randn(logits.shape[:-1], dtype=torch.float64)
    mask = options.get("mask")
    given = options | ({} if mask is None else {"mask": mask.to(DEVICE)})
    actual, expected = (
        op(*leaves, backend=backend, **given),
        categorical_divergence(*wide, **options),
    )
    close = {"rtol": 1e-4, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(actual.cpu(), expected, **close)
    assert not (actual < 0).any()
    found = torch.autograd.grad(actual, leaves, upstream.to(actual))
    exact = torch.autograd.grad(expected, wide, upstream)
    for z, one, two in zip(leaves, found, exact, strict=True):
        assert one.dtype == z.dtype and one.shape == z.shape
        assert_masked_rows_get_zero(one, given.get("mask"))
        if z.dtype.itemsize == 2:
            close = {"rtol": 2e-2, "atol": 1e-3, "check_dtype": False}
        torch.testing.assert_close(one.cpu(), two, **close)


def every_check(op) -> None:
    a, b = flat(6, 37, torch.float32), flat(6, 37, torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    for kind in KINDS:
        check(op, a, b, kind=kind, temperature=0.7, mask=mask)
    check(op, a, b, kind="jsd", jsd_beta=0.2, temperature=1.7)
    one, other = a.clone(), b.clone()
    one[:, :4], other[:, 2:6] = -INF, -INF
    check_banned(op, one, other)


def check_banned(op, a: Tensor, b: Tensor) -> None:
    """Columns that one side bans, or both: finite, and the definition's."""
    leaves = leaf(a), leaf(b)
    jsd = op(*leaves, kind="jsd", jsd_beta=0.3)
    expected = categorical_divergence(a.double(), b.double(), kind="jsd", jsd_beta=0.3)
    torch.testing.assert_close(jsd, expected.float(), rtol=1e-5, atol=1e-6)
    for z, dz in zip(leaves, torch.autograd.grad(jsd.sum(), leaves), strict=True):
        assert dz.isfinite().all() and not dz[z == -INF].any() and dz.any()


def test_values_and_gradients_are_the_definitions():
    every_check(rl.categorical_divergence)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_formula_is_refused(mutant, tmp_path):
    wrong = function(load_kernels(tmp_path, mutant), "categorical_divergence")
    try:
        with pytest.raises(AssertionError):
            every_check(wrong)
    finally:
        unload()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [1, 2, 127, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_width_and_dtype_is_served(kind, v, dtype, backend):
    check(
        rl.categorical_divergence, flat(3, v, dtype), flat(3, v, dtype), kind=kind, backend=backend
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_is_served(layout, backend):
    a, b = LAYOUTS[layout](torch.float32), LAYOUTS[layout](torch.float32)
    check(rl.categorical_divergence, a, b, kind="jsd", backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_differences_in_float64(kind):
    a, b = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    beta = {"jsd_beta": 0.3} if kind == "jsd" else {}
    assert torch.autograd.gradcheck(
        lambda *z: rl.categorical_divergence(*z, kind=kind, temperature=0.8, **beta), (a, b)
    )


def test_jsd_is_symmetric_at_a_half_bounded_by_log_2_and_0_between_equals():
    a, b = 20 * torch.randn(64, 50), 20 * torch.randn(64, 50)
    there, back = (rl.categorical_divergence(*pair, kind="jsd") for pair in ((a, b), (b, a)))
    torch.testing.assert_close(there, back)
    assert (there >= 0).all() and (there <= 0.6931473).all() and there.max() > 0.6
    turned = rl.categorical_divergence(b, a, kind="jsd", jsd_beta=0.8)
    torch.testing.assert_close(rl.categorical_divergence(a, b, kind="jsd", jsd_beta=0.2), turned)
    for kind in KINDS:
        assert not rl.categorical_divergence(a, a, kind=kind).any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_at_the_ends_a_jsd_over_its_weight_is_a_kl(kind):
    a, b = (torch.randn(5, 20, dtype=torch.float64) for _ in range(2))
    beta = 1e-7 if kind == "forward_kl" else 1 - 1e-7
    jsd = rl.categorical_divergence(a, b, kind="jsd", jsd_beta=beta) / 1e-7
    torch.testing.assert_close(jsd, rl.categorical_divergence(a, b, kind=kind), rtol=1e-5, atol=0)


def test_a_small_divergence_keeps_its_digits():
    a = torch.randn(4, 1000, dtype=torch.float64)
    b = a + 1e-5 * torch.randn_like(a)
    p, d = a.softmax(-1), a.log_softmax(-1) - b.log_softmax(-1)
    second_order = (p * d**2).sum(-1) / 8
    found = rl.categorical_divergence(a, b, kind="jsd")
    torch.testing.assert_close(found, second_order, rtol=1e-4, atol=0)


def test_a_row_of_nan_or_without_a_finite_logit_is_nan_and_masked_it_is_0():
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    a[0, 3], b[1] = torch.nan, -INF
    found = rl.categorical_divergence(a, b, kind="jsd")
    assert found.isnan().tolist() == [True, True, False]
    mask = torch.tensor([False, False, True])
    leaves = leaf(a), leaf(b)
    found = rl.categorical_divergence(*leaves, kind="jsd", mask=mask)
    assert found[:2].tolist() == [0, 0]
    for dz in torch.autograd.grad(found.sum(), leaves):
        assert not dz[:2].any() and dz[2].isfinite().all()


def test_a_frozen_teacher_gets_no_gradient():
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    rl.categorical_divergence(student, teacher, kind="jsd").sum().backward()
    assert student.grad.any() and teacher.grad is None


def test_the_operator_keeps_its_promises_and_compiles():
    a, b = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    op = torch.ops.rlcore.categorical_jsd
    mask = torch.tensor([True, False, True])
    torch.library.opcheck(op, (a, b, None, 0.7, 0.3))
    torch.library.opcheck(op, (a, b.detach(), mask, 1.0, 0.5))
    compiled = torch.compile(rl.categorical_divergence, fullgraph=True, backend="aot_eager")
    for kind in KINDS:
        torch.testing.assert_close(
            compiled(a, b, kind=kind), rl.categorical_divergence(a, b, kind=kind)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind must be one of 'forward_kl'"),
        ({"kind": "jsd", "jsd_beta": 0.0}, "jsd_beta must be between 0 and 1"),
        ({"kind": "jsd", "jsd_beta": float("nan")}, "jsd_beta must be between 0 and 1"),
        ({"kind": "reverse_kl", "jsd_beta": 0.3}, "no use for jsd_beta"),
        ({"kind": "jsd", "temperature": 0.0}, "temperature must be positive"),
        ({"kind": "jsd", "mask": torch.ones(3)}, "mask must be bool"),
        ({"kind": "jsd", "other_logits": torch.zeros(3, 5)}, "other_logits must have the shape"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    given = {"logits": torch.zeros(3, 4), "other_logits": torch.zeros(3, 4)} | options
    with pytest.raises(ValueError, match=message):
        rl.categorical_divergence(**given)
