"""What the fused head's passes work with: a chunk's memory, and gradients gathered over chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..implementation import implementation
from .plan import LinearPlan
from .products import Head, Products, gradient_dtype
from .slices import SlicedGradient, SliceMemory, Softmaxes, slices_of

# of derivatives by logits in float16, before an entropy's or a divergence's (a few times that)
FLOAT16_ROOM = 1024.0
Gradients3 = list[Tensor | None]  # of hidden, weight and bias; None where unneeded


@dataclass(frozen=True)
class Run:
    """How a call goes through its tokens; `needs` says which of hidden, weight, bias need one."""

    head: Head
    plan: LinearPlan
    needs: tuple[bool, bool, bool]
    backend: str


def unit_of(head: Head, *given: Tensor | None) -> Tensor:
    """A power of two, over which derivatives by logits stand high in float16's range.

    They are those of a loss with the given derivatives by a token's statistics. One of 1/N, or a
    sure token's, would fall out of that range, and one of 1e5 leave it at the other end; a power
    of two costs no bit. What is not finite is not counted, and spoils its own token alone.
    """
    given = [torch.where(g.isfinite(), g, 0.0).abs() for g in given if g is not None]
    # a 0 more, as there may be no token
    largest = torch.cat([given[0].new_zeros(1), *given]).max() * head.steepest
    unit = torch.exp2(torch.floor(torch.log2(largest)))
    return torch.where(largest > 0, unit, 1.0) / FLOAT16_ROOM


class Chunk:
    """Memory for a chunk's logits and their gradient, which share it where they can.

    Without a gradient, where none is asked for, `dz` is the logits' own memory. `all_dz` has room
    for more tokens than a chunk where the plan keeps them; the next chunk's start at `first`.
    """

    def __init__(self, products: Products, run: Run, gradient: bool = True):
        plan, self.vocabulary, self.first = run.plan, run.plan.vocabulary, 0
        width = implementation(run.backend).row_width(self.vocabulary)
        like = {"dtype": products.accumulator, "device": products.weight.device}
        self.all_z = self.all_dz = torch.empty((plan.chunk_tokens, width), **like)
        if gradient and (products.low_precision or run.head.softcap is not None):
            like["dtype"] = products.weight.dtype
            self.all_dz = torch.empty((max(plan.dz_tokens, plan.chunk_tokens), width), **like)
        # a CPU's product of bfloat16 with tile units reads on past a row's end, and multiplies
        # what it finds by 0: a NaN there would spoil the row
        self.all_dz[:, self.vocabulary :] = 0

    def compacted(self, ds: Tensor, where: Tensor) -> Tensor:
        """ds[where], in the logits' memory where the gradient has its own: they are used up."""
        if self.all_dz is self.all_z:
            return ds[where]
        width = self.all_dz.shape[1]
        memory = self.all_z.view(-1).view(ds.dtype)[: len(where) * width].view(len(where), width)
        whole = self.all_dz[self.first : self.first + len(ds)]
        return torch.index_select(whole, 0, where, out=memory)[:, : self.vocabulary]

    @property
    def z(self) -> Tensor:
        return self.all_z[:, : self.vocabulary]

    @property
    def dz(self) -> Tensor:
        return self.all_dz[self.first :, : self.vocabulary]


class Gathered:
    """The gradients of hidden, weight and bias, gathered chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        products: Products,
        needs: tuple[bool, bool, bool],
        chunk: Chunk,
        kept: KeptGradients | None = None,
    ):
        """With `kept`, dweight is made at the end, of what that has kept; else summed."""
        weight = products.weight
        like = {"dtype": products.accumulator, "device": weight.device}
        self.products, self.chunk, self.kept, self.unit = products, chunk, kept, None
        waiting = gradient_dtype(weight.dtype)
        self.dhidden = hidden.new_zeros(hidden.shape, dtype=waiting) if needs[0] else None
        self.dweight = torch.zeros(weight.shape, **like) if needs[1] and kept is None else None
        self.dbias = torch.zeros(weight.shape[0], **like) if needs[2] else None

    def add(
        self,
        ds: Tensor,
        hidden: Tensor,
        rows: slice | Tensor,
        keep: Tensor | None,
        unit: Tensor | None = None,
    ) -> None:
        """Takes in a chunk's ds, which is over `unit`; where dweight is summed, all chunks' are.

        Rows where `keep` (n,) is false have no gradient: no product either.
        """
        where, self.unit = None, unit
        if keep is not None and not keep.all():
            where = keep.nonzero().squeeze(-1)
            ds, hidden = self.chunk.compacted(ds, where), hidden[where]
            rows = where + rows.start if isinstance(rows, slice) else rows[where]
        if self.dhidden is not None:
            self.dhidden[rows] = _times(self.products.dhidden(ds), unit)
        if self.dweight is not None:
            self.products.add_dweight(ds, hidden, self.dweight)
        if self.dbias is not None:
            self.dbias += _times(ds.sum(0, dtype=self.dbias.dtype), unit)
        # last, as gradients that are kept move into the memory that ds stands in
        if self.kept is not None:
            self.kept.add(ds, rows, where, unit)

    def finish(self, dtype: torch.dtype) -> Gradients3:
        """The gradients in `dtype`; dweight, where made of `kept`, in its own, dbias as summed."""
        dweight = None if self.dweight is None else _times(self.dweight, self.unit)
        gradients = [None if g is None else g.to(dtype) for g in (self.dhidden, dweight)]
        gradients.append(self.dbias)
        if self.kept is not None:
            gradients[1] = self.kept.dweight()
        return gradients


def _times(gradient: Tensor, unit: Tensor | None) -> Tensor:
    return gradient if unit is None else gradient.mul_(unit)


class KeptGradients:
    """Every token's gradient of the logits in low precision, until dweight is made of them.

    The first stand in dweight's own memory: the part of it that a slice of the vocabulary will take
    holds the slice of some H tokens' gradients. The others stand in the chunk's `all_dz`. What fits
    neither is made again at the end, from the tokens' statistics; as it needs the chunk's memory on
    its way, it goes first, while `coming` tokens are more than what is free.
    """

    def __init__(self, hidden: Tensor, products: Products, run: Run, chunk: Chunk, coming: int):
        weight, columns = products.weight, run.plan.slice_columns
        self.hidden, self.products, self.run, self.chunk = hidden, products, run, chunk
        self.coming, self.again = coming, 0
        dtype = gradient_dtype(weight.dtype)
        self.whole = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.slices = slices_of(len(weight), columns)
        # dweight's memory as the logits' gradient: (slices, tokens, w), and a narrower last slice
        memory = self.whole.view(-1).view(chunk.all_dz.dtype)
        self.room, count = memory.numel() // len(weight), len(weight) // columns
        equal, last = memory.tensor_split([count * columns * self.room])
        self.equal_slices = equal.view(count, self.room, columns)
        self.last_slice = last.view(self.room, len(weight) - count * columns)
        # of each chunk: its rows in either memory, and the unit that their gradients are over
        self.own, self.own_rows, self.kept_rows = 0, [], []
        self.remade: list[Softmaxes] = []

    def expect(self, count: int, softmaxes: Callable[[], Softmaxes]) -> None:
        """Announces a chunk of `count` tokens, some of which may have to be made again."""
        free = self.room - self.own + len(self.chunk.dz)
        self.again = min(max(self.coming - free, 0), count)
        self.coming -= count
        if self.again:
            self.remade.append(softmaxes().at(slice(self.again)))

    def add(
        self, ds: Tensor, rows: slice | Tensor, where: Tensor | None, unit: Tensor | None
    ) -> None:
        """Keeps a chunk's gradient, whose memory it uses up; `where` are the places of its rows in
        the chunk, if not all."""
        rows, again = indices_of(rows, ds.device), self.again
        if again and where is not None:
            again = int((where < again).sum())
            self.remade[-1] = self.remade[-1].at(where[:again])
        ds, rows = ds[again:], rows[again:]
        left = max(len(ds) - (self.room - self.own), 0)
        self._store_in_dweight(ds[left:])
        self.own_rows.append((rows[left:], unit))
        if again or where is not None:
            self.chunk.dz[:left] = ds[:left].clone() if where is None else ds[:left]
        self.chunk.first += left
        self.kept_rows.append((rows[:left], unit))

    def _store_in_dweight(self, ds: Tensor) -> None:
        count, _, columns = self.equal_slices.shape
        tokens, split = slice(self.own, self.own + len(ds)), count * columns
        by_slice = ds[:, :split].unflatten(1, (count, columns)).transpose(0, 1)
        self.equal_slices[:, tokens] = by_slice
        self.last_slice[tokens] = ds[:, split:]
        self.own = tokens.stop

    def dweight(self) -> Tensor:
        """dweight, slice by slice: one sum over all tokens, rounded once."""
        units = [unit for _, unit in self.own_rows if unit is not None]
        unit = torch.stack(units).max() if units else None
        own_hidden, kept_hidden = (self._hidden(r, unit) for r in (self.own_rows, self.kept_rows))
        kept, remade = self.chunk.all_dz[: self.chunk.first], self._remade_gradients(unit)
        own_slices = (*self.equal_slices, self.last_slice)
        for part, memory in zip(self.slices, own_slices, strict=False):
            pieces = [(memory[: self.own], own_hidden), (kept[:, part], kept_hidden)]
            pieces = [piece for piece in pieces if len(piece[0])]
            # not in its own place yet: that is where the first piece stands
            if len(pieces) == 1 and not remade:
                rounded = torch.empty_like(self.whole[part])
                self.products.dweight(*pieces[0], rounded, unit)
                self.whole[part] = rounded
                continue
            total = torch.zeros_like(self.whole[part], dtype=self.products.accumulator)
            for piece in pieces:
                self.products.add_dweight(*piece, total)
            for gradient, memory_of in remade:
                z, dz = memory_of.views(len(gradient.tokens), part.stop - part.start)
                ds = gradient.ds(part, gradient.logits(part, z), dz)
                self.products.add_dweight(ds, gradient.tokens.hidden, total)
            self.whole[part] = total if unit is None else total * unit
        return self.whole

    def _hidden(self, chunks: list[tuple[Tensor, Tensor | None]], unit: Tensor | None) -> Tensor:
        """The chunks' hidden states, times their own unit over the one that all share."""
        if not chunks:
            return self.hidden[:0]
        hidden = self.hidden[torch.cat([rows for rows, _ in chunks])]
        if unit is not None:
            factors = torch.cat([(own / unit).expand(len(rows)) for rows, own in chunks])
            hidden.mul_(factors[:, None])
        return hidden

    def _remade_gradients(self, unit: Tensor | None) -> list[tuple[SlicedGradient, SliceMemory]]:
        """The tokens to be made again, as many at a time as the chunk's logits leave room for."""
        if not self.remade:
            return []
        tokens, columns = Softmaxes.joined(self.remade).over(unit), self.run.plan.slice_columns
        z, dtype = self.chunk.all_z.view(-1), self.chunk.all_dz.dtype
        memory = SliceMemory(z, dtype)
        if memory.fitting(columns) == 0:
            memory = SliceMemory.for_tokens(1, columns, z, dtype)
        most = memory.fitting(columns)
        return [
            (
                SlicedGradient(
                    tokens.at(slice(start, start + most)), self.products, self.run.head,
                    self.run.backend,
                ),
                memory,
            )
            for start in range(0, len(tokens), most)
        ]  # fmt: skip


def indices_of(rows: slice | Tensor, device: torch.device) -> Tensor:
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=device)
    return rows


def count_of(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def at_rows(tensors: list[Tensor | None], rows: slice | Tensor) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def store_rows(wholes: list[Tensor | None], rows: slice | Tensor, parts: tuple) -> None:
    for whole, part in zip(wholes, parts, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part
