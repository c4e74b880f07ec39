"""Holds a contestant to the formula in float64, block by block, before it is timed.

The error of a tensor is its RMS error over the truth's RMS, of a loss its error over the larger of
the truth and 1 (advantages of both signs cancel in it). A gradient of logits is judged in the
targets' columns and in all others apart: among 150 thousand columns, a softmax term left out or a
wrong sign would drown in the targets' share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcore.bench.cases import Case
from rlcore.bench.contestants.rows import Contestant
from rlcore.bench.operations import Inputs, Operation

# Largest error that passes. bfloat16 rounds a log-probability of -12 by 0.03, which is the peers'
# way and no mistake; a mistake (a term left out, a gradient times 1.5) is 0.3 and more.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
BLOCK_ELEMENTS = 1 << 25
KEPT_BYTES = 1 << 30


def call(
    contestant: Contestant, operation: Operation, inputs: Inputs, direction: str
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves), the latter empty in the direction "forward"."""
    if direction == "forward" or not operation.leaves:
        with torch.no_grad():
            return list(contestant.run(inputs)), []
    outputs = list(contestant.run(inputs))
    return outputs, gradients(operation, inputs, outputs)


def gradients(
    operation: Operation, inputs: Inputs, outputs: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    leaves = [inputs[name] for name in operation.leaves]
    upstream = arriving(operation, inputs, outputs)
    return list(torch.autograd.grad(outputs, leaves, upstream, retain_graph=retain_graph))


def arriving(operation: Operation, inputs: Inputs, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each output: 1 for a loss, else the case's own."""
    named = zip(operation.outputs, outputs, strict=True)
    return [
        torch.ones_like(output) if name in operation.summed else inputs[f"d{name}"].to(output.dtype)
        for name, output in named
    ]


def with_leaves(operation: Operation, inputs: Inputs) -> Inputs:
    """The inputs with leaves that ask for their gradient."""
    fresh = {name: inputs[name].detach().requires_grad_() for name in operation.leaves}
    return inputs | fresh


@dataclass
class Squares:
    """Sums over blocks of the squares of an error and of the truth."""

    error: float = 0.0
    truth: float = 0.0

    def add(self, actual: Tensor, truth: Tensor) -> None:
        self.error += (actual.double() - truth).square().sum().item()
        self.truth += truth.square().sum().item()

    @property
    def ratio(self) -> float:
        if self.truth == 0:
            return math.sqrt(self.error)
        return math.sqrt(self.error / self.truth)


class Truth:
    """A case's outputs and gradients in float64, kept where they are small, else made again."""

    def __init__(self, case: Case, operation: Operation, inputs: Inputs):
        self.case, self.operation, self.inputs = case, operation, inputs
        columns = max(case.V, case.T if not case.V else 1)
        self._small = self._rows * columns * 8 <= KEPT_BYTES
        self._kept: list | None = None

    @property
    def _rows(self) -> int:
        return self.case.N or self.case.B

    def _blocks(self) -> Iterator[slice]:
        couple = self.operation.couples(self.case) or self._rows
        columns = self.case.V or self.case.T
        size = max(BLOCK_ELEMENTS // columns // couple, 1) * couple
        for start in range(0, self._rows, size):
            yield slice(start, start + size)

    def _compute(self) -> Iterator[tuple[slice, Inputs, list[Tensor], list[Tensor]]]:
        operation, shared = self.operation, self.operation.shared
        for rows in self._blocks():
            block = {
                name: _double(x if name in shared else x[rows]) if isinstance(x, Tensor) else x
                for name, x in self.inputs.items()
            }
            block = with_leaves(operation, block)
            exact = Contestant(operation.formula)
            outputs, grads = call(exact, operation, block, self.case.direction)
            yield rows, block, [x.detach() for x in outputs], grads

    def __iter__(self) -> Iterator[tuple[slice, Inputs, list[Tensor], list[Tensor]]]:
        if not self._small:
            yield from self._compute()
            return
        if self._kept is None:
            self._kept = list(self._compute())
        yield from self._kept

    def error(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
        """The largest error among outputs and gradients; NaN where a value is not finite."""
        operation, found = self.operation, {}
        sums: dict[str, Tensor] = {}
        for rows, block, true_outputs, true_grads in self:
            named = zip(operation.outputs, outputs, true_outputs, strict=True)
            named = [*named, *zip(operation.leaves, grads, true_grads, strict=bool(grads))]
            for name, actual, truth in named:
                if name in (*operation.summed, *operation.shared):
                    sums[name] = sums.get(name, 0) + truth
                    continue
                for part, chosen in _parts(name, block, truth):
                    squares = found.setdefault(f"{name} {part}", Squares())
                    squares.add(actual[rows][chosen], truth[chosen])
        whole = dict(zip((*operation.outputs, *operation.leaves), (*outputs, *grads), strict=False))
        for name, truth in sums.items():
            found[name] = Squares(
                truth=max(1 - truth.square().item(), 0) if truth.dim() == 0 else 0
            )
            found[name].add(whole[name], truth)
        return max((squares.ratio for squares in found.values()), key=_nan_last)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _parts(name: str, block: Inputs, truth: Tensor) -> Iterator[tuple[str, Tensor | slice]]:
    """The target's column and the others, of a gradient of logits; else everything."""
    if name != "logits" or "target" not in block:
        yield "", slice(None)
        return
    columns = torch.arange(truth.shape[-1], device=truth.device)
    is_target = columns == block["target"][:, None]
    yield "at the targets", is_target
    yield "elsewhere", ~is_target
