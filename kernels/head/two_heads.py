"""The inputs of two heads' divergences: checked, as matrices, and the way through their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..blocks import statistics_dtype
from ..checks import check_finite, check_positive
from ..rows.categorical_kl import check_logits, check_mask
from .chunks import Run
from .inputs import prepare_head
from .kl_passes import make_pair_plan
from .products import Head
from .tokens import is_plain, needs_of


@dataclass(frozen=True)
class HeadPair:
    """Hidden states (N, H), weights and biases of p and of q, and the mask; the heads' forms."""

    tensors: tuple[Tensor | None, ...]
    heads: tuple[Head, Head]
    shape: torch.Size  # of the tokens as they came
    backend: str

    @property
    def is_plain(self) -> bool:
        """Eager mode, where an autograd.Function costs less than an operator."""
        return is_plain(*self.tensors)

    @property
    def needs(self) -> list[tuple[bool, bool, bool]]:
        """Of p and of q, which of hidden, weight and bias need a gradient."""
        return [needs_of(*self.tensors[:3]), needs_of(*self.tensors[3:6])]

    @property
    def needs_of_both(self) -> list[bool]:
        return [need for side in self.needs for need in side]

    def options(self, chunk_bytes: int | None, jsd_beta: float | None) -> tuple:
        """What the operators take between the tensors and `needs`."""
        p, q = self.heads
        forms = (p.temperature, p.softcap, p.logit_scale, q.softcap, q.logit_scale)
        return *forms, chunk_bytes, jsd_beta


def prepare_pair(
    p: tuple, q: tuple, temperature: float, mask: Tensor | None, backend: str | None
) -> HeadPair:
    """The two heads, checked.

    Args:
        p, q: what the names of a side's arguments begin with, its hidden, weight, bias, softcap
            and logit_scale.
    """
    (p_name, p_hidden), (q_name, q_hidden) = p[:2], q[:2]
    check_logits(f"{p_name}hidden", p_hidden, "H")
    check_logits(f"{q_name}hidden", q_hidden, "H")
    shape = p_hidden.shape[:-1]
    if q_hidden.shape[:-1] != shape or q_hidden.device != p_hidden.device:
        raise ValueError(
            f"{q_name}hidden must have the leading shape and the device of {p_name}hidden, "
            f"{tuple(shape)} on '{p_hidden.device}', got {tuple(q_hidden.shape[:-1])} on "
            f"'{q_hidden.device}'"
        )
    mask = check_mask(mask, p_hidden, f"{p_name}hidden")
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    backend = resolve_backend(backend, p_hidden)
    (*p, p_head), (*q, q_head) = _prepare(*p, temperature), _prepare(*q, temperature)
    if len(p[1]) != len(q[1]):
        raise ValueError(
            f"{p_name}weight and {q_name}weight must have the same vocabulary as rows, got "
            f"{tuple(p[1].shape)} and {tuple(q[1].shape)}"
        )
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=p_hidden.device)
    return HeadPair((*p, *q, mask.view(-1)), (p_head, q_head), shape, backend)


def _prepare(name: str, hidden, weight, bias, softcap, logit_scale, temperature):
    """hidden (N, H), weight, bias and the head's form of the side that an error names."""
    try:
        return prepare_head(
            hidden, weight, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
        )
    except ValueError as error:
        raise ValueError(f"{name}{error}") from error


def runs_of(pair: HeadPair, chunk_bytes: int | None, keeps: bool = True) -> tuple[Run, Run]:
    """How p and q go through their tokens together."""
    matrices = [pair.tensors[:2], pair.tensors[3:5]]
    return _make_runs(matrices, pair.heads, pair.needs, chunk_bytes, pair.backend, keeps)


def op_runs(p_hidden, p_weight, q_hidden, q_weight, options: tuple) -> tuple[Run, Run]:
    """An operator's way through its tokens: it keeps nothing but what it returns."""
    temperature, p_softcap, p_scale, q_softcap, q_scale, chunk_bytes, _, needs, backend = options
    heads = (Head(temperature, p_softcap, p_scale), Head(temperature, q_softcap, q_scale))
    matrices = [(p_hidden, p_weight), (q_hidden, q_weight)]
    needs = [tuple(needs[:3]), tuple(needs[3:])]
    return _make_runs(matrices, heads, needs, chunk_bytes, backend, False)


def empty_gradients(
    inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """Memory for the gradients of p's hidden, weight and bias, then q's.

    One of no elements, in the dtype of `like`, where unneeded. A bias has its gradient in float32
    or wider, the others in their weight's dtype.
    """
    gradients = []
    for (hidden, weight, bias), side in ((inputs[:3], needs[:3]), (inputs[3:], needs[3:])):
        dtypes = (weight.dtype, weight.dtype, statistics_dtype(weight))
        for tensor, dtype, need in zip((hidden, weight, bias), dtypes, side, strict=True):
            shape, dtype = (tensor.shape, dtype) if need else ((0,), like.dtype)
            gradients.append(torch.empty(shape, dtype=dtype, device=like.device))
    return tuple(gradients)


def _make_runs(matrices, heads, needs, chunk_bytes, backend, keeps) -> tuple[Run, Run]:
    softcaps = [head.softcap for head in heads]
    plan = make_pair_plan(matrices, needs, softcaps=softcaps, chunk_bytes=chunk_bytes, keeps=keeps)
    return tuple(Run(head, plan, need, backend) for head, need in zip(heads, needs, strict=True))
