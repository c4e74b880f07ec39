"""The Fisher matrix of softmax rows times a tangent: the curvature of the KL in the logits.

F v = (diag(p) - p p^T) v / T^2 = p (v - sum_j p_j v_j) / T^2,   p = softmax(logits / T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend, takes_short_way
from ..blocks import statistics_dtype
from ..checks import check_finite, check_positive, checks_types
from ..implementation import implementation
from .categorical_kl import check_pair


def _product(logits: Tensor, tangent: Tensor, temperature: float, backend: str) -> Tensor:
    product = torch.empty(tangent.shape, dtype=tangent.dtype, device=tangent.device)
    dtype = statistics_dtype(logits, tangent)
    implementation(backend).fisher_vector_product(logits, tangent, product, temperature, dtype)
    return product


@torch.library.custom_op("rlcore::fisher_vector_product", mutates_args=())
def fisher_vector_product_op(
    logits: Tensor, tangent: Tensor, temperature: float, backend: str
) -> Tensor:
    return _product(logits, tangent, temperature, backend)


@fisher_vector_product_op.register_fake
def _(logits, tangent, temperature, backend):
    return torch.empty(tangent.shape, dtype=tangent.dtype, device=tangent.device)


@checks_types
def fisher_vector_product(
    logits: Tensor, tangent: Tensor, *, temperature: float = 1.0, backend: str | None = None
) -> Tensor:
    """(diag(p) - p p^T) tangent / temperature^2, row by row, p = softmax(logits / temperature).

    That matrix is the Fisher information of a softmax in its logits, and the Hessian of
    KL(p_old || p) at p_old: symmetric, positive semi-definite, its rows sum to 0. With J the
    Jacobian of the logits, J^T F J is the curvature of TRPO (arXiv:1502.05477, appendix C.1).

    Args:
        logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, any strides; may hold
            -inf (banned tokens: the product is 0 there and the tangent is not used).
        tangent: of the logits' shape; may differ from them in dtype.
        temperature: positive; divides the logits before everything else.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        Like tangent, in whose rows it is linear. For masked tokens pass a tangent of 0 (and
        finite logits). A row without a finite logit gives NaN. Sums run in float32 (float64
        where either input is) in a fixed order. Not differentiable: a backward through it raises
        RuntimeError.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device or temperature.
    """
    check_pair("tangent", tangent, "logits", logits)
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    backend = resolve_backend(backend, logits)
    traced = torch.is_grad_enabled() and (logits.requires_grad or tangent.requires_grad)
    if takes_short_way(logits, tangent) and not traced:
        return _product(logits, tangent, temperature, backend)
    # the operator has no derivative: autograd says so when asked for one
    return fisher_vector_product_op(logits, tangent, temperature, backend)
