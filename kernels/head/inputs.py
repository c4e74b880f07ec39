"""From the arguments of a fused-head call to matching matrices: checks, dtypes, sharded weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import autocast_enabled
from ..checks import FLOATS, check_finite, check_positive
from .products import Head


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Head]:
    """hidden as (N, H) and weight in one dtype, and bias, all differentiable in the originals.

    A bias of a wider dtype than theirs stays as wide as their sums are.
    """
    if isinstance(weight, torch.nn.Module):
        raise ValueError(_module_message(weight))
    if hasattr(hidden, "full_tensor"):
        raise ValueError(
            "hidden is a DTensor, but each rank computes its own tokens' loss: pass "
            "hidden.to_local() or hidden.full_tensor()"
        )
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape (V, H) with H = {hidden.shape[-1]} as in hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) as weight {tuple(weight.shape)} has rows, "
            f"got {tuple(bias.shape)}"
        )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of hidden, '{hidden.device}', got '{tensor.device}'"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")
    check_positive(softcap=softcap, logit_scale=logit_scale)
    check_finite(logit_scale=logit_scale, softcap=1.0 if softcap is None else softcap)
    dtype = _product_dtype(hidden, weight)
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(_bias_dtype(bias, dtype))
    softcap = None if softcap is None else float(softcap)
    return hidden, weight.to(dtype), bias, Head(float(temperature), softcap, float(logit_scale))


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype inside autocast, as for any linear layer; else what holds both."""
    device = hidden.device.type
    if autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _bias_dtype(bias: Tensor, products: torch.dtype) -> torch.dtype:
    """The products' dtype, or that of their sums where the bias would be rounded to be added."""
    rounded = torch.promote_types(bias.dtype, products) != products
    widest = torch.float64 if products == torch.float64 else torch.float32
    return widest if rounded and not autocast_enabled(bias.device.type) else products


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (FSDP2), differentiably.

    Each rank has a loss of its own, so the gradient is their mean over the mesh, as FSDP's is;
    ranks that hold the same tokens (tensor parallel) have the same gradient, which is its mean.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    if mesh.size() > 1 and whole.requires_grad:
        whole = _DividedGradient.apply(whole, mesh.size())
    return whole


class _DividedGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx, whole: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def _module_message(module: torch.nn.Module) -> str:
    if any("lora_" in name for name, _ in module.named_parameters()):
        return (
            "weight is a layer with a LoRA adapter, whose own weight leaves the adapter out: merge "
            "the adapter, or leave lm_head out of its target modules, and pass the weight tensor"
        )
    return f"weight must be the head's weight tensor (V, H), got the module {type(module).__name__}"
