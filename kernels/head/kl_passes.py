"""The passes of two heads' divergence: side by side, a chunk of tokens at a time.

A pass makes both heads' logits of a chunk, the row kernel turns them into the KL, or with a
`jsd_beta` into the Jensen-Shannon divergence, or into their gradients, and each side that needs one
gathers its products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import select_rows, statistics_dtype, without_autocast
from ..implementation import implementation
from ..rows.categorical_divergence import rows_backward, rows_forward
from .chunks import Chunk, Gathered, Gradients3, Run, at_rows, store_rows, unit_of
from .plan import LinearPlan, beside_low_precision, chunks_of
from .products import Products, gradient_dtype

FROZEN = (False, False, False)


def make_pair_plan(
    matrices: Sequence[tuple[Tensor, Tensor]],
    needs: Sequence[tuple[bool, bool, bool]],
    *,
    softcaps: Sequence[float | None],
    chunk_bytes: int | None,
    keeps: bool = True,
) -> LinearPlan:
    """The plan for ((hidden (N, H), weight (V, H)) of p, likewise of q); its H is that of both.

    Operations: 2 N V H for a side's logits, and again where the backward makes them a second
    time, 2 for its dhidden and 2 for its dweight; a side that needs nothing has its logits alone.

    Args:
        needs, softcaps: of p and of q; needs says which of hidden, weight and bias need a gradient.
        keeps: whether the forward may keep logits or gradients.
    """
    tokens, vocabulary = len(matrices[0][0]), len(matrices[0][1])
    token_bytes = kept = beside = held = 0
    products = making = 0
    for (hidden, weight), side, softcap in zip(matrices, needs, softcaps, strict=True):
        size, accumulator = hidden.shape[1], statistics_dtype(hidden).itemsize
        low_precision = hidden.element_size() < accumulator
        separate = any(side) and (low_precision or softcap is not None)
        token_bytes += vocabulary * (accumulator + hidden.element_size() * separate)
        kept += tokens * vocabulary * accumulator
        held += tokens * size * gradient_dtype(hidden.dtype).itemsize * side[0]
        making += 2 * size
        products += 2 * size * (side[0] + side[1])
        if low_precision:
            beside += beside_low_precision(hidden, weight, side)
    chunk_tokens, most, budget = chunks_of(
        tokens, token_bytes, chunk_bytes, matrices[0][0].device.type
    )
    strategy, peak, passes = "recompute", chunk_tokens * token_bytes, 1
    heads_need = any(need for side in needs for need in side[1:])
    if not any(map(any, needs)):
        strategy = "forward"
    elif keeps and kept + tokens * token_bytes <= budget:
        strategy, peak, chunk_tokens = "kept-logits", kept + tokens * token_bytes, max(tokens, 1)
    elif keeps and not heads_need:
        strategy, peak = "unit-gradient", peak + held
    else:
        passes = 2
    return LinearPlan(
        strategy, tokens, making // 2, vocabulary, chunk_tokens,
        (passes * making + products) * tokens * vocabulary, passes, peak + beside, most,
    )  # fmt: skip


class _Side:
    """One head on its way through the chunks."""

    def __init__(self, tensors: Sequence[Tensor | None], run: Run, factor: float):
        self.hidden, self.weight, bias = tensors
        # what brings logits to the row temperature that both sides share
        self.head, self.factor = run.head, factor
        self.differentiable = any(run.needs)
        self.products = Products(self.weight, bias)
        self.chunk = Chunk(self.products, run, self.differentiable)
        self.gathered = Gathered(self.hidden, self.products, run.needs, self.chunk)

    def logits(self, rows: slice | Tensor) -> Tensor:
        """z of a chunk, in the chunk's memory."""
        self.rows, self.hidden_rows = rows, self.hidden[rows]
        z = self.chunk.z[: len(self.hidden_rows)]
        self.head.cap_(self.products.logits(self.hidden_rows, z))
        return z if self.factor == 1 else z.mul_(self.factor)

    def take(self, kept: Tensor, places: Tensor, rows: slice | Tensor) -> Tensor:
        """z of a chunk from the logits that the forward kept, at `places` there."""
        self.rows, self.hidden_rows = rows, self.hidden[rows]
        return torch.index_select(kept, 0, places, out=self.chunk.z[: len(places)])

    def dz(self, z: Tensor) -> Tensor | None:
        return self.chunk.dz[: len(z)] if self.differentiable else None

    def gather(self, dz: Tensor | None, z: Tensor, unit: Tensor | None) -> None:
        """Takes in the gradient of the last chunk made, which is over `unit`; uses up both."""
        if dz is None:
            return
        if self.factor != 1:
            dz.mul_(self.factor)
            if self.head.softcap is not None:
                z.div_(self.factor)
        self.gathered.add(self.head.uncap_(dz, z), self.hidden_rows, self.rows, None, unit)


def _two_sides(tensors: Sequence[Tensor | None], runs: tuple[Run, Run]) -> tuple[_Side, _Side]:
    p, q = runs
    factor = p.head.row_temperature / q.head.row_temperature
    return _Side(tensors[:3], p, 1.0), _Side(tensors[3:], q, factor)


def _unit(sides: tuple[_Side, _Side], kl: Tensor, dkl: Tensor) -> Tensor | None:
    """The unit of both sides' gradients, where one is float16: p (log p - log q - KL) / T of p."""
    if torch.float16 not in (side.weight.dtype for side in sides):
        return None
    steepest = max((side.head for side in sides), key=lambda head: head.steepest)
    return unit_of(steepest, dkl * (1 + kl.clamp(max=torch.finfo(kl.dtype).max)))


def _gather_gradients(
    sides,
    logits,
    row,
    dkl: Tensor,
    runs: tuple[Run, Run],
    jsd_beta: float | None,
    unit: Tensor | None,
) -> None:
    """From a chunk's logits and row statistics to what each side gathers, for the given dkl."""
    if unit is not None:
        dkl = dkl / unit
    gradients = [side.dz(z) for side, z in zip(sides, logits, strict=True)]
    rows_backward(
        runs[0].backend, *logits, *gradients, row, dkl, runs[0].head.row_temperature, jsd_beta
    )
    for side, dz, z in zip(sides, gradients, logits, strict=True):
        side.gather(dz, z, unit)


@without_autocast
def kl_pass(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    mask: Tensor,
    runs: tuple[Run, Run],
    jsd_beta: float | None,
    scale: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """[divergence, max a, log P, max b, log Q], (N,) or None; what the plan keeps of p and q.

    With a `scale`, a loss's derivative by each divergence, what is kept are the loss's gradients:
    of p's hidden, weight and bias, then of q's. Neither side is float16 then: such a gradient
    would have to wait for its factor in float32.
    """
    plan, backend = runs[0].plan, runs[0].backend
    makes_gradient = plan.strategy == "unit-gradient" or scale is not None
    if not makes_gradient:
        runs = tuple(Run(run.head, plan, FROZEN, backend) for run in runs)
    sides = _two_sides((p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias), runs)
    dtype = statistics_dtype(p_hidden, q_hidden)
    keeps = jsd_beta is None and implementation(backend).KEEPS_SOFTMAX
    present = (True, *(keeps,) * 4)
    statistics = [mask.new_zeros(mask.shape, dtype=dtype) if p else None for p in present]
    for rows in select_rows(mask, len(mask), plan.chunk_tokens):
        logits = [side.logits(rows) for side in sides]
        row = rows_forward(*logits, runs[0].head.row_temperature, backend, jsd_beta)
        store_rows(statistics, rows, row)
        if makes_gradient:
            one = torch.ones_like(row[0])
            if scale is not None:
                one *= scale
            _gather_gradients(sides, logits, row, one, runs, jsd_beta, _unit(sides, row[0], one))
    saved = [None, None]
    if plan.strategy == "kept-logits":
        saved = [side.chunk.z for side in sides]  # one chunk holds every counted token
    if scale is not None:
        saved = _finished(sides)
    elif makes_gradient:
        saved = [side.gathered.dhidden for side in sides]
    return statistics, saved


def scale_unit_gradients(
    saved: Sequence[Tensor | None], mask: Tensor, dkl: Tensor
) -> list[Tensor | None]:
    """The gradients of p and q (hidden, weight, bias) from dKL/dhidden that the forward made."""
    flows = (mask & (dkl != 0))[:, None]
    gradients = []
    for unit in saved:
        dhidden = None
        if unit is not None:
            dhidden = torch.where(flows, unit * dkl[:, None], 0.0).to(unit.dtype)
        gradients += [dhidden, None, None]
    return gradients


@without_autocast
def kl_backward(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    mask: Tensor,
    statistics: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    dkl: Tensor,
    runs: tuple[Run, Run],
    jsd_beta: float | None,
) -> Gradients3:
    """The gradients of p's hidden, weight and bias, then of q's.

    `kept` holds each side's logits of the rows that the mask counts, in their order, or None:
    then each chunk's logits are made again.
    """
    sides = _two_sides((p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias), runs)
    unit = _unit(sides, statistics[0], torch.where(mask, dkl, 0.0))
    flows = mask & (dkl != 0)
    position = mask.cumsum(0) - 1
    for rows in select_rows(flows, len(mask), runs[0].plan.chunk_tokens):
        logits = [
            side.logits(rows) if z is None else side.take(z, position[rows], rows)
            for side, z in zip(sides, kept, strict=True)
        ]
        row = at_rows(statistics, rows)
        _gather_gradients(sides, logits, row, dkl[rows], runs, jsd_beta, unit)
    return _finished(sides)


def _finished(sides: tuple[_Side, _Side]) -> Gradients3:
    """What p's side has gathered, then q's."""
    return [gradient for side in sides for gradient in side.gathered.finish(side.weight.dtype)]
