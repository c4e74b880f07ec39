"""What the fused head's passes work with: a chunk's memory, and gradients gathered over chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_plan import LinearPlan
from .linear_products import Head, Products

Gradients3 = list[Tensor | None]  # of hidden, weight and bias; None where unneeded


@dataclass(frozen=True)
class Run:
    """How a call goes through its tokens; `needs` says which of hidden, weight, bias need one."""

    head: Head
    plan: LinearPlan
    needs: tuple[bool, bool, bool]
    backend: str


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that wait for the upstream one: a loss scaler's factor is in there, without
    which small gradients would leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def unit_of(*given: Tensor | None) -> Tensor:
    """The power of two that the largest of the given is near, over which it is about 1.

    A gradient of 1/N would leave float16's range in the products; a power of two costs no bit.
    """
    largest = torch.stack([g.abs().max() for g in given if g is not None]).max()
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)


class Gathered:
    """The gradients of hidden, weight and bias, gathered chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        products: Products,
        needs: tuple[bool, bool, bool],
        keeper: Chunk | None = None,
    ):
        """With a `keeper`, whose dz has room for every token, dweight is made at the end."""
        weight, accumulator = products.weight, products.accumulator
        like = {"dtype": accumulator, "device": weight.device}
        self.products = products
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        self.hidden, self.keeper, self.kept = hidden, keeper, []
        self.dweight = None
        if needs[1] and keeper is None:
            self.dweight = torch.zeros(weight.shape, **like)
        self.dbias = torch.zeros(weight.shape[0], **like) if needs[2] else None

    def add(self, ds: Tensor, hidden: Tensor, rows: slice | Tensor, keep: Tensor | None) -> None:
        """Takes in a chunk; rows where `keep` (n,) is false have no gradient: no product either."""
        if keep is not None and not keep.all():
            kept = keep.nonzero().squeeze(-1)
            ds, hidden = ds[kept], hidden[kept]
            if self.keeper is not None:
                ds = self.keeper.dz[: len(kept)].copy_(ds)
            rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
        if self.dhidden is not None:
            self.dhidden[rows] = self.products.dhidden(ds)
        if self.keeper is not None:
            self.keeper.dz = self.keeper.dz[len(ds) :]  # the next chunk's stands behind it
            self.kept.append(rows)
        if self.dweight is not None:
            self.products.add_dweight(ds, hidden, self.dweight)
        if self.dbias is not None:
            self.dbias += ds.sum(0, dtype=self.dbias.dtype)

    def finish(self, unit: Tensor | None, dtype: torch.dtype) -> Gradients3:
        """The gradients times `unit` in `dtype`."""
        if self.keeper is not None:
            every = torch.cat([*map(self._indices, self.kept), self._indices(slice(0, 0))])
            hidden = self.hidden if len(every) == len(self.hidden) else self.hidden[every]
            self.dweight = self.products.dweight(self.keeper.every_dz[: len(every)], hidden)
        gradients = (self.dhidden, self.dweight, self.dbias)
        if unit is not None:
            gradients = (None if g is None else g.float() * unit for g in gradients)
        return [None if g is None else g.to(dtype) for g in gradients]

    def _indices(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            return torch.arange(rows.start, rows.stop, device=self.hidden.device)
        return rows


class Chunk:
    """Memory for a chunk's logits and their gradient, which share it where they can.

    Without a gradient, where none is asked for, `dz` is the logits' own memory.
    """

    def __init__(self, products: Products, run: Run, gradient: bool = True):
        tokens, vocabulary = run.plan.chunk_tokens, run.plan.vocabulary
        # Triton's 16-byte stores want every row of both to start at a 16-byte boundary
        width = -(-vocabulary // 16) * 16 if run.backend == "triton" else vocabulary
        like = {"dtype": products.accumulator, "device": products.weight.device}
        self.z = self.dz = torch.empty((tokens, width), **like)[:, :vocabulary]
        if gradient and (products.low_precision or run.head.softcap is not None):
            like["dtype"] = products.weight.dtype
            tokens = run.plan.tokens if run.plan.one_dweight else tokens
            self.dz = torch.empty((tokens, width), **like)[:, :vocabulary]
        self.every_dz = self.dz


def at_rows(tensors: list[Tensor | None], rows: slice | Tensor) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def store_rows(wholes: list[Tensor | None], rows: slice | Tensor, parts: tuple) -> None:
    for whole, part in zip(wholes, parts, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part
