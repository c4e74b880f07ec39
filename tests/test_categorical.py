"""categorical_kl and fisher_vector_product: both backends, held against float64."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import LAYOUTS, flat
from helpers.checks import promised_bits
from helpers.distributions import check_categorical_kl, check_fisher_vector_product
from torch import Tensor

import rlcore as rl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")
SHAPES = [(5, 1), (5, 2), (5, 127), (5, 1000), (3, 50257)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def check(device, backend):
    """Judges the KL of two logits, and the Fisher product of the first with the second."""

    def run(p_logits: Tensor, q_logits: Tensor, *, temperature: float = 1.0, **options):
        where = {"device": device, "backend": backend, "temperature": temperature}
        check_categorical_kl(rl.categorical_kl, p_logits, q_logits, **where, **options)
        if not options:
            check_fisher_vector_product(rl.fisher_vector_product, p_logits, q_logits, **where)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, v", SHAPES)
def test_values_and_gradients_are_no_worse_than_eager(n, v, dtype, check):
    check(flat(n, v, dtype), flat(n, v, dtype), temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_is_served(layout, dtype, check):
    check(LAYOUTS[layout](dtype), LAYOUTS[layout](dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_rows_that_start_at_different_phases_are_served(offset, dtype, check):
    p_logits, padded = flat(3, 9001, dtype), flat(3, 9001 + 7, dtype)
    check(p_logits, padded[:, offset : offset + 9001])
    check(padded[:, offset : offset + 9001], p_logits)


@pytest.mark.parametrize("v", [127, 9001])
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_two_may_differ_in_dtype(q_dtype, v, check):
    check(flat(3, v, torch.float32), flat(3, v, q_dtype))
    check(flat(3, v, q_dtype), flat(3, v, torch.float32))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 10.0])
def test_temperature_scales_logits_before_everything(temperature, check):
    check(flat(4, 200, torch.bfloat16), flat(4, 200, torch.bfloat16), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_extreme_logits_lose_no_accuracy(offset, dtype, check):
    p_logits = flat(3, 300, torch.float32).add(offset).to(dtype)
    check(p_logits, flat(3, 300, dtype))
    check(flat(3, 300, dtype), p_logits, scale=1.0)


def test_logits_of_both_extremes_stay_finite(check):
    # the KL is of the logits' size, and so is its rounding
    check(torch.randn(3, 300).sign() * 1e4, torch.randn(3, 300).sign() * 1e4, scale=1.0)


@pytest.mark.parametrize(
    "banned", [slice(0, 3), slice(0, 8500), slice(100, 9001), slice(5, None, 2)]
)
def test_a_token_that_both_ban_contributes_nothing(banned, check, device, backend):
    p_logits, q_logits = flat(3, 9001, torch.float32), flat(3, 9001, torch.float32)
    p_logits[:, banned] = q_logits[:, banned] = -INF
    check_p, check_q = p_logits.to(device).requires_grad_(), q_logits.to(device).requires_grad_()
    check(p_logits, q_logits, scale=1.0)
    rl.categorical_kl(check_p, check_q, backend=backend).sum().backward()
    assert not check_p.grad[:, banned].any() and not check_q.grad[:, banned].any()


@pytest.mark.parametrize("banned", [slice(0, 3), slice(0, 8500), slice(5, None, 2)])
def test_a_token_that_p_alone_bans_contributes_nothing(banned, check):
    p_logits = flat(3, 9001, torch.float32)
    p_logits[:, banned] = -INF
    check(p_logits, flat(3, 9001, torch.float32), scale=1.0)


@pytest.mark.parametrize("column", [0, 5000, 9000])
def test_the_kl_is_infinite_where_q_bans_what_p_does_not(column, device, backend):
    p_logits, q_logits = flat(3, 9001, torch.float32), flat(3, 9001, torch.float32)
    q_logits[1, column] = -INF
    # a probability that rounds to 0 is none the less not 0
    p_logits[1, column] = -500.0
    leaves = [x.to(device).requires_grad_() for x in (p_logits, q_logits)]
    kl = rl.categorical_kl(*leaves, backend=backend)
    assert kl[1] == INF and kl[[0, 2]].isfinite().all()
    dp, dq = torch.autograd.grad(kl.sum(), leaves)
    assert not dp[1].any() and dp[[0, 2]].isfinite().all()
    p, q = (torch.softmax(x, -1) for x in leaves)
    torch.testing.assert_close(dq, (q - p).detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rubbish", [-INF, float("nan")])
def test_a_row_that_is_no_distribution_gives_nan_and_no_other(
    rubbish, which, dtype, device, backend
):
    logits = [flat(3, 300, dtype).to(device) for _ in range(2)]
    logits[which][1] = rubbish
    kl = rl.categorical_kl(*logits, backend=backend)
    assert kl.isnan().tolist() == [False, True, False]


def test_one_nan_makes_its_row_nan(device, backend):
    logits = [flat(2, 9001, torch.float32).to(device) for _ in range(2)]
    for which in (0, 1):
        poisoned = [x.clone() for x in logits]
        poisoned[which][1, 7000] = float("nan")
        kl = rl.categorical_kl(*poisoned, backend=backend)
        assert kl.isnan().tolist() == [False, True]
        product = rl.fisher_vector_product(*poisoned, backend=backend)
        assert product.isnan().all(-1).tolist() == [False, True]


@pytest.mark.parametrize("rubbish", [float("nan"), INF, -INF])
def test_masked_rows_may_hold_anything(rubbish, check):
    p_logits, q_logits = flat(6, 130, torch.bfloat16), flat(6, 130, torch.bfloat16)
    mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    p_logits[~mask] = rubbish
    check(p_logits, q_logits, mask=mask)
    check(q_logits, p_logits, mask=mask)


def test_a_batch_with_every_token_masked_gives_zero_and_a_zero_gradient(check):
    logits = torch.full((2, 3, 50), float("nan"))
    check(logits, logits, mask=torch.zeros(2, 3, dtype=torch.bool))


def test_gradients_of_stride_zero_are_taken(check):
    p_logits, q_logits = (flat(6, 127, torch.float32).view(2, 3, 127) for _ in range(2))
    check(p_logits, q_logits, upstream=torch.tensor(-0.5).expand(2, 3))


def test_each_gradient_alone_is_the_same(device, backend):
    p_logits, q_logits = (flat(4, 127, torch.float32).to(device) for _ in range(2))
    leaves = p_logits.clone().requires_grad_(), q_logits.clone().requires_grad_()
    both = torch.autograd.grad(rl.categorical_kl(*leaves, backend=backend).sum(), leaves)
    kl = rl.categorical_kl(leaves[0], q_logits, backend=backend)
    assert torch.equal(torch.autograd.grad(kl.sum(), leaves[0])[0], both[0])
    kl = rl.categorical_kl(p_logits, leaves[1], backend=backend)
    assert torch.equal(torch.autograd.grad(kl.sum(), leaves[1])[0], both[1])


def test_a_second_backward_over_a_retained_graph_gives_the_same(device, backend):
    leaves = [flat(4, 127, torch.float32).to(device).requires_grad_() for _ in range(2)]
    kl = rl.categorical_kl(*leaves, backend=backend).sum()
    first, second = (torch.autograd.grad(kl, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_inputs_are_left_as_they_were(device, backend):
    logits = [flat(4, 127, torch.bfloat16).to(device) for _ in range(2)]
    before = [x.clone() for x in logits]
    rl.categorical_kl(*(x.requires_grad_() for x in logits), backend=backend).sum().backward()
    rl.fisher_vector_product(*(x.detach() for x in logits), backend=backend)
    assert all(torch.equal(x.detach(), y) for x, y in zip(logits, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_other_rows(dtype, device, backend):
    promised_bits(backend)
    logits = [flat(40, 1003, dtype).to(device) for _ in range(2)]

    def run(rows: slice) -> tuple[Tensor, ...]:
        leaves = [x[rows].requires_grad_() for x in logits]
        kl = rl.categorical_kl(*leaves, backend=backend)
        product = rl.fisher_vector_product(*(x.detach() for x in leaves), backend=backend)
        return kl, product, *torch.autograd.grad(kl.sum(), leaves)

    whole = run(slice(0, 40))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 24)):
        for a, b in zip(run(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


# Identities


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_kl_of_a_distribution_to_itself_is_zero(dtype, device, backend):
    logits = flat(4, 9001, dtype).to(device)
    kl = rl.categorical_kl(logits, logits.clone(), temperature=0.7, backend=backend)
    # a GPU fuses one side's product into its sum, which float64 shows in the last bit
    exact = 0 if device == "cpu" or dtype != torch.float64 else 1e-15
    assert kl.abs().max() <= exact


def test_the_kl_of_near_distributions_is_not_negative(device, backend):
    p_logits = flat(64, 1003, torch.float32).to(device)
    q_logits = p_logits + 1e-4 * torch.randn_like(p_logits)
    kl = rl.categorical_kl(p_logits, q_logits, backend=backend)
    assert (kl >= 0).all() and (kl < 1e-6).all()


def test_the_kl_does_not_change_with_a_constant_on_the_logits(device, backend):
    p_logits, q_logits = (flat(4, 1003, torch.float64).to(device) for _ in range(2))
    kl = rl.categorical_kl(p_logits, q_logits, backend=backend)
    shifted = rl.categorical_kl(p_logits + 3.0, q_logits - 5.0, backend=backend)
    torch.testing.assert_close(shifted, kl)


def fisher_matrix(logits: Tensor, backend: str, temperature: float = 1.0) -> Tensor:
    """F of one row of logits (V,), column by column."""
    rows = logits.expand(len(logits), -1)
    eye = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return rl.fisher_vector_product(rows, eye, temperature=temperature, backend=backend).T


def test_the_fisher_matrix_is_symmetric_semi_definite_and_annihilates_constants(device, backend):
    matrix = fisher_matrix(flat(1, 23, torch.float64)[0].to(device), backend, 0.5)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    torch.testing.assert_close(matrix.sum(1), torch.zeros_like(matrix[0]))
    torch.testing.assert_close(matrix.sum(0), torch.zeros_like(matrix[0]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_fisher_matrix_is_the_hessian_of_the_kl_at_the_old_policy(temperature, device, backend):
    old = flat(1, 11, torch.float64).to(device)

    def kl(new: Tensor) -> Tensor:
        log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (old, new))
        return (log_p.exp() * (log_p - log_q)).sum()

    hessian = torch.autograd.functional.hessian(kl, old).view(11, 11)
    torch.testing.assert_close(fisher_matrix(old[0], backend, temperature), hessian)


def test_the_fisher_product_is_the_slope_of_the_kls_gradient(device, backend):
    """F v = d/de grad_q KL(p || softmax(p + e v)) at e = 0: the two operations agree."""
    logits, tangent = (flat(3, 40, torch.float64).to(device) for _ in range(2))

    def gradient(e: float) -> Tensor:
        q_logits = (logits + e * tangent).requires_grad_()
        kl = rl.categorical_kl(logits, q_logits, temperature=2.0, backend=backend)
        return torch.autograd.grad(kl.sum(), q_logits)[0]

    slope = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    product = rl.fisher_vector_product(logits, tangent, temperature=2.0, backend=backend)
    torch.testing.assert_close(product, slope, rtol=1e-6, atol=1e-8)


def test_the_fisher_product_is_linear_in_the_tangent(device, backend):
    logits, u, v = (flat(3, 200, torch.float64).to(device) for _ in range(3))

    def product(tangent: Tensor) -> Tensor:
        return rl.fisher_vector_product(logits, tangent, backend=backend)

    torch.testing.assert_close(product(2 * u - 3 * v), 2 * product(u) - 3 * product(v))


@pytest.mark.parametrize("rubbish", [0.0, INF, float("nan")])
def test_a_banned_token_has_no_curvature_whatever_its_tangent(rubbish, device, backend):
    logits, tangent = flat(3, 9001, torch.float32), flat(3, 9001, torch.float32)
    logits[:, 5:8700] = -INF
    tangent[:, 5:8700] = rubbish
    check_fisher_vector_product(
        rl.fisher_vector_product, logits, tangent, device=device, backend=backend
    )
    product = rl.fisher_vector_product(logits.to(device), tangent.to(device), backend=backend)
    assert not product[:, 5:8700].any()
