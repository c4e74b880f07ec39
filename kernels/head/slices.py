"""The gradient of the logits, a slice of the vocabulary at a time, where each token's lse is known.

    z = head(hidden W_s^T),   log p = z / T - lse
    dz_j = (dlogp (1[target] - p_j) + dlse p_j - dH p_j (log p_j + H)) / T

Every token's gradient of a slice exists at once, so that the slice's dweight is one product.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..blocks import RowGradients, RowStatistics, aligned
from ..implementation import implementation
from .products import Head, Products


@dataclass(frozen=True)
class Softmaxes:
    """Tokens (n,) whose softmax and derivatives are known; `entropy` and `dentropy` may be None.

    Args:
        hidden: (n, H).
        target, logp, row_max, log_sum: the token, its log-probability, the largest logit, and the
            logarithm of sum_j exp((z_j - row_max) / T).
        dlogp, dlse, dentropy: derivatives of the loss by the token's statistics.
    """

    hidden: Tensor
    target: Tensor
    logp: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    dlogp: Tensor | None
    dlse: Tensor | None
    dentropy: Tensor | None

    @staticmethod
    def of(
        hidden: Tensor, target: Tensor, statistics: RowStatistics, gradients: RowGradients
    ) -> Softmaxes:
        parts = statistics._asdict() | gradients._asdict()
        del parts["lse"]
        return Softmaxes(hidden, target, **parts)

    def __len__(self) -> int:
        return len(self.target)

    def at(self, rows: slice | Tensor) -> Softmaxes:
        parts = (getattr(self, field.name) for field in fields(self))
        return Softmaxes(*(None if part is None else part[rows] for part in parts))

    def over(self, unit: Tensor | None) -> Softmaxes:
        """The same tokens of a loss divided by `unit`."""
        if unit is None:
            return self
        given = {name: getattr(self, name) for name in ("dlogp", "dlse", "dentropy")}
        return replace(self, **{n: None if g is None else g / unit for n, g in given.items()})

    @staticmethod
    def joined(several: list[Softmaxes]) -> Softmaxes:
        names = [field.name for field in fields(Softmaxes)]
        columns = ([getattr(one, name) for one in several] for name in names)
        return Softmaxes(*(None if c[0] is None else torch.cat(c) for c in columns))


class SlicedGradient:
    """Makes the gradient of some tokens' logits, a slice of the vocabulary after the other."""

    def __init__(self, tokens: Softmaxes, products: Products, head: Head, backend: str):
        self.tokens, self.products, self.head, self.backend = tokens, products, head, backend
        zero = torch.zeros_like(tokens.logp)
        at_target = zero if tokens.dlogp is None else tokens.dlogp
        at_softmax = (zero if tokens.dlse is None else tokens.dlse) - at_target
        # a target out of range has made its token's logp NaN, and makes the gradient NaN
        self.at_softmax = torch.where(tokens.logp.isnan(), tokens.logp, at_softmax)
        at_label = self.at_softmax
        if tokens.dentropy is not None:
            # a probability of 0 has no part in the entropy
            log_p = tokens.logp.clamp(min=torch.finfo(tokens.logp.dtype).min)
            at_label = at_label - tokens.dentropy * (log_p + tokens.entropy)
        self.at_label = (at_target + tokens.logp.exp() * at_label) / head.row_temperature

    def logits(self, columns: slice, z: Tensor) -> Tensor:
        """z (n, w): the head's logits at `columns`, before the temperature."""
        return self.head.cap_(self.products.logits(self.tokens.hidden, z, columns))

    def ds(self, columns: slice, z: Tensor, dz: Tensor) -> Tensor:
        """The gradient of hidden W^T + bias at `columns`, in dz, which may be z; uses up z."""
        tokens, temperature = self.tokens, self.head.row_temperature
        implementation(self.backend).token_logprob_backward_slice(
            z, dz, tokens.row_max, tokens.log_sum, tokens.entropy, self.at_softmax,
            tokens.dentropy, temperature,
        )  # fmt: skip
        self._write_labels(columns, dz)
        return self.head.uncap_(dz, z)

    def _write_labels(self, columns: slice, dz: Tensor) -> None:
        """At the target 1 - p stands for p, which rounds to 1 where the token is certain."""
        column = self.tokens.target.long() - columns.start
        inside = (column >= 0) & (column < dz.shape[1])
        column = column.clamp(0, dz.shape[1] - 1)[:, None]
        label = self.at_label[:, None].to(dz.dtype)
        dz.scatter_(1, column, torch.where(inside[:, None], label, dz.gather(1, column)))


class SliceMemory:
    """Memory for the logits of a slice and for their gradient, (n, w) each.

    Args:
        given: flat, of the logits' dtype.
        dtype: the gradient's, or None where it replaces the logits.
    """

    def __init__(self, given: Tensor, dtype: torch.dtype | None):
        self.given, self.dtype = given, dtype

    @staticmethod
    def for_tokens(tokens: int, width: int, like: Tensor, dtype: torch.dtype | None) -> SliceMemory:
        size = tokens * aligned(width)
        if dtype is not None:
            size += -(-size * dtype.itemsize // like.element_size())
        return SliceMemory(like.new_empty(size), dtype)

    def fitting(self, width: int) -> int:
        """Tokens of which a slice fits."""
        beside = 0 if self.dtype is None else self.dtype.itemsize
        token = aligned(width) * (self.given.element_size() + beside)
        return self.given.nbytes // token

    def views(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        """(z, dz) of a slice, whose rows start at 16-byte boundaries."""
        size, shape = tokens * aligned(width), (tokens, aligned(width))
        z = dz = self.given[:size].view(shape)
        if self.dtype is not None:
            dz = self.given[size:].view(self.dtype)[:size].view(shape)
        return z[:, :width], dz[:, :width]


def slices_of(vocabulary: int, width: int) -> list[slice]:
    return [slice(a, min(a + width, vocabulary)) for a in range(0, vocabulary, width)]


def sliced_gradients(
    sliced: SlicedGradient,
    kept: Tensor | None,
    place: Tensor | None,
    needs: tuple[bool, bool, bool],
    columns: int,
    unit: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of the tokens' hidden (n, H), of weight and bias (as summed), times `unit`.

    `kept` may hold logits, the tokens' at rows `place` (n,); else they are made again, `columns`
    of the vocabulary at a time.
    """
    tokens, products = sliced.tokens, sliced.products
    weight = products.weight
    like = {"dtype": products.accumulator, "device": weight.device}
    separate = products.low_precision or sliced.head.softcap is not None
    memory = SliceMemory.for_tokens(
        len(tokens), columns, torch.empty(0, **like), weight.dtype if separate else None
    )
    dhidden = torch.zeros(tokens.hidden.shape, **like) if needs[0] else None
    dweight = None
    if needs[1]:
        make = torch.empty if len(tokens) else torch.zeros
        dweight = make(weight.shape, dtype=weight.dtype, device=weight.device)
    dbias = torch.zeros(len(weight), **like) if needs[2] else None
    for part in slices_of(len(weight), columns) if len(tokens) else []:
        z, dz = memory.views(len(tokens), part.stop - part.start)
        if kept is None:
            sliced.logits(part, z)
        else:
            torch.index_select(kept[:, part], 0, place, out=z)
        ds = sliced.ds(part, z, dz)
        if dhidden is not None:
            products.add_dhidden(ds, dhidden, part)
        if dweight is not None:
            products.dweight(ds, tokens.hidden, dweight[part], unit)
        if dbias is not None:
            dbias[part] = ds.sum(0, dtype=dbias.dtype)
    if unit is not None:
        dhidden, dbias = (None if g is None else g * unit for g in (dhidden, dbias))
    dhidden = None if dhidden is None else dhidden.to(weight.dtype)
    return [dhidden, dweight, dbias]
