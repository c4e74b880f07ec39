"""Checks of arguments, each with a message that names the argument, what came and the fix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import checks_targets

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**values) -> None:
    """Every value is a tensor: not a list, an array, or nothing where something must be."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        if value is None:
            raise ValueError(f"{name} must be a tensor, got None")
        fix = "torch.from_numpy" if type(value).__module__ == "numpy" else "torch.tensor"
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}: pass {fix}({name})")


def check_numbers(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise ValueError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def check_num_items(num_items: int | float | Tensor | None) -> None:
    """A count in a denominator: positive and finite, or a scalar tensor, which a GPU keeps."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
        if num_items.device.type != "cpu" or torch.compiler.is_compiling():
            return
        num_items = num_items.item()
    if num_items is not None:
        check_positive(num_items=num_items)
        check_finite(num_items=num_items)


def check_positive(**values: float | None) -> None:
    """Every given value is a positive number; infinity passes, None is skipped."""
    values = {name: value for name, value in values.items() if value is not None}
    check_numbers(**values)
    for name, value in values.items():
        if not (value > 0):
            raise ValueError(f"{name} must be positive, got {value}")


def check_finite(**values: float) -> None:
    check_numbers(**values)
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_name(argument: str, name: str, known) -> None:
    """`name` is a key of the table `known`."""
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {name!r}")


def check_rows(
    rows: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None,
    temperature: float,
    name: str = "logits",
) -> None:
    """The arguments that every row kernel shares; `rows` are the argument called `name`."""
    width = "V" if name == "logits" else "H"
    if rows.dim() not in (2, 3):
        raise ValueError(
            f"{name} must have shape (N, {width}) or (B, T, {width}), got {tuple(rows.shape)}: "
            "reshape them"
        )
    if rows.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {rows.dtype}")
    if rows.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got {tuple(rows.shape)}")
    check_per_token("target", target, rows, name)
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise ValueError(f"target must hold integers, got {target.dtype}: cast it to torch.int64")
    if mask is not None:
        check_per_token("mask", mask, rows, name)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}: pass mask.bool()")
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)


def check_per_token(argument: str, value: Tensor, rows: Tensor, name: str = "logits") -> None:
    """One value a token, on the device of the rows."""
    if value.shape != rows.shape[:-1]:
        raise ValueError(
            f"{argument} must have the leading shape of {name}, {tuple(rows.shape[:-1])}, got "
            f"{tuple(value.shape)} for {name} {tuple(rows.shape)}"
        )
    if value.device != rows.device:
        raise ValueError(
            f"{argument} must be on the device of {name}, '{rows.device}', got '{value.device}'"
        )


def check_inplace(logits: Tensor, inplace_backward: bool) -> None:
    """The logits' storage may take the gradient: no leaf, no two elements at one address."""
    if not inplace_backward or not logits.requires_grad:
        return
    if logits.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite logits that are a leaf (a parameter or an input "
            "that requires grad): pass inplace_backward=False"
        )
    if any(
        size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    ):
        raise ValueError(
            "inplace_backward needs logits with storage of their own, got an expanded tensor: "
            "pass inplace_backward=False or logits.contiguous()"
        )


def check_targets_in_range(
    target: Tensor, mask: Tensor | None, vocabulary: int, backend: str
) -> None:
    """Raises where the host may look at the targets; elsewhere a bad row becomes NaN."""
    # a traced call is checked where its operator runs
    if torch.compiler.is_compiling() or not checks_targets(backend, target):
        return
    bad = (target < 0) | (target >= vocabulary)
    bad = bad if mask is None else bad & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"target must lie in [0, {vocabulary}) where the mask is true, got "
            f"{target[where].item()} at position {where}: mask the token out or mend the target"
        )
