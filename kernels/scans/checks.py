"""Checks of the arguments that the scans over (B, T) share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATS


def check_fraction(**values: float) -> None:
    """Every value lies in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_sequences(name: str, like: Tensor, **tensors: Tensor | None) -> None:
    """`like` is the (B, T) argument called `name`; the others have its shape, or (B,), and device.

    mask and terminated are bool, all others floats; score and last_value hold one number a row.
    """
    if like.dim() != 2:
        raise ValueError(f"{name} must have shape (B, T), got {tuple(like.shape)}: reshape it")
    for other, tensor in {name: like, **tensors}.items():
        if tensor is not None:
            _check_sequence(other, tensor, name, like)


def _check_sequence(other: str, tensor: Tensor, name: str, like: Tensor) -> None:
    shape = like.shape[:1] if other in ("score", "last_value") else like.shape
    if tensor.shape != shape:
        raise ValueError(
            f"{other} must have shape {tuple(shape)} for {name} {tuple(like.shape)}, got "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{other} must be on the device of {name}, '{like.device}', got '{tensor.device}'"
        )
    if other in ("mask", "terminated"):
        if tensor.dtype != torch.bool:
            raise ValueError(f"{other} must be bool, got {tensor.dtype}: pass {other}.bool()")
    elif tensor.dtype not in FLOATS:
        raise ValueError(
            f"{other} must be float32, bfloat16, float16 or float64, got {tensor.dtype}: "
            f"pass {other}.float()"
        )


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    doubles = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32
