"""Kernels whose flaws are known: the compile gate must see them, or it sees nothing."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl


@triton.jit
def shift_kernel(X, Y, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for start in range(0, V - BLOCK + 1, BLOCK):
        x = tl.load(X + row * stride + start + lane)
        tl.store(Y + row * stride + start + lane, x + 1)


@triton.jit
def hoard_kernel(X, Y, V, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        largest = tl.maximum(largest, tl.load(X + start + lane).to(tl.float32))
    tl.store(Y + lane, largest)


def compile_specs() -> Iterator[dict]:
    """An aligned copy, the same unaligned, and one that keeps more than the registers hold."""
    shift = {"X": "*bf16", "Y": "*bf16", "V": "i32", "stride": "i64", "BLOCK": "constexpr"}
    aligned = {name: [["tt.divisibility", 16]] for name in ("X", "Y", "stride")}
    for name, attrs in (("aligned", aligned), ("unaligned", {})):
        yield {
            "name": f"canary {name}",
            "fn": shift_kernel,
            "signature": shift,
            "constexprs": {"BLOCK": 1024},
            "attrs": attrs,
            "options": {"num_warps": 4},
        }
    yield {
        "name": "canary spilling",
        "fn": hoard_kernel,
        "signature": {"X": "*bf16", "Y": "*fp32", "V": "i32", "BLOCK": "constexpr"},
        "constexprs": {"BLOCK": 8192},
        "attrs": {name: [["tt.divisibility", 16]] for name in ("X", "Y")},
        "options": {"num_warps": 1},
    }
