"""Kernel launches without a GPU: what would be compiled, and how often.

Inside `recorded`, a launch of a Triton kernel runs nothing. What Triton would look up in its cache
(types, alignments, constants, options) is kept, from which the kernel can be compiled for any
target, and whose number of different values is the number of compilations. Works on CPU tensors,
whose results are then garbage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.bench.cases import Case, head, rows, scan
from rlcore.bench.checking import call, with_leaves
from rlcore.bench.contestants.rows import Contestant, contestants
from rlcore.bench.operations import OPERATIONS
from rlcore.bench.static.compile_gate import TARGETS
from rlcore.kernels import backend

LENGTHS = range(100, 150)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, what it is specialised on, and what a compiler wants to know."""

    kernel: str
    specialization: str
    fn: Any
    signature: dict
    constexprs: dict
    attrs: dict
    options: dict

    def compiled(self, target: str) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=self.options)


@contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """A list that fills with the launches made inside the block, none of which is run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    compiler = make_backend(GPUTarget(*TARGETS[target]))
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        kwargs["debug"] = False
        kwargs.setdefault("instrumentation_mode", "")
        binder = jit.create_function_from_signature(self.signature, self.params, compiler)
        bound, specialization, options = binder(*args, **kwargs)
        key = str((specialization, options))
        parsed = self._pack_args(compiler, kwargs, bound, specialization, options)
        options, signature, constexprs, attrs = parsed
        name = f"{self.__module__.split('.')[0]} {self.__name__}"
        launches.append(Launch(name, key, self, signature, constexprs, attrs, dict(vars(options))))

    original, serves = jit.JITFunction.run, backend.check_triton_serves
    jit.JITFunction.run, backend.check_triton_serves = run, lambda tensor: None
    try:
        yield launches
    finally:
        jit.JITFunction.run, backend.check_triton_serves = original, serves


def launches_of(contestant: Contestant, case: Case, target: str = "sm_90") -> list[Launch]:
    """The launches of one call of the contestant on CPU tensors."""
    operation = OPERATIONS[case.op]
    inputs = operation.make(case, torch.device("cpu"))
    inputs = with_leaves(operation, (contestant.prepare or dict)(inputs))
    with recorded(target) as launches:
        call(contestant, operation, inputs, case.direction)
    return launches


def compilations(name: str, op: str, lengths: Sequence[int] = LENGTHS) -> dict[str, int]:
    """{kernel: how often it would be compiled} over batches of those completion lengths."""
    contestant = contestants(op)[name]
    seen: dict[str, set[str]] = {}
    for length in lengths:
        for launch in launches_of(contestant, length_case(op, length)):
            seen.setdefault(launch.kernel, set()).add(launch.specialization)
    return {kernel: len(keys) for kernel, keys in seen.items()}


def length_case(op: str, length: int) -> Case:
    """A batch of 8 completions of that length, with a vocabulary of odd size."""
    if op == "gae":
        return scan(op, 8, length)
    if op.startswith("linear"):
        return head(op, "bfloat16", 8 * length, 16, 257)
    return rows(op, "bfloat16", 8 * length, 257)


def triton_contestants(op: str) -> dict[str, Contestant]:
    """Those that launch Triton kernels of their own."""
    return {name: c for name, c in contestants(op).items() if c.needs_gpu}
