"""The three matrix products of a head, accumulated in fp32 whatever the dtype of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import statistics_dtype

LEAST_ROWS = 4  # with fewer, a CPU's library takes another route, with other rounding
SLICE_BYTES = 8 << 20  # of an operand brought to fp32 at a time on a CPU
EVERY = slice(None)


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

    @property
    def steepest(self) -> float:
        """What a derivative by z / T grows by at most, on its way to that by hidden W^T + bias."""
        inside = self.logit_scale if self.softcap is None else max(self.logit_scale, 1.0)
        return inside / self.temperature

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


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that wait for the upstream one: a loss scaler's factor is in there, without
    which small gradients would leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


class Products:
    """hidden W^T + bias, ds W and ds^T hidden for one weight (V, H) and bias (V,) or None.

    A CPU multiplies bfloat16 and float16 as float32, a slice of the weight at a time: its own
    products of them round each result, and are many times slower where it has no units for them.
    Where it has, and the result is to be rounded anyway, they are taken as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.accumulator = statistics_dtype(weight)
        self.low_precision = weight.dtype != self.accumulator
        self.on_cpu = weight.device.type == "cpu"
        self.as_float32 = self.low_precision and self.on_cpu
        self.rounds_well = not self.as_float32 or (
            weight.dtype == torch.bfloat16 and has_bf16_units()
        )

    def logits(self, hidden: Tensor, out: Tensor, columns: slice = EVERY) -> Tensor:
        """out (n, w) = hidden (n, H) W^T + bias at `columns`, in the accumulator's dtype."""
        if self.on_cpu and 0 < len(hidden) < LEAST_ROWS:
            padding = (0, 0, 0, LEAST_ROWS - len(hidden))
            padded = torch.nn.functional.pad(hidden, padding)
            every = self.logits(padded, out.new_empty(LEAST_ROWS, out.shape[1]), columns)
            return out.copy_(every[: len(hidden)])
        weight = self.weight[columns]
        for part in self._parts(len(weight)):
            self._multiply(hidden, weight[part].T, out[:, part], add=False)
        return out if self.bias is None else out.add_(self.bias[columns])

    def dhidden(self, ds: Tensor) -> Tensor:
        """(n, H) = ds W, in the dtype that gradients wait in (one product a row, rounded once)."""
        waiting = gradient_dtype(self.weight.dtype)
        if self.rounds_well and waiting == self.weight.dtype:
            return torch.mm(ds, self.weight)
        total = ds.new_zeros(len(ds), self.weight.shape[1], dtype=self.accumulator)
        return self.add_dhidden(ds, total).to(waiting)

    def add_dhidden(self, ds: Tensor, total: Tensor, columns: slice = EVERY) -> Tensor:
        """total (n, H), in the accumulator's dtype, += ds (n, w) W at `columns`."""
        weight = self.weight[columns]
        for part in self._parts(len(weight), len(ds)):
            self._multiply(ds[:, part], weight[part], total, add=True)
        return total

    def add_dweight(self, ds: Tensor, hidden: Tensor, total: Tensor) -> Tensor:
        """total (w, H), in the accumulator's dtype, += ds (n, w)^T hidden (n, H)."""
        for part in self._parts(len(total), len(ds)):
            self._multiply(ds[:, part].T, hidden, total[part], add=True)
        return total

    def dweight(self, ds: Tensor, hidden: Tensor, out: Tensor, unit: Tensor | None = None) -> None:
        """out (w, H) = ds (n, w)^T hidden (n, H), times `unit`, rounded once to out's dtype."""
        if unit is None and self.rounds_well:
            torch.mm(ds.T, hidden, out=out)
            return
        for part in self._parts(len(out), len(ds)):
            total = torch.zeros_like(out[part], dtype=self.accumulator)
            total = self.add_dweight(ds[:, part], hidden, total)
            out[part] = total if unit is None else total * unit

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        """out (+)= left right, summed and kept in the accumulator's dtype."""
        given, more = (left, right), {"out": out}
        if self.as_float32:
            given = (left.to(self.accumulator), right.to(self.accumulator))
        elif self.low_precision:
            more["out_dtype"] = self.accumulator
        with _exact_bf16_products(self.weight):
            torch.addmm(out, *given, **more) if add else torch.mm(*given, **more)

    def _parts(self, vocabulary: int, tokens: int = 0) -> Iterator[slice]:
        """Slices of the vocabulary: whole, or what a CPU brings to float32 at a time.

        That is a slice of the weight and, of so many tokens, of the logits' gradient.
        """
        step = max(vocabulary, 1)
        if self.as_float32:
            numbers = max(self.weight.shape[1], tokens) * self.accumulator.itemsize
            step = max(SLICE_BYTES // numbers, 1)
        for start in range(0, vocabulary, step):
            yield slice(start, min(start + step, vocabulary))


@contextmanager
def _exact_bf16_products(weight: Tensor) -> Iterator[None]:
    """Lets fp32 products of values that came from bf16 use the CPU's bf16 units.

    Rounding such inputs to bf16 changes nothing, and the sums stay fp32: the result is exact.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
