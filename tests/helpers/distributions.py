"""Oracles and assertions of the kernels on whole distributions: categorical KL, Fisher product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.checks import arithmetic, assert_masked_rows_get_zero, leaf, on
from helpers.judge import assert_gradient_no_worse_than_eager, assert_no_worse_than_eager


def categorical_kl(p_logits: Tensor, q_logits: Tensor, *, temperature=1.0, mask=None) -> Tensor:
    """KL(p || q) of whole rows, as its definition reads, in the logits' dtype."""
    if mask is not None:
        p_logits, q_logits = (
            torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)) for x in (p_logits, q_logits)
        )
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (p_logits, q_logits))
    banned = log_p == -torch.inf
    log_p, log_q = (torch.where(banned, torch.zeros_like(x), x) for x in (log_p, log_q))
    p = torch.where(banned, torch.zeros_like(log_p), log_p.exp())
    return (p * (log_p - log_q)).sum(-1)


def categorical_divergence(
    logits: Tensor, other_logits: Tensor, *, kind, jsd_beta=0.5, temperature=1.0, mask=None
) -> Tensor:
    """As the definitions read, in the logits' dtype, by autograd; 0 log 0 = 0."""
    if mask is not None:
        logits, other_logits = (
            torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)) for x in (logits, other_logits)
        )
    p, q = (torch.softmax(x / temperature, -1) for x in (logits, other_logits))
    mixture = jsd_beta * q + (1 - jsd_beta) * p

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    if kind == "jsd":
        return jsd_beta * kl(q, mixture) + (1 - jsd_beta) * kl(p, mixture)
    return kl(q, p) if kind == "forward_kl" else kl(p, q)


def fisher_vector_product(logits: Tensor, tangent: Tensor, *, temperature=1.0) -> Tensor:
    """The matrix (diag(p) - p p^T) / T^2 of every row, times the row of the tangent."""
    p = torch.softmax(logits / temperature, -1)
    tangent = torch.where(logits == -torch.inf, torch.zeros_like(tangent), tangent)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True)) / temperature**2


def check_categorical_kl(
    op: Callable,
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    device: str,
    backend: str,
    upstream: Tensor | None = None,
    scale: float = 1.0,
    **options,
) -> None:
    """Judges the KL and both gradients; `scale` is the size of the logits where they cancel."""
    p_logits, q_logits = on(device, p_logits), on(device, q_logits)
    options = {name: on(device, value) for name, value in options.items()}
    upstream = torch.randn(p_logits.shape[:-1]) if upstream is None else upstream
    upstream = on(device, upstream)
    dtype, eps = max((arithmetic(x) for x in (p_logits, q_logits)), key=lambda x: x[0].itemsize)

    leaves = leaf(p_logits), leaf(q_logits)
    actual = op(*leaves, backend=backend, **options)
    assert actual.dtype == dtype, "the KL is float32 (float64 of float64)"
    eager_leaves = leaf(p_logits), leaf(q_logits)
    eager = categorical_kl(*(x.to(dtype) for x in eager_leaves), **options)
    oracle_leaves = leaf(p_logits.double()), leaf(q_logits.double())
    oracle = categorical_kl(*oracle_leaves, **options)
    assert_no_worse_than_eager(actual, eager, oracle, name="KL", eps=eps, scale=scale)
    assert not (actual < 0).any(), "a KL below 0"

    gradients = torch.autograd.grad(actual, leaves, upstream.to(dtype))
    eager_gradients = torch.autograd.grad(eager, eager_leaves, upstream.to(dtype))
    oracle_gradients = torch.autograd.grad(oracle, oracle_leaves, upstream.double())
    for name, z, *three in zip(
        ("dp", "dq"), leaves, gradients, eager_gradients, oracle_gradients, strict=True
    ):
        assert three[0].dtype == z.dtype and three[0].shape == z.shape
        assert_masked_rows_get_zero(three[0], options.get("mask"))
        # the likeliest column apart, which else would hide all others
        likeliest = z.detach().nan_to_num(-torch.inf).argmax(-1)
        assert_gradient_no_worse_than_eager(*three, likeliest, name=name, eps=eps)


def check_fisher_vector_product(
    op: Callable, logits: Tensor, tangent: Tensor, *, device: str, backend: str, **options
) -> None:
    """Judges the product, the likeliest column apart."""
    logits, tangent = on(device, logits), on(device, tangent)
    dtype, eps = max((arithmetic(x) for x in (logits, tangent)), key=lambda x: x[0].itemsize)
    actual = op(logits, tangent, backend=backend, **options)
    assert actual.dtype == tangent.dtype
    eager = fisher_vector_product(logits.to(dtype), tangent.to(dtype), **options).to(tangent.dtype)
    oracle = fisher_vector_product(logits.double(), tangent.double(), **options)
    assert_gradient_no_worse_than_eager(
        actual, eager, oracle, logits.argmax(-1), name="product", eps=eps
    )
