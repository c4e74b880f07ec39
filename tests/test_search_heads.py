"""A random search of the fused heads: shapes, budgets, dtypes, magnitudes, options; by float64.

The seed of a case makes its tensors; what hypothesis draws and shrinks is their shape and kind.
RLCORE_SEARCH makes it longer: see helpers/search.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.cases import RATIOS
from helpers.distributions import categorical_kl
from helpers.heads import ROUNDING
from helpers.judge import EPS32, assert_no_worse_than_eager, rms
from helpers.search import DTYPES, search
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlcore as rl

SIZES = st.integers(1, 9)
MAGNITUDES = st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.0, 4.0, 30.0])
HEADS = st.fixed_dictionaries(
    {"logit_scale": st.sampled_from([1.0, 0.05, 3.0])},
    optional={"softcap": st.sampled_from([0.5, 5.0, 30.0])},
)
TEMPERATURES = st.sampled_from([1.0, 0.4, 2.5])
EPS64 = 64 * torch.finfo(torch.float64).eps


class Case:
    """One head's tensors, in one dtype or a mixture, its form, a mask and a budget."""

    def __init__(self, draw, leading: tuple[int, ...], vocabulary: int):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        self.leading, self.hidden_size = leading, draw(SIZES)
        dtype = draw(st.sampled_from(DTYPES))
        mixed = draw(st.booleans()) and draw(st.booleans())
        dtypes = draw(st.tuples(*[st.sampled_from(DTYPES)] * 3)) if mixed else (dtype,) * 3
        width = draw(MAGNITUDES) / self.hidden_size**0.5
        made = [torch.randn(*leading, self.hidden_size), torch.randn(vocabulary, self.hidden_size)]
        made = [made[0], made[1] * width] + [torch.randn(vocabulary)] * draw(st.booleans())
        self.tensors = [t.to(d) for t, d in zip(made, dtypes, strict=False)]
        self.needs = draw(st.sampled_from([(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0)]))
        self.needs = [bool(n) for n in self.needs[: len(made)]]
        if not any(self.needs):
            self.needs[0] = True
        self.head, self.temperature = draw(HEADS), draw(TEMPERATURES)
        tokens = math.prod(leading)
        self.mask = torch.rand(leading) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        self.tensors[0][~self.mask] = torch.nan
        # from less than a token's to more than all tokens' logits and gradients
        row = vocabulary * draw(st.sampled_from([4, 6, 8, 12]))
        self.chunk_bytes = draw(st.none() | st.integers(0, (tokens + 2) * row))

    @property
    def product(self) -> torch.dtype:
        return torch.promote_types(self.tensors[0].dtype, self.tensors[1].dtype)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [
            t.detach().clone().to(dtype or t.dtype).requires_grad_(need)
            for t, need in zip(self.tensors, self.needs, strict=True)
        ]

    def logits(self, leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(the head's logits, hidden W^T + bias), of zeros where the mask is false."""
        hidden, weight, *bias = (leaf.to(dtype) for leaf in leaves)
        s = torch.where(self.mask[..., None], hidden, 0.0) @ weight.T
        s = s + bias[0] if bias else s
        s = s if s.requires_grad else s.requires_grad_()
        s.retain_grad()
        z = s * self.head["logit_scale"]
        cap = self.head.get("softcap")
        return (z if cap is None else cap * torch.tanh(z / cap)), s

    def options(self, leaves: list[Tensor]) -> dict:
        bias = {"bias": leaves[2]} if len(leaves) > 2 else {}
        return bias | self.head | {"temperature": self.temperature, "chunk_bytes": self.chunk_bytes}

    def terms(self, ds: Tensor) -> list[float]:
        """RMS of what each gradient sums up, without regard to signs: the scale of its rounding."""
        hidden, weight = (t.double().abs() for t in self.tensors[:2])
        hidden = torch.where(self.mask[..., None], hidden, 0.0).flatten(0, -2)
        ds = ds.double().abs().flatten(0, -2)
        return [rms(ds @ weight), rms(ds.T @ hidden), rms(ds.sum(0))]

    def judge(self, run, naive, upstream: Tensor | None = None, size: float = 1.0) -> None:
        """Holds values and gradients of run(leaves) against those of naive(logits, dtype).

        Both return the differentiable result and a list of values; the naive ones are those of
        `eager`, in the arithmetic of the head, and of float64. Results are known to no better than
        the largest logit, or `size` where that is larger, allows.
        """
        wide = torch.float64 if self.product == torch.float64 else torch.float32
        eps = EPS64 if wide == torch.float64 else EPS32
        mine, eager_leaves, true_leaves = self.leaves(), self.leaves(), self.leaves(torch.float64)
        result, values = run(mine)
        z, _ = self.logits(eager_leaves, wide)
        eager, eager_values = naive(z, wide)
        z, true_s = self.logits(true_leaves, torch.float64)
        truth, true_values = naive(z, torch.float64)
        steep = max(self.head["logit_scale"], 1.0) / min(self.temperature, 1.0)
        size = max(1.0, size, steep * true_s.detach().abs().max().item())
        for i, three in enumerate(zip(values, eager_values, true_values, strict=True)):
            if three[0] is not None:
                judged = {"eps": eps * size, "scale": 1.0}
                assert_no_worse_than_eager(*three, name=f"value {i}", **judged)
        if upstream is None:
            upstream = torch.ones(())
        totals = [(x * upstream.to(x.dtype)).sum() for x in (result, eager, truth)]
        if not totals[2].requires_grad:
            return
        totals[2].backward(retain_graph=True)
        # of less, as of a vocabulary of 1, the truth itself is rounding
        terms = [max(size_of_terms, 1e-12) for size_of_terms in self.terms(true_s.grad)]
        found, shaky = [], 0.0
        for i, need in enumerate(self.needs):
            if not need:
                continue
            (want,) = torch.autograd.grad(totals[2], true_leaves[i], retain_graph=True)
            # as a loss scaler does: float16 leaves would round small gradients to 0
            scale = 2.0 ** -math.floor(math.log2(terms[i]))
            gradients = [
                torch.autograd.grad(total * scale, leaf, retain_graph=True)[0]
                for total, leaf in ((totals[0], mine[i]), (totals[1], eager_leaves[i]))
            ]
            assert gradients[0].dtype == mine[i].dtype
            found.append((i, scale, [*gradients, want * scale]))
            # one gradient of the eager way may be lucky, where another shows what can be known
            if wide == eager_leaves[i].dtype:
                error = rms(gradients[1].double() - want * scale)
                shaky = max(shaky, error / max(rms(want * scale), terms[i] * scale))
        for i, scale, three in found:
            rounding = max(
                eps * size,
                shaky / 4,
                *(ROUNDING.get(t, 0.0) for t in (self.product, mine[i].dtype)),
            )
            assert_no_worse_than_eager(
                *three, name=f"d{('hidden', 'weight', 'bias')[i]}",
                eps=rounding, scale=terms[i] * scale, factor=2.0,
            )  # fmt: skip


def counted(case: Case, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return oracle.token_logprob(logits, target, temperature=case.temperature, mask=case.mask)


@st.composite
def cases(draw, leading: st.SearchStrategy = SIZES) -> Case:
    shape = draw(st.tuples(leading) | st.tuples(st.integers(1, 3), st.integers(1, 4)))
    return Case(draw, shape, draw(st.integers(1, 12)))


@search(100)
@given(case=cases(), entropy=st.booleans(), data=st.data())
def test_linear_token_logprob_is_the_oracles(case, entropy, data):
    target = torch.randint(len(case.tensors[1]), case.leading)
    factors = torch.randn(3, *case.leading) * (torch.rand(3, *case.leading) < 0.7)
    asked = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True))
    asked = [i for i in asked if entropy or i != 1] or [0]

    def combined(statistics):
        return sum((statistics[i] * factors[i].to(statistics[i].dtype)).sum() for i in asked)

    def run(leaves):
        out = rl.linear_token_logprob(
            *leaves[:2], target, mask=case.mask, entropy=entropy, **case.options(leaves)
        )
        return combined(out), list(out)

    def naive(logits, dtype):
        out = counted(case, logits, target)
        return combined(out), list(out)

    case.judge(run, naive)


POLICIES = st.fixed_dictionaries(
    {
        "surrogate": st.sampled_from(["reinforce", "ppo_clip", "ppo_clip", "cispo"]),
        "entropy_coef": st.sampled_from([0.0, 0.0, 0.02, 3.0]),
        "beta": st.sampled_from([0.0, 0.1, 30.0]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "num_items": st.sampled_from([None, 1, 7, 1e6, 1e-5]),
    }
)


@search(160)
@given(case=cases(), options=POLICIES, sequence=st.booleans(), size=st.sampled_from([1, 1, 7e4]))
def test_linear_policy_loss_is_the_oracles(case, options, sequence, size):
    target = torch.randint(len(case.tensors[1]), case.leading)
    with torch.no_grad():
        logits, _ = case.logits(case.leaves(torch.float64), torch.float64)
    logp = counted(case, logits, target)[0]
    options = dict(options)
    index = torch.randint(8, case.leading)
    if options["surrogate"] != "reinforce":
        options["old_logp"] = logp - RATIOS[index].log()
    if options["surrogate"] == "ppo_clip" and sequence and len(case.leading) == 2:
        options["importance_sampling_level"] = "sequence"
    options["ref_logp"] = logp + 0.5 * torch.randn(case.leading)
    if case.product != torch.float64:
        options |= {k: v.float() for k, v in options.items() if isinstance(v, Tensor)}
    advantage = torch.randn(case.leading) * size

    def run(leaves):
        out = rl.linear_policy_loss(
            *leaves[:2], target, advantage, mask=case.mask, **case.options(leaves), **options
        )
        return out.loss, [out.logp, out.entropy, out.kl]

    def naive(logits, dtype):
        loss, logp, entropy, kl, _ = oracle.policy_loss(
            logits, target, advantage, mask=case.mask, temperature=case.temperature, **options
        )
        return loss, [logp, entropy, kl]

    case.judge(run, naive)


@st.composite
def pair_cases(draw) -> Case:
    shape = (2 * draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    case = Case(draw, shape, draw(st.integers(1, 12)))
    hidden = case.tensors[0]
    # an answer has a token at least
    case.mask[:, 0] = True
    hidden[:, 0] = torch.randn(shape[0], case.hidden_size).to(hidden.dtype)
    return case


@search(80)
@given(
    case=pair_cases(),
    loss_type=st.sampled_from(["sigmoid", "ipo", "hinge", "simpo"]),
    num_items=st.sampled_from([None, 3, 1e6]),
    beta=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_linear_preference_loss_is_the_oracles(case, loss_type, num_items, beta):
    target = torch.randint(len(case.tensors[1]), case.leading)
    with torch.no_grad():
        logits, _ = case.logits(case.leaves(torch.float64), torch.float64)
    sums = counted(case, logits, target)[0].sum(1)
    ref_logp = None if loss_type == "simpo" else sums + torch.randn(len(sums))
    if ref_logp is not None and case.product != torch.float64:
        ref_logp = ref_logp.float()

    def run(leaves):
        out = rl.linear_preference_loss(
            *leaves[:2], target, case.mask, ref_logp, loss_type=loss_type, beta=beta,
            num_items=num_items, **case.options(leaves),
        )  # fmt: skip
        return out.loss, [torch.cat([out.chosen_logp, out.rejected_logp])]

    def naive(logits, dtype):
        logp = counted(case, logits, target)[0]
        sums = logp.sum(1)
        if loss_type == "simpo":
            chosen, rejected = (sums / case.mask.sum(1)).chunk(2)
            margin = chosen - rejected - 0.5 / beta
        else:
            chosen, rejected = (sums - ref_logp.to(dtype)).chunk(2)
            margin = chosen - rejected
        per_pair = {
            "sigmoid": lambda: -torch.nn.functional.logsigmoid(beta * margin),
            "simpo": lambda: -torch.nn.functional.logsigmoid(beta * margin),
            "hinge": lambda: torch.relu(1 - beta * margin),
            "ipo": lambda: (margin - 1 / (2 * beta)).square(),
        }[loss_type]()
        items = len(per_pair) if num_items is None else num_items
        return per_pair.sum() / items, [sums]

    case.judge(run, naive)


@search(80)
@given(case=cases(), other_size=SIZES, data=st.data())
def test_linear_categorical_kl_is_the_oracles(case, other_size, data):
    other = Case(data.draw, case.leading, len(case.tensors[1]))
    other.mask, other.temperature = case.mask, case.temperature
    other.tensors[0].nan_to_num_()
    if case.product != other.product:
        other.tensors = [t.to(case.product) for t in other.tensors]
        case.tensors = [t.to(case.product) for t in case.tensors]
    with torch.no_grad():
        q_logits, _ = other.logits(other.leaves(torch.float64), torch.float64)
    upstream = torch.randn(case.leading) * (torch.rand(case.leading) < 0.7)

    def run(leaves):
        p, q = case.options(leaves), other.options(other.tensors)
        shared = {name: p.pop(name) for name in ("temperature", "chunk_bytes")}
        sides = {f"p_{k}": v for k, v in p.items()}
        sides |= {f"q_{k}": v for k, v in q.items() if k not in shared}
        kl = rl.linear_categorical_kl(
            *leaves[:2], *other.tensors[:2], mask=case.mask, **shared, **sides
        )
        return kl, [kl]

    def naive(logits, dtype):
        kl = categorical_kl(
            logits, q_logits.to(logits.dtype), temperature=case.temperature, mask=case.mask
        )
        return kl, [kl]

    with torch.no_grad():
        least = naive(case.logits(case.leaves(torch.float64), torch.float64)[0], None)[0]
    # log p - log q is about the root of the KL, and what is left of two logits
    left = least[case.mask].clamp(1e-16, 1).min().sqrt().item() if case.mask.any() else 1.0
    logit = 3 + q_logits.abs().max().item() / case.temperature
    case.judge(run, naive, upstream, logit / left)


def test_the_judge_of_the_search_refuses_a_gradient_that_lost_a_token():
    """A search that accepts all proves nothing."""
    case = Case.__new__(Case)
    torch.manual_seed(0)
    case.leading, case.hidden_size, case.temperature, case.chunk_bytes = (5,), 3, 1.0, None
    case.tensors = [torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)]
    case.needs, case.head, case.mask = [True] * 3, {"logit_scale": 1.0}, torch.ones(5).bool()
    target = torch.randint(7, (5,))

    def run(leaves, lost=0):
        out = rl.linear_token_logprob(*leaves[:2], target, **case.options(leaves))
        return out.logp[lost:], list(out)

    def naive(logits, dtype):
        out = counted(case, logits, target)
        return out[0], list(out)

    case.judge(run, naive)
    with pytest.raises(AssertionError, match="dhidden: RMS error"):
        case.judge(lambda leaves: run(leaves, lost=1), naive)
