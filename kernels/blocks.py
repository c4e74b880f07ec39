"""Blocks of rows: how the plain PyTorch operations go through (N, V) a cacheful at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# looked up once: torch 2.11's compiler cannot trace the question
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
    if torch.amp.is_autocast_available(device)
)
CACHED_BYTES = 3 << 20  # of a block in working precision, for each thread of a CPU
GPU_BLOCK_BYTES = 256 << 20  # of a block elsewhere: its operations outlast their launches
ALIGNED = 16  # columns of a slice: what keeps its rows at 16-byte boundaries


def autocast_enabled(device: str) -> bool:
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(function: Callable) -> Callable:
    """Runs a function of tensors (the first argument is one) in the dtypes that it names itself."""

    @functools.wraps(function)
    def wrapped(tensor: Tensor, *arguments, **options):
        device = tensor.device.type
        if not autocast_enabled(device):
            return function(tensor, *arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(tensor, *arguments, **options)

    return wrapped


def aligned(columns: int) -> int:
    """The numbers from one row to the next, so that each row starts at a 16-byte boundary."""
    return -(-columns // ALIGNED) * ALIGNED


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class RowStatistics(NamedTuple):
    """Of each row z = logits / T, of the targets' shape; None where a call does without.

    logp = z[target] - lse, entropy in nats, lse = log sum exp z = row_max / T + log_sum, row_max =
    the largest logit.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    row_max: Tensor | None
    log_sum: Tensor | None


class RowGradients(NamedTuple):
    """Derivatives of a loss by three of the RowStatistics; None = that one has no part in it."""

    dlogp: Tensor | None = None
    dentropy: Tensor | None = None
    dlse: Tensor | None = None

    def over(self, unit: Tensor | None) -> RowGradients:
        """Those of the loss divided by `unit`."""
        if unit is None:
            return self
        return RowGradients(*(None if g is None else g / unit for g in self))


def empty_statistics(target: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.empty(target.shape, dtype=dtype, device=target.device) for _ in range(count)]


def rows_per_block(logits: Tensor, tensors: int = 1) -> int:
    """Rows of a block of which `tensors` copies in working precision share a CPU's cache."""
    on_cpu = logits.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    row = logits.shape[-1] * statistics_dtype(logits).itemsize * tensors
    fitting = (CACHED_BYTES * threads if on_cpu else GPU_BLOCK_BYTES) // max(row, 1)
    return min(max(fitting, threads), max(logits.shape[:-1].numel(), 1))


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """tensor *= scale, a scalar, with the scale as it is.

    A GPU rounds a scale without dimensions to the tensor's dtype first, and 0.001 to bfloat16 is
    off by 0.02%; one of a dimension it takes in the wider dtype of the two.
    """
    return tensor.mul_(scale if scale.device.type == "cpu" else scale.reshape(1))


def select_rows(keep: Tensor | None, count: int, size: int) -> Iterator[slice | Tensor]:
    """Selectors of the rows to keep, of `size` rows each: slices of neighbours, else indices."""
    if keep is None or keep.all():
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))
        return
    for rows in keep.reshape(-1).nonzero().squeeze(-1).split(size):
        if rows.numel():
            first, last = rows[0].item(), rows[-1].item()
            yield slice(first, last + 1) if last - first + 1 == rows.numel() else rows


class Matrix:
    """The (N, V) rows behind (N, V) or (B, T, V), without a copy where the strides allow it."""

    def __init__(self, tensor: Tensor):
        self.index, self.is_view = None, True
        if tensor.dim() == 2:
            self.rows = tensor
            return
        (batch, length, vocabulary), (stride_b, stride_t, stride_v) = tensor.shape, tensor.stride()
        if batch * length == 0 or batch == 1 or stride_b == length * stride_t:
            self.rows = tensor.flatten(0, 1)
        elif stride_t > 0 and stride_b % stride_t == 0:
            # a slice such as logits[:, :-1]: the rows of a taller matrix, some left out
            step = stride_b // stride_t
            shape = ((batch - 1) * step + length, vocabulary)
            self.rows = tensor.as_strided(shape, (stride_t, stride_v))
            starts = torch.arange(batch, device=tensor.device)[:, None] * step
            self.index = (starts + torch.arange(length, device=tensor.device)).view(-1)
        else:
            self.rows, self.is_view = tensor.reshape(-1, vocabulary), False

    def read(self, rows: slice | Tensor) -> Tensor:
        return self.rows[rows if self.index is None else self.index[rows]]

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        self.rows[rows if self.index is None else self.index[rows]] = values.to(self.rows.dtype)

    def zero(self, where: Tensor) -> None:
        rows = where.nonzero().squeeze(-1)
        self.rows.index_fill_(0, rows if self.index is None else self.index[rows], 0)
