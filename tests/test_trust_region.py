"""Conjugate gradient against direct solutions, and the line search's choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlcore as rl

NAN = float("nan")


def spd(n: int, seed: int = 0, condition: float = 10.0) -> Tensor:
    """A random symmetric positive definite matrix, float64, of that condition number."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q @ torch.diag(torch.logspace(0, 1, n, base=condition, dtype=torch.float64)) @ q.T


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), condition=st.floats(1.0, 20.0))
def test_a_system_of_n_unknowns_is_solved_in_n_iterations(n, seed, condition):
    a, b = spd(n, seed, condition), vector(n, seed + 1)
    result = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=n, tol=0.0)
    torch.testing.assert_close(result.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-7)
    assert result.iterations <= n


def test_the_residual_is_that_of_x_and_the_error_falls_with_the_iterations():
    a, b = spd(20, condition=100.0), vector(20)
    truth, errors = torch.linalg.solve(a, b), []
    for max_iter in (1, 5, 10, 25):
        result = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=max_iter)
        residual = (b - a @ result.x).norm()
        torch.testing.assert_close(result.residual, residual, rtol=1e-5, atol=1e-9)
        # what falls at every iteration is the error in the norm of A, not the residual
        errors.append(((truth - result.x) @ a @ (truth - result.x)).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0]


def test_iterations_before_the_end_are_as_in_the_textbook():
    """Two iterations by hand: x_1 = (r.r / p.Ap) p, then p_2 = r_1 + beta p."""
    a, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
    one = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=1)
    torch.testing.assert_close(one.x, torch.full((3,), 3 / 7))
    torch.testing.assert_close(one.residual, torch.tensor([4.0, 1.0, -5.0]).norm() / 7)
    two = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=2)
    r = torch.tensor([4.0, 1.0, -5.0]) / 7
    p = r + (r @ r) / 3
    torch.testing.assert_close(two.x, one.x + (r @ r) / (p @ a @ p) * p)


def test_damping_is_added_to_the_diagonal():
    a, b = spd(8), vector(8)
    damped = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=20, damping=0.5).x
    want = torch.linalg.solve(a + 0.5 * torch.eye(8, dtype=a.dtype), b)
    torch.testing.assert_close(damped, want)


@pytest.mark.parametrize("form", [list, tuple])
def test_a_sequence_of_tensors_is_solved_as_their_concatenation(form):
    a, b = spd(10), vector(10)
    shapes = [(2, 3), (4,)]

    def split(flat: Tensor) -> list[Tensor]:
        parts = flat.split([6, 4])
        return form(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    def matvec(v):
        assert type(v) is form
        return split(a @ torch.cat([part.reshape(-1) for part in v]))

    result = rl.conjugate_gradient(matvec, split(b), max_iter=4, damping=0.1)
    whole = rl.conjugate_gradient(lambda v: a @ v, b, max_iter=4, damping=0.1)
    assert type(result.x) is form
    for part, want in zip(result.x, split(whole.x), strict=True):
        torch.testing.assert_close(part, want)
    torch.testing.assert_close(result.residual, whole.residual)


def test_it_ends_early_at_the_tolerance_and_asks_for_no_more_products():
    a, b, products = spd(30, condition=3.0), vector(30), []

    def matvec(v):
        products.append(v)
        return a @ v

    result = rl.conjugate_gradient(matvec, b, max_iter=30, tol=1e-3)
    assert result.residual <= 1e-3 * b.norm()
    assert result.iterations == len(products) < 30


def test_a_right_side_of_zero_needs_no_product():
    result = rl.conjugate_gradient(lambda v: 1 / 0, torch.zeros(3))
    assert not result.x.any() and result.residual == 0 and result.iterations == 0


def test_it_stops_where_the_curvature_is_not_positive():
    a = torch.diag(torch.tensor([1.0, -5.0]))
    result = rl.conjugate_gradient(lambda v: a @ v, torch.ones(2))
    assert not result.x.any() and result.iterations == 0
    torch.testing.assert_close(result.residual, torch.tensor(2.0).sqrt())


def test_a_nan_from_the_product_is_passed_on():
    result = rl.conjugate_gradient(lambda v: v * NAN, torch.ones(2))
    assert result.x.isnan().all() and result.residual.isnan()


def test_the_right_side_is_left_as_it_was_and_no_graph_is_kept():
    b = vector(4).requires_grad_()
    before = b.detach().clone()
    result = rl.conjugate_gradient(lambda v: spd(4) @ v, b)
    assert torch.equal(b, before) and not result.x.requires_grad


def test_a_product_may_be_made_by_autograd():
    a, b, theta = spd(5), vector(5), vector(5, 2).requires_grad_()

    def hessian_product(v: Tensor) -> Tensor:
        loss = theta @ a @ theta / 2
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        return torch.autograd.grad(gradient @ v, theta, create_graph=True)[0]

    result = rl.conjugate_gradient(hessian_product, b)
    torch.testing.assert_close(result.x, torch.linalg.solve(a, b))
    assert not result.x.requires_grad


def test_the_natural_gradient_of_a_softmax_is_found_through_the_fisher_product(backend):
    """F is singular along constants: with b orthogonal to them, x is the minimum-norm solution."""
    torch.manual_seed(0)
    logits, b = torch.randn(1, 12, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
    b = b - b.mean()

    def matvec(v: Tensor) -> Tensor:
        return rl.fisher_vector_product(logits, v, backend=backend)

    result = rl.conjugate_gradient(matvec, b, max_iter=30)
    p = torch.softmax(logits, -1)[0]
    want = torch.linalg.pinv(torch.diag(p) - torch.outer(p, p)) @ b[0]
    torch.testing.assert_close(result.x[0], want, rtol=1e-6, atol=1e-6)


BAD_SOLVES = {
    "max_iter zero": ({"max_iter": 0}, "max_iter.*at least 1.*0"),
    "tol negative": ({"tol": -1e-3}, "tol.*negative"),
    "damping negative": ({"damping": -0.1}, "damping.*negative.*-0.1"),
    "damping nan": ({"damping": NAN}, "damping.*finite.*nan"),
    "b of integers": ({"b": torch.ones(3, dtype=torch.long)}, "b must.*int64"),
    "b of bfloat16": ({"b": [torch.ones(3).bfloat16()]}, "b must.*bfloat16"),
    "b empty": ({"b": []}, r"b must.*\[\]"),
    "matvec of another shape": ({"matvec": lambda v: v[:2]}, r"matvec.*\(3,\).*\(2,\)"),
    "matvec of two tensors": ({"matvec": lambda v: [v, v]}, "matvec.*shapes of b"),
    "matvec of nothing": ({"matvec": lambda v: None}, "matvec.*None"),
}


@pytest.mark.parametrize("changed, message", BAD_SOLVES.values(), ids=BAD_SOLVES)
def test_conjugate_gradient_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.conjugate_gradient(**{"matvec": lambda v: v, "b": torch.ones(3)} | changed)


# Line search


def quadratic(optimum: float, curvature: float):
    """improvement = optimum^2 - (step - optimum)^2, kl = curvature step^2 / 2."""
    return lambda step: (optimum**2 - (step - optimum) ** 2, curvature * step**2 / 2)


def test_the_full_step_is_taken_where_it_is_good():
    found = rl.line_search(quadratic(optimum=1.0, curvature=0.01), delta=0.01)
    assert (found.step, found.improvement, found.kl) == (1.0, 1.0, 0.005)
    assert len(found.trials) == 1


def test_the_step_is_shortened_until_the_kl_holds():
    found = rl.line_search(quadratic(optimum=1.0, curvature=0.03), delta=0.01)
    assert found.step == pytest.approx(0.8**1) and found.kl <= 0.01
    assert [trial.step for trial in found.trials] == [1.0, pytest.approx(0.8)]
    assert found.trials[0].kl > 0.01


def test_the_step_is_shortened_until_the_surrogate_improves():
    found = rl.line_search(quadratic(optimum=0.3, curvature=1e-6), delta=0.01)
    assert found.improvement > 0 and all(trial.improvement <= 0 for trial in found.trials[:-1])
    assert found.step == pytest.approx(0.8**3)


def test_a_kl_of_delta_is_accepted_and_an_improvement_of_zero_is_not():
    assert rl.line_search(lambda step: (1.0, 0.01), delta=0.01).step == 1.0
    assert rl.line_search(lambda step: (0.0, 0.0), delta=0.01).step is None


@pytest.mark.parametrize("values", [(NAN, 0.0), (1.0, NAN), (1.0, float("inf")), (-1.0, 0.0)])
def test_no_step_is_accepted_that_is_not_known_to_be_good(values):
    found = rl.line_search(lambda step: values, delta=0.01)
    assert (found.step, found.improvement, found.kl) == (None, 0.0, 0.0)
    assert len(found.trials) == 10


def test_the_candidates_are_powers_and_tensors_are_read():
    steps = []

    def evaluate(step):
        steps.append(step)
        return torch.tensor(-1.0), torch.tensor([0.0])

    rl.line_search(evaluate, delta=1.0, step=2.0, shrink=0.5, max_trials=4)
    assert steps == [2.0, 1.0, 0.5, 0.25]


BAD_SEARCHES = {
    "delta zero": ({"delta": 0.0}, "delta.*positive"),
    "step negative": ({"step": -1.0}, "step.*positive"),
    "step infinite": ({"step": float("inf")}, "step.*finite"),
    "shrink one": ({"shrink": 1.0}, r"shrink.*\(0, 1\).*1.0"),
    "shrink zero": ({"shrink": 0.0}, "shrink.*positive"),
    "no trials": ({"max_trials": 0}, "max_trials.*at least 1"),
}


@pytest.mark.parametrize("changed, message", BAD_SEARCHES.values(), ids=BAD_SEARCHES)
def test_line_search_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.line_search(**{"evaluate": lambda step: (1.0, 0.0), "delta": 0.01} | changed)
