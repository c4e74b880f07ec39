"""Checks of arguments, each with a message that names the argument, what came and the fix."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backend import checks_targets

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


Function = TypeVar("Function", bound=Callable)
NOTHING = type(None)
# what an annotation lets through at once
KINDS = {
    "Tensor": (Tensor,),
    "Tensor | None": (Tensor, NOTHING),
    "float": (float, int),
    "float | None": (float, int, NOTHING),
    "int": (int,),
    "int | None": (int, NOTHING),
    "str": (str,),
    "str | None": (str, NOTHING),
}


def checks_types(
    function: Function | None = None, *, options: type | None = None, defaults: Any = None
) -> Function:
    """A public function whose arguments are of the annotated types: a ValueError names the others.

    Of tensors, numbers and names; what else an argument may be is the function's own to check. With
    `options`, a TypedDict, and its `defaults`, the function's ** has each of the options, and its
    signature lists them.
    """
    if function is None:
        return functools.partial(checks_types, options=options, defaults=defaults)
    defaults = dict(defaults or {})
    annotations = function.__annotations__ | _annotations_of(options)
    kinds = {
        name: KINDS[text]
        for name, annotation in annotations.items()
        if (text := annotation.replace("torch.", "")) in KINDS
    }
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    known = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *defaults}

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if not torch.compiler.is_compiling():
            for name, value in chain(zip(names, args, strict=False), kwargs.items()):
                if name in kinds and not isinstance(value, kinds[name]):
                    _check_type(name, value, kinds[name])
        if options is not None:
            for name in kwargs:
                if name not in known:
                    _refuse_unknown(function.__name__, name, known)
            kwargs = {**defaults, **kwargs}
        return function(*args, **kwargs)

    if options is not None:
        checked.__signature__ = _listing(inspect.signature(function), annotations, defaults)
        named = [*checked.__signature__.parameters, "return"]
        checked.__annotations__ = {name: annotations[name] for name in named}
    return checked


def _annotations_of(options: type | None) -> dict[str, str]:
    """The annotations of a TypedDict, as they are written."""
    found = {} if options is None else options.__annotations__
    return {name: getattr(kind, "__forward_arg__", kind) for name, kind in found.items()}


def _refuse_unknown(function: str, name: str, known: set[str]) -> None:
    near = difflib.get_close_matches(name, known, 1)
    meant = f": did you mean {near[0]!r}?" if near else ""
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{meant}")


def _listing(
    signature: inspect.Signature, annotations: dict[str, str], defaults: dict[str, Any]
) -> inspect.Signature:
    """The signature with the options in the place of its **."""
    *own, _ = signature.parameters.values()
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotations[name]
        )
        for name, value in defaults.items()
    ]
    return signature.replace(parameters=[*own, *added])


def _check_type(name: str, value, kind: tuple[type, ...]) -> None:
    """Raises for a value of no type in `kind`, unless it is a number of another library's."""
    found = type(value).__name__
    if Tensor in kind:
        if isinstance(value, torch.nn.Module) and name.endswith("weight"):
            return  # a head's layer in its weight's place: `prepare_head` says what to do
        if value is None:
            raise ValueError(f"{name} must be a tensor, got None")
        make = "torch.from_numpy" if type(value).__module__ == "numpy" else "torch.tensor"
        raise ValueError(f"{name} must be a tensor, got {found}: pass {make}({name})")
    if str in kind:
        raise ValueError(f"{name} must be a string, got {found} {value!r}")
    if float not in kind:
        try:
            operator.index(value)
        except TypeError:
            message = f"{name} must be a whole number, got {found} {value!r}"
            raise ValueError(message) from None
    check_numbers(**{name: value})


def check_numbers(**values: float) -> None:
    """Every value is one number, a tensor's or another library's too."""
    for name, value in values.items():
        if isinstance(value, int | float):
            continue  # a compiler's numbers as well, which have no attributes to ask for
        many = isinstance(value, Tensor) and value.numel() != 1
        if many or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            found = f"shape {tuple(value.shape)}" if many else f"{type(value).__name__} {value!r}"
            raise ValueError(f"{name} must be a number, got {found}")


def check_denominators(**values: int | float | Tensor | None) -> None:
    """Every given one is positive and finite, or a scalar tensor, which a GPU keeps."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
            if value.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            value = value.item()
        if value is not None:
            check_numbers(**{name: value})
            check_positive(**{name: value})
            check_finite(**{name: value})


def check_positive(**values: float | None) -> None:
    """Every given value is a positive number; infinity passes, None is skipped."""
    for name, value in values.items():
        if value is not None and not (value > 0):
            raise ValueError(f"{name} must be positive, got {value}")


def check_finite(**values: float) -> None:
    for name, value in values.items():
        # a comparison, which a compiler can trace of a number that changes
        if not -math.inf < value < math.inf:
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
