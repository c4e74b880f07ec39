"""What the machine can do at most: bytes copied and operations multiplied a second, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlcore.bench import timing
from rlcore.bench.cases import Case
from rlcore.bench.operations import OPERATIONS

# far beyond any cache
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}
SIDE = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Floors:
    """Bytes read plus written a second by a copy; operations a second by dtype of a product."""

    copy_bandwidth: float
    matmul_rate: dict[str, float]

    def seconds(self, case: Case) -> float:
        """The least time for the case's bytes and products: the larger of the two.

        A product may be done in the case's dtype or in float32, whichever is faster here.
        """
        operation = OPERATIONS[case.op]
        rates = [self.matmul_rate[d] for d in (case.dtype, "float32") if d in self.matmul_rate]
        by_products = operation.products(case) / max(rates)
        return max(operation.bytes(case) / self.copy_bandwidth, by_products)


def measure(device: torch.device, dtypes: tuple[str, ...]) -> Floors:
    """Both floors on the device, as the contestants are timed there."""
    source = torch.randint(256, (COPIED[device.type],), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    seconds = _time(device, lambda: sink.copy_(source))
    rates = {dtype: _matmul_rate(device, dtype) for dtype in sorted({*dtypes, "float32"})}
    return Floors(2 * source.numel() / seconds, rates)


def _matmul_rate(device: torch.device, dtype: str) -> float:
    side = SIDE[device.type]
    # random data: products of zeros run faster on some GPUs
    a, b = torch.randn(2, side, side, device=device).to(getattr(torch, dtype))
    return 2 * side**3 / _time(device, lambda: a @ b)


def _time(device: torch.device, call: timing.Call) -> float:
    if device.type == "cuda":
        return timing.on_gpu(call).median
    return timing.interleaved({"": call}, rounds=7)[""].low
