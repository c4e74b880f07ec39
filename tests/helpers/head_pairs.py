"""Inputs, assertions and the battery of two heads' KL and divergences: two naive heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from helpers import DEVICE
from helpers.checks import arithmetic
from helpers.distributions import categorical_divergence, categorical_kl
from helpers.heads import ROUNDING, naive_logits
from helpers.judge import EPS32, assert_no_worse_than_eager

NAMES = ("p_hidden", "p_weight", "p_bias", "q_hidden", "q_weight", "q_bias")
ALL = (True,) * 6
# what one head has and the other has not
HEADS = {
    "plain": {},
    "scaled": {"p_logit_scale": 0.5, "q_logit_scale": 0.5},
    "gemma": {"p_softcap": 2.0, "q_softcap": 3.0, "p_logit_scale": 0.7},
    "unlike": {"q_softcap": 2.0, "q_logit_scale": 1.7, "p_logit_scale": 0.6},
}


@dataclass
class Pair:
    """Both heads' tensors in the order of NAMES, and the call's options."""

    tensors: list[Tensor | None]
    mask: Tensor | None
    options: dict[str, float] = field(default_factory=dict)
    # of linear_categorical_divergence: kind and jsd_beta; None: of linear_categorical_kl
    divergence: dict[str, object] | None = None

    @property
    def vocabulary(self) -> int:
        return self.tensors[1].shape[0]

    def leaves(self, needs=ALL, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        return [
            t if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(need)
            for t, need in zip(self.tensors, needs, strict=True)
        ]


def make_pair(
    shape=(11,), *, widths=(5, 9), vocabulary=23, dtypes=(torch.float64,) * 2, masked=True,
    bias=True, temperature=0.8, head="plain",
) -> Pair:  # fmt: skip
    """Inputs; hidden rows are NaN where the mask is false."""
    mask = (torch.rand(shape) < 0.7).to(DEVICE) if masked else None
    tensors = []
    for width, dtype in zip(widths, dtypes, strict=True):
        hidden = torch.randn(*shape, width).to(DEVICE, dtype)
        if masked:
            hidden[~mask] = torch.nan
        weight = torch.randn(vocabulary, width).mul(2 / width**0.5).to(DEVICE, dtype)
        tensors += [hidden, weight, torch.randn(vocabulary).to(DEVICE, dtype) if bias else None]
    return Pair(tensors, mask, {"temperature": temperature, **HEADS[head]})


def call(op: Callable, pair: Pair, leaves, **more) -> Tensor:
    p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias = leaves
    if pair.divergence is not None:
        named = {n.replace("p_", "").replace("q_", "other_"): v for n, v in pair.options.items()}
        return op(
            p_hidden, p_weight, q_hidden, q_weight, bias=p_bias, other_bias=q_bias, mask=pair.mask,
            **named, **pair.divergence, **more,
        )  # fmt: skip
    return op(
        p_hidden, p_weight, q_hidden, q_weight, p_bias=p_bias, q_bias=q_bias, mask=pair.mask,
        **pair.options, **more,
    )  # fmt: skip


def naive(pair: Pair, leaves, dtype: torch.dtype) -> Tensor:
    """From both heads' logits over all tokens; from zeros where the mask is false."""
    logits = []
    for side, (hidden, *rest) in {"p": leaves[:3], "q": leaves[3:]}.items():
        hidden, *rest = (t if t is None else t.to(dtype) for t in (hidden, *rest))
        if pair.mask is not None:
            hidden = torch.where(pair.mask.unsqueeze(-1), hidden, 0.0)
        given = {n: pair.options.get(f"{side}_{n}") for n in ("softcap", "logit_scale")}
        given = {n: value for n, value in given.items() if value is not None}
        logits.append(naive_logits(hidden, *rest, **given))
    given = {"temperature": pair.options["temperature"], "mask": pair.mask}
    if pair.divergence is not None:
        return categorical_divergence(*logits, **pair.divergence, **given)
    return categorical_kl(*logits, **given)


def check_pair(
    op: Callable, pair: Pair, *, backend: str, needs=ALL, upstream: float = 1.0, **more
) -> None:
    """Judges the KL and, for a random gradient arriving at it, those of what `needs` says."""
    dtypes = [arithmetic(t)[0] for t in (pair.tensors[0], pair.tensors[3])]
    wide = max(dtypes, key=lambda dtype: dtype.itemsize)
    eps = max(arithmetic(t)[1] for t in (pair.tensors[0], pair.tensors[3]))
    if backend == "triton":
        eps = max(eps, EPS32)  # the temperature is float32 there
    mine, eager_leaves = pair.leaves(needs), pair.leaves(needs)
    oracle_leaves = pair.leaves(needs, torch.float64)
    actual = call(op, pair, mine, backend=backend, **more)
    eager, truth = naive(pair, eager_leaves, wide), naive(pair, oracle_leaves, torch.float64)
    assert actual.dtype == wide, "the KL is float32 (float64 of float64)"
    assert_no_worse_than_eager(actual, eager, truth, name="KL", eps=eps, scale=1.0)
    assert not (actual < 0).any(), "a KL below 0"
    dkl = torch.randn(actual.shape, device=DEVICE).mul(upstream)
    dkl.view(-1)[2::4] = 0
    gradients = [
        torch.autograd.grad(kl, [t for t in leaves if t is not None and t.requires_grad], g)
        for kl, leaves, g in (
            (actual, mine, dkl.to(wide)),
            (eager, eager_leaves, dkl.to(wide)),
            (truth, oracle_leaves, dkl.double()),
        )
        if any(needs)
    ]
    asked = [n for n, t in zip(NAMES, mine, strict=True) if t is not None and t.requires_grad]
    for name, *three in zip(asked, *gradients, strict=True):
        leaf = mine[NAMES.index(name)]
        assert three[0].dtype == leaf.dtype and three[0].shape == leaf.shape
        rounding = max(eps, ROUNDING.get(leaf.dtype, 0.0))
        factor = 2.0 if upstream != 1.0 else None
        assert_no_worse_than_eager(*three, name=f"d{name}", eps=rounding, factor=factor)
        if pair.mask is not None and name.endswith("hidden"):
            assert not three[0][~pair.mask].any(), "a masked row of hidden has a gradient"


def token_bytes(pair: Pair) -> int:
    """What a token's logits and gradients take at most."""
    return 2 * 12 * pair.vocabulary


HIDDEN_ALONE = (True, False, False, True, False, False)


def pair_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    """What every wrong implementation trips over."""

    def check(pair: Pair, tokens: int | None = None, **more):
        budget = None if tokens is None else tokens * token_bytes(pair)
        return partial(check_pair, op, pair, backend=backend, chunk_bytes=budget, **more)

    for head in HEADS:
        yield check(make_pair(head=head), 3)
        yield check(make_pair(head=head, dtypes=(torch.float32,) * 2))
        yield check(make_pair(head=head), 3, needs=HIDDEN_ALONE)
    half = make_pair(dtypes=(torch.float16,) * 2, widths=(8, 8), head="unlike")
    yield check(half, 3, upstream=2e-5)
    yield check(half, 3, upstream=1e4)
