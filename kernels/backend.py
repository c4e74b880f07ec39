"""Which backend serves a call, and whether a call may take the short way around the dispatcher."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no build for this platform: the torch backend serves every call

    class _Absent:
        """Lets the kernel modules import; `resolve_backend` refuses the triton backend."""

        constexpr = staticmethod(lambda value: value)

        @staticmethod
        def jit(function=None, **_):
            return function if function is not None else lambda wrapped: wrapped

    triton = tl = _Absent()

BACKENDS = ("triton", "torch")
HAS_TRITON = hasattr(triton, "compile")
# Triton reads TRITON_INTERPRET when a kernel is decorated, so later changes do not count.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


class _Chosen(threading.local):
    """What `use_backend` chose in this thread."""

    name: str | None = None


_chosen = _Chosen()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_environment_default = os.environ.get("RLCORE_BACKEND") or None
if _environment_default is not None:
    _check_name(_environment_default, "the environment variable RLCORE_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve this thread's calls inside the `with` block by `name` ("triton" or "torch").

    An explicit `backend=` argument of a call goes first. Raises ValueError on an unknown name.
    """
    before, _chosen.name = _chosen.name, _check_name(name, "name")
    try:
        yield
    finally:
        _chosen.name = before


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """The call's backend: its argument, else `use_backend`, else RLCORE_BACKEND, else by device."""
    if backend is not None:
        name = _check_name(backend, "backend")
    else:
        by_device = "triton" if tensor.is_cuda and HAS_TRITON else "torch"
        name = _chosen.name or _environment_default or by_device
    if name == "triton":
        check_triton_serves(tensor)
    return name


def check_triton_serves(tensor: Tensor) -> None:
    if not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed here")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got device '{tensor.device}': move "
            "them there, use backend='torch', or set TRITON_INTERPRET=1 before the import to "
            "debug on a CPU"
        )


def checks_targets(backend: str, tensor: Tensor) -> bool:
    """Whether targets are checked on the host: always on a CPU's torch path, else on request.

    On a GPU the check would wait for the device, so it takes RLCORE_CHECK=1.
    """
    return (backend == "torch" and tensor.device.type == "cpu") or (
        os.environ.get("RLCORE_CHECK") == "1"
    )


def takes_short_way(*tensors: Tensor | None) -> bool:
    """True in plain eager mode, where an autograd.Function costs less than a registered operator.

    False under torch.compile, fake tensors and dispatch modes (FLOP counters, selective
    checkpointing), which must see the registered operator. Forward-mode derivatives and
    torch.func transforms raise NotImplementedError: an operator would lose their tangents.
    """
    if torch.compiler.is_compiling():
        return False
    refuse_transforms(tensors)
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def refuse_transforms(tensors: tuple[Tensor | None, ...]) -> None:
    forward_mode = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "rlcore's operators have no forward-mode derivative and no torch.func rule: use "
            "backward() or torch.autograd.grad; for a curvature product, transform the model "
            "alone and use its logits"
        )
