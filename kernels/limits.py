"""Arithmetic that has a value at the ends of a dtype, in PyTorch and as jitted twins.

    times(a, b)      a b,     0 where one is 0 and the other infinite
    times_exp(a, x)  a e^x,   likewise; finite wherever the product is, though e^x be not
    difference(x, y) x - y,   0 where both are the same infinity: equal probabilities, ratio 1
    held(x)          x,       the dtype's largest number where x lies beyond it

NaN stays NaN. `known` gives a value its derivative: autograd, going through exp, would multiply the
zero gradient of a token that was clipped, masked or not selected by an infinity, which is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import tl, triton

# stands for an infinite log-ratio: no product with it is NaN, and its exp is 0 or infinite
FARTHEST = 2.0**100


class _Known(torch.autograd.Function):
    """(value, x, dvalue/dx, y, dvalue/dy, ...) -> value."""

    @staticmethod
    def forward(ctx, value, *pairs):
        ctx.save_for_backward(*pairs[1::2])
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue):
        gradients = [None]
        for derivative in ctx.saved_tensors:
            gradients += [_held(_product(dvalue, derivative)), None]
        return tuple(gradients)


def known(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`value`, a function of each x in the pairs (x, dvalue/dx), all of one shape.

    No gradient flows where none arrives, be the derivative infinite; one that is beyond the
    dtype is held at its largest number.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x, _ in pairs)):
        return value
    return _Known.apply(value.detach(), *(t for x, slope in pairs for t in (x, slope.detach())))


def _product(a: Tensor | float, b: Tensor) -> Tensor:
    """a b, 0 where one is 0 and the other infinite."""
    product = a * b
    return torch.where(product.isnan() & (a == a) & (b == b), 0.0, product)


def _held(x: Tensor) -> Tensor:
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


def held(x: Tensor) -> Tensor:
    """x within the dtype's finite numbers, with the gradient of x."""
    return known(_held(x.detach()), (x, torch.ones_like(x)))


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b, 0 where one is 0 and the other infinite; a constant a."""
    return known(_product(a, b.detach()), (b, a))


def times_exp(a: Tensor, x: Tensor) -> Tensor:
    """a e^x, without gradient; 0 where one is 0 and the other infinite."""
    x = x.detach()
    half = torch.exp(0.5 * x)
    product = a * half * half
    return torch.where(product.isnan() & (a == a) & (x == x), 0.0, product)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x); where it is 1 its derivative is e^-x, which 1 - sigmoid rounds to 0."""
    value = torch.sigmoid(x.detach())
    return known(value, (x, value * torch.sigmoid(-x.detach())))


def difference(x: Tensor, y: Tensor) -> Tensor:
    """x - y, 0 where both are the same infinity."""
    return torch.where((x == y) & x.isinf(), 0.0, x - y)


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """logp - other, held within FARTHEST."""
    return difference(logp, other).clamp(-FARTHEST, FARTHEST)


@triton.jit
def held_(x):
    """The jitted twin of `held`."""
    LARGEST: tl.constexpr = (
        1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    )
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x)


@triton.jit
def times_(a, b):
    """The jitted twin of `times`."""
    product = a * b
    return tl.where((product != product) & (a == a) & (b == b), 0.0, product)


@triton.jit
def times_exp_(a, x):
    """The jitted twin of `times_exp`."""
    half = tl.exp(0.5 * x)
    product = a * half * half
    return tl.where((product != product) & (a == a) & (x == x), 0.0, product)


@triton.jit
def difference_(x, y):
    """The jitted twin of `difference`."""
    return tl.where(x == y, 0.0, x - y)


@triton.jit
def log_ratio_(logp, other):
    """The jitted twin of `log_ratio`."""
    x = difference_(logp, other)
    x = tl.where(x > 1.2676506002282294e30, 1.2676506002282294e30, x)  # FARTHEST
    return tl.where(x < -1.2676506002282294e30, -1.2676506002282294e30, x)


@triton.jit
def expm1_(x):
    # exp(x) - 1 cancels for small x, where a Taylor series does not
    further = x * 0 + 1 / 720
    if x.dtype == tl.float64:
        further += x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x * (1 / 3628800))))
        further += x * x * x * x * x * (1 / 39916800 + x * (1 / 479001600))
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * further)))))
    return tl.where(tl.abs(x) < 0.125, series, tl.exp(x) - 1)
