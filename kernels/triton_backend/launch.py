"""What the host decides of a row kernel: threads and tiles, strides, and memory for a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import INTERPRETED, tl, triton
from ..blocks import aligned

ALIGNMENT = 16  # bytes of the widest load
WARP = 64 if torch.version.hip else 32
# Threads of a program, measured on an H200: a sweep that reads wants many small programs, one that
# writes few large ones, and of two sweeps the second finds more of its row in the L2 cache.
READ_THREADS, WRITE_THREADS = 256, 1024
REGISTERS = 32  # of a thread: 2048 threads then share a multiprocessor of NVIDIA's


@dataclass(frozen=True)
class RowLaunch:
    """Launch values of a sweep over whole vectors, as keyword arguments of the launch."""

    THREADS: int
    in_float64: bool

    def compiler_options(self) -> dict[str, object]:
        # FP fusion is asked for by name: its default changes between Triton versions
        options = {"num_warps": self.THREADS // WARP, "enable_fp_fusion": True}
        if torch.version.hip is None and not self.in_float64:
            options["maxnreg"] = REGISTERS
        return options

    def options(self) -> dict[str, object]:
        return {"THREADS": self.THREADS, **self.compiler_options()}


def row_launch(vocabulary: int, itemsize: int, threads: int) -> RowLaunch:
    """Of `threads` a program, or as many as a shorter row has vectors."""
    needed = triton.next_power_of_2(max(vocabulary * itemsize // ALIGNMENT, 1))
    return RowLaunch(max(min(threads, needed), WARP), itemsize == 8)


class Float64(float):
    """A number that the interpreter does not round to float32, as a GPU would round an argument."""


def number(value: float, dtype: torch.dtype) -> object:
    """A kernel's argument, exact to the dtype of its results.

    An argument is float32. Beside float64 the value is compiled in: a kernel for each value.
    """
    if dtype != torch.float64:
        return value
    return Float64(value) if INTERPRETED else tl.constexpr(value)


def numbers(values: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """A tuple of arguments; beside float64 each is two of float32, as `joined` takes them."""
    if dtype != torch.float64:
        return values
    highs = torch.tensor(values, dtype=torch.float32).double().tolist()
    pairs = zip(values, highs, strict=True)
    return tuple(x for v, high in pairs for x in (high, v - high if math.isfinite(v) else 0.0))


def row_strides(rows: Tensor) -> tuple[int, int, int]:
    """(rows per batch, batch stride, row stride) of (N, V) or (B, T, V), in elements."""
    if rows.dim() == 2:
        return max(rows.shape[0], 1), 0, rows.stride(0)
    return max(rows.shape[1], 1), rows.stride(0), rows.stride(1)


def with_unit_stride(logits: Tensor) -> Tensor:
    """The logits themselves where their last stride is 1, else a contiguous copy."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def phase(rows: Tensor) -> tuple[int, ...]:
    """What must agree between two tensors for their rows to share tile boundaries."""
    _, *strides = row_strides(rows)
    itemsize = rows.element_size()
    offsets = (rows.data_ptr() % ALIGNMENT, *(s * itemsize % ALIGNMENT for s in strides))
    # rows that all start at a boundary share it whatever their dtype
    return (*offsets, itemsize) if any(offsets) else offsets


def same_phase(*tensors: Tensor | None) -> bool:
    """Whether rows of all tensors start at the same distance from a 16-byte boundary."""
    return len({(t.element_size(), phase(t)) for t in tensors if t is not None}) == 1


def row_width(vocabulary: int) -> int:
    """Columns in memory of a row, so that every row starts at a 16-byte boundary."""
    return aligned(vocabulary)


def gradient_memory(logits: Tensor, inplace: bool) -> Tensor:
    """Where a gradient goes: the logits' own storage where permitted and possible, else new memory.

    Autograd then refuses any later use of logits that it had saved.
    """
    if not inplace or logits.stride(-1) != 1:
        return _empty_gradient(with_unit_stride(logits))
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialised memory for a gradient whose rows start at the same phase as the logits'.

    Contiguous wherever contiguous rows have that phase, as they have for contiguous logits.
    """
    lanes = ALIGNMENT // logits.element_size()
    *leading, vocabulary = logits.shape
    rows_per_batch, stride_b, stride_t = row_strides(logits)
    row = vocabulary + (stride_t - vocabulary) % lanes
    batch = rows_per_batch * row
    batch += (stride_b - batch) % lanes if logits.dim() == 3 else 0
    offset = logits.data_ptr() % ALIGNMENT // logits.element_size()
    size = offset + (batch if logits.dim() == 2 else leading[0] * batch)
    strides = (row, 1) if logits.dim() == 2 else (batch, row, 1)
    return torch.empty(size, dtype=logits.dtype, device=logits.device).as_strided(
        logits.shape, strides, offset
    )
