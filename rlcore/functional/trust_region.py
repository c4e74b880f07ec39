"""The two solvers of a trust-region step: conjugate gradient, and a backtracking line search.

TRPO (Schulman et al. 2015, arXiv:1502.05477) maximises the surrogate L(theta) within
KL(old || theta) <= delta. Its step is sqrt(2 delta / s^T A s) s with A s = g (appendix C): g the
gradient of L, A the Hessian of the KL. `conjugate_gradient` finds s from products A v alone, and
`line_search` shortens the step until the surrogate does improve and the KL does hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rlcore.kernels.checks import check_finite, check_positive, checks_types

Vector = TypeVar("Vector", Tensor, list[Tensor], tuple[Tensor, ...])


class CGResult(NamedTuple):
    """What `conjugate_gradient` returns; the last two are 0-dimensional tensors beside b."""

    x: Tensor | list[Tensor] | tuple[Tensor, ...]
    residual: Tensor
    iterations: Tensor


@checks_types
def conjugate_gradient(
    matvec: Callable[[Vector], Vector],
    b: Vector,
    *,
    max_iter: int = 10,
    tol: float = 1e-10,
    damping: float = 0.0,
) -> CGResult:
    """Solves (A + damping I) x = b for a symmetric positive definite A known by its products.

    Conjugate gradient from x = 0 (Hestenes and Stiefel 1952; arXiv:1502.05477, appendix C). With
    exact arithmetic it ends within as many iterations as A has distinct eigenvalues.

    Args:
        matvec: v -> A v, for v like b. Called once an iteration; its result is detached.
        b: a tensor, or a list or tuple of them (such as gradients by parameter, which need not
            be flattened), float32 or float64.
        max_iter: at most so many iterations; at least 1.
        tol: ends once |b - A x| <= tol |b| in the Euclidean norm. 0 = where nothing is left.
        damping: added to the diagonal of A; not negative.

    Returns:
        CGResult(x, residual, iterations): x like b, residual = |b - (A + damping I) x| as the
        recursion keeps it, iterations = the number that changed x. It stops where A shows no
        positive curvature, with the x so far; a NaN from matvec is passed on to x.
        On a GPU nothing waits for the device: all max_iter products are asked for, and x no
        longer changes after the end.

    Raises:
        ValueError: a wrong dtype, number or range; a matvec whose result is not like b.
    """
    check_finite(tol=tol, damping=damping)
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if tol < 0 or damping < 0:
        raise ValueError(f"tol and damping must not be negative, got {tol} and {damping}")
    r = _parts("b", b)
    x, p = [torch.zeros_like(part) for part in r], r
    rr = _dot(r, r)
    bound = tol**2 * rr
    iterations = torch.zeros((), dtype=torch.int64, device=rr.device)
    # NaN keeps it running, so that it shows in x
    running = ~(rr <= bound)
    for _ in range(max_iter):
        # on a CPU looking costs nothing, and may save a product
        if rr.device.type == "cpu" and not running:
            break
        product = _like(r, matvec(_as(b, p)))
        product = [ap + damping * part for ap, part in zip(product, p, strict=True)]
        curvature = _dot(p, product)
        running = running & ~(curvature <= 0)
        alpha = torch.where(running, rr / curvature, 0.0)
        x = [part + alpha * step for part, step in zip(x, p, strict=True)]
        r = [part - alpha * step for part, step in zip(r, product, strict=True)]
        del product  # the next one needs its room
        rr_before, rr = rr, torch.where(running, _dot(r, r), rr)
        iterations += running
        running = running & ~(rr <= bound)
        beta = torch.where(running, rr / rr_before, 0.0)
        p = [part + beta * step for part, step in zip(r, p, strict=True)]
    return CGResult(_as(b, x), rr.sqrt(), iterations)


def _parts(name: str, vector: Vector) -> list[Tensor]:
    """The tensors of a vector, as a list."""
    parts = [vector] if isinstance(vector, Tensor) else vector
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(f"{name} must be a tensor or a list or tuple of them, got {vector!r}")
    for part in parts:
        if not isinstance(part, Tensor) or part.dtype not in (torch.float32, torch.float64):
            found = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name} must hold float32 or float64 tensors, got {found}: cast them")
    return [part.detach() for part in parts]


def _like(expected: Sequence[Tensor], product: Vector) -> list[Tensor]:
    """The product's tensors, if their shapes are those of b."""
    parts = _parts("the result of matvec", product)
    shapes, wanted = ([tuple(part.shape) for part in v] for v in (parts, expected))
    if shapes != wanted:
        raise ValueError(f"the result of matvec must have the shapes of b, {wanted}, got {shapes}")
    return parts


def _as(b: Vector, parts: list[Tensor]) -> Vector:
    """The tensors in b's form."""
    return parts[0] if isinstance(b, Tensor) else type(b)(parts)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


class Trial(NamedTuple):
    """A step size that `line_search` tried, and what came of it."""

    step: float
    improvement: float
    kl: float


class LineSearch(NamedTuple):
    """What `line_search` returns: the accepted step size (None = none), and every trial."""

    step: float | None
    improvement: float
    kl: float
    trials: tuple[Trial, ...]


@checks_types
def line_search(
    evaluate: Callable[[float], tuple[float | Tensor, float | Tensor]],
    *,
    delta: float,
    step: float = 1.0,
    shrink: float = 0.8,
    max_trials: int = 10,
) -> LineSearch:
    """The first of step, step * shrink, step * shrink^2, ... that improves within the trust region.

    A step is accepted if the surrogate improves strictly, L(theta) - L(theta_old) > 0, and
    KL(old || theta) <= delta (arXiv:1502.05477, appendix C): the quadratic model that chose the
    full step is exact in neither. A NaN is never accepted.

    The search itself touches no parameters. `evaluate` moves them, so the last step that it was
    called with is in place afterwards: the accepted one, or else one that the caller must undo.

    Args:
        evaluate: step size -> (improvement, kl), numbers or one-element tensors; each is read on
            the host.
        delta: the largest KL allowed; positive.
        step: the first step size, as a fraction of the proposed step; positive.
        shrink: the factor from one trial to the next, in (0, 1).
        max_trials: the most step sizes to try; at least 1.

    Returns:
        LineSearch(step, improvement, kl, trials). Where no step was accepted, step is None and
        improvement and kl are 0: those of staying put.

    Raises:
        ValueError: a number out of its range.
    """
    check_positive(delta=delta, step=step, shrink=shrink)
    check_finite(step=step)
    if shrink >= 1:
        raise ValueError(f"shrink must lie in (0, 1), got {shrink}")
    if max_trials < 1:
        raise ValueError(f"max_trials must be at least 1, got {max_trials}")
    trials: list[Trial] = []
    for k in range(max_trials):
        size = step * shrink**k
        improvement, kl = map(float, evaluate(size))
        trials.append(Trial(size, improvement, kl))
        if improvement > 0 and kl <= delta:
            return LineSearch(size, improvement, kl, tuple(trials))
    return LineSearch(None, 0.0, 0.0, tuple(trials))
