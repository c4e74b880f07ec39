"""The three matrix products of a head, accumulated in fp32 whatever the dtype of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import statistics_dtype

LEAST_ROWS = 4  # with fewer, a CPU's library takes another route, with other rounding
SLICE_BYTES = 8 << 20  # of the head's weight brought to fp32 at a time on a CPU


@dataclass(frozen=True)
class Head:
    """z = softcap tanh(s / softcap) or s, with s = logit_scale (hidden W^T + bias); then z / T."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def row_temperature(self) -> float:
        """What the row kernel divides by: without a softcap the scale costs nothing there."""
        return self.temperature / self.logit_scale if self.softcap is None else self.temperature

    def cap_(self, s: Tensor) -> Tensor:
        """From hidden W^T + bias to what the row kernel reads, in place."""
        if self.softcap is None:
            return s
        return s.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)

    def uncap_(self, dz: Tensor, z: Tensor) -> Tensor:
        """From the row kernel's gradient to that of hidden W^T + bias, in place; uses up z."""
        if self.softcap is None:
            return dz
        slope = z.div_(self.softcap).square_().neg_().add_(1).mul_(self.logit_scale)
        return dz.mul_(slope)


class Products:
    """hidden W^T + bias, ds W and ds^T hidden for one weight (V, H) and bias (V,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.accumulator = statistics_dtype(weight)
        self.low_precision = weight.dtype != self.accumulator
        self.on_cpu = weight.device.type == "cpu"

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out (n, V) = hidden (n, H) W^T + bias, in the accumulator's dtype, never rounded."""
        if self.on_cpu and 0 < len(hidden) < LEAST_ROWS:
            padding = (0, 0, 0, LEAST_ROWS - len(hidden))
            padded = torch.nn.functional.pad(hidden, padding)
            every = self.logits(padded, out.new_empty(LEAST_ROWS, out.shape[1]))
            return out.copy_(every[: len(hidden)])
        if not self.low_precision:
            torch.mm(hidden, self.weight.T, out=out)
        elif self.on_cpu:
            self._upcast_logits(hidden, out)
        else:
            torch.mm(hidden, self.weight.T, out_dtype=self.accumulator, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def _upcast_logits(self, hidden: Tensor, out: Tensor) -> None:
        hidden = hidden.to(self.accumulator)
        with _exact_bf16_products(self.weight.dtype):
            for columns in self._slices():
                weight = self.weight[columns].to(self.accumulator)
                torch.mm(hidden, weight.T, out=out[:, columns])

    def dhidden(self, ds: Tensor) -> Tensor:
        """(n, H) = ds W, in the weight's dtype (each row is one product, rounded once)."""
        return torch.mm(ds, self.weight)

    def add_dweight(self, ds: Tensor, hidden: Tensor, dweight: Tensor) -> None:
        """dweight (V, H), in the accumulator's dtype, += ds^T hidden."""
        if not self.low_precision:
            torch.addmm(dweight, ds.T, hidden, out=dweight)
        elif self.on_cpu:
            for rows in self._slices():
                dweight[rows] += torch.mm(ds[:, rows].T, hidden)
        else:
            torch.addmm(dweight, ds.T, hidden, out_dtype=self.accumulator, out=dweight)

    def dweight(self, ds: Tensor, hidden: Tensor) -> Tensor:
        """(V, H) = ds^T hidden, rounded once."""
        return torch.mm(ds.T, hidden)

    def _slices(self) -> Iterator[slice]:
        vocabulary, hidden_size = self.weight.shape
        step = max(SLICE_BYTES // (hidden_size * self.accumulator.itemsize), 1)
        for start in range(0, vocabulary, step):
            yield slice(start, min(start + step, vocabulary))


@contextmanager
def _exact_bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets fp32 products of values that came from bf16 use the CPU's bf16 units.

    Rounding such inputs to bf16 changes nothing, and the sums stay fp32: the result is exact.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
