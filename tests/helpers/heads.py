"""Inputs, assertions and batteries of the fused head: a naive head before the oracle's losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers import DEVICE, oracle
from helpers.cases import policy_inputs
from helpers.checks import arithmetic, on
from helpers.judge import EPS32, assert_no_worse_than_eager

ALL = ("old_logp", "ref_logp", "importance_sampling_ratio", "mask")
GEMMA = {"softcap": 2.0, "logit_scale": 0.7}
# Rounding of a gradient of that dtype, and of the logits' gradient that its products read.
ROUNDING = {torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}


def naive_logits(hidden, weight, bias=None, *, softcap=None, logit_scale=1.0) -> Tensor:
    """The head as its definition reads, over all tokens."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclass
class HeadInputs:
    """Arguments of `linear_policy_loss`: the head's (`head`) and the loss's (`options`)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    advantage: Tensor
    head: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> HeadInputs:
        moved = {k: on(device, v) for k, v in vars(self).items() if k not in ("head", "options")}
        options = {k: on(device, v) for k, v in self.options.items()}
        return HeadInputs(**moved, head=self.head, options=options)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """hidden, weight and, where there is one, bias: differentiable, in `dtype`."""
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def head_inputs(
    shape: tuple[int, ...],
    *names: str,
    hidden_size: int = 9,
    vocabulary: int = 37,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    masked: float = 0.3,
    head: dict[str, float] | None = None,
    **options,
) -> HeadInputs:
    """Inputs with tokens of leading `shape`; hidden rows are NaN where the mask is false."""
    hidden = torch.randn(*shape, hidden_size).to(dtype)
    weight = torch.randn(vocabulary, hidden_size).mul(2 / hidden_size**0.5).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if bias else None
    head = head or {}
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    made = policy_inputs(naive_logits(*wide, **head), *names, masked=masked, **options)
    if "mask" in made.options:
        hidden[~made.options["mask"]] = float("nan")
    return HeadInputs(hidden, weight, bias, made.target, made.advantage, head, made.options)


def _naive(inputs: HeadInputs, leaves: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Logits from zeros where the mask is false, as NaN there would spoil the naive dweight."""
    hidden, *rest = (leaf.to(dtype) for leaf in leaves)
    mask = inputs.options.get("mask")
    if mask is not None:
        hidden = torch.where(mask.unsqueeze(-1), hidden, torch.zeros_like(hidden))
    return naive_logits(hidden, *rest, **inputs.head)


def _judge_gradients(
    inputs: HeadInputs, backend: str, actual, eager, truth, factor: float | None = None
) -> None:
    eps = ROUNDING.get(inputs.hidden.dtype, arithmetic(inputs.hidden)[1])
    if backend == "triton":
        eps = max(eps, EPS32)
    for name, *three in zip(("hidden", "weight", "bias"), actual, eager, truth, strict=False):
        assert three[0].dtype == inputs.hidden.dtype
        assert_no_worse_than_eager(*three, name=f"d{name}", eps=eps, factor=factor)
    mask = inputs.options.get("mask")
    if mask is not None:
        assert not actual[0][~mask].any(), "a masked row of hidden has a gradient"


def check_linear_policy_loss(
    op: Callable, inputs: HeadInputs, *, backend: str, upstream: float = 1.0, **more
) -> None:
    """Judges loss, statistics and the gradients of hidden, weight and bias."""
    inputs = inputs.to(DEVICE)
    dtype, eps = arithmetic(inputs.hidden)
    if backend == "triton":
        eps = max(eps, EPS32)  # its hyperparameters are float32 whatever the logits are
    mine, eager_leaves, oracle_leaves = (
        inputs.leaves(),
        inputs.leaves(),
        inputs.leaves(torch.float64),
    )
    given = {"bias": mine[2]} if inputs.bias is not None else {}
    tokens = (inputs.target, inputs.advantage)
    actual = op(
        *mine[:2], *tokens, backend=backend, **given, **inputs.head, **inputs.options, **more
    )
    eager = oracle.policy_loss(_naive(inputs, eager_leaves, dtype), *tokens, **inputs.options)
    truth = oracle.policy_loss(
        _naive(inputs, oracle_leaves, torch.float64), *tokens, **inputs.options
    )
    for name, want_eager, want in zip(
        ("loss", "logp", "entropy", "kl"), eager, truth, strict=False
    ):
        got = getattr(actual, name)
        assert (got is None) == (want is None)
        if got is not None:
            assert_no_worse_than_eager(got, want_eager, want, name=name, eps=eps, scale=1.0)
    assert torch.equal(actual.clipped, truth[4]), "clipped differs"
    gradients = [
        torch.autograd.grad(loss * upstream, leaves)
        for loss, leaves in (
            (actual.loss, mine),
            (eager[0], eager_leaves),
            (truth[0], oracle_leaves),
        )
    ]
    _judge_gradients(inputs, backend, *gradients, factor=None if upstream == 1 else 2.0)


def check_linear_token_logprob(
    op: Callable, inputs: HeadInputs, *, backend: str, entropy: bool = True, frozen=False, **more
) -> None:
    """Judges the statistics and, for gradients arriving at all of them, those of the inputs."""
    inputs = inputs.to(DEVICE)
    dtype, eps = arithmetic(inputs.hidden)
    mask, temperature = inputs.options.get("mask"), inputs.options.get("temperature", 1.0)
    shared = {"mask": mask, "temperature": temperature}
    asked = [0, 1, 2] if entropy else [0, 2]
    upstream = [g for i, g in enumerate(torch.randn(3, *inputs.target.shape)) if i in asked]
    # some tokens are reached by the entropy's gradient alone
    for g in (upstream[0], upstream[-1]):
        g.view(-1)[2::3] = 0
    gradients, statistics = [], []
    for precision in (None, dtype, torch.float64):
        leaves = inputs.leaves(torch.float64 if precision == torch.float64 else None)
        if frozen:
            leaves = [leaves[0], *(leaf.detach() for leaf in leaves[1:])]
        if precision is None:
            given = {"bias": leaves[2]} if inputs.bias is not None else {}
            every = op(
                *leaves[:2], inputs.target, backend=backend, entropy=entropy, **given,
                **inputs.head, **shared, **more,
            )  # fmt: skip
            assert (every.entropy is not None) == entropy
        else:
            every = oracle.token_logprob(_naive(inputs, leaves, precision), inputs.target, **shared)
        chosen = [every[i] for i in asked]
        given_upstream = [g.to(DEVICE, chosen[0].dtype) for g in upstream]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients.append(torch.autograd.grad(chosen, wanted, given_upstream))
        statistics.append(chosen)
    for i, three in enumerate(zip(*statistics, strict=True)):
        name = ("logp", "entropy", "lse")[asked[i]]
        assert_no_worse_than_eager(*three, name=name, eps=eps, scale=1.0)
    _judge_gradients(inputs, backend, *gradients)


def row_bytes(inputs: HeadInputs) -> int:
    """What a token's logits and gradient take at most, so that k of it make chunks of k tokens."""
    return inputs.weight.shape[0] * 12


def budget_cases(
    backend: str, tokens: int = 17, vocabulary: int = 5
) -> Iterator[tuple[tuple[str, ...], torch.dtype, int]]:
    """(optional tensors, dtype, chunk_bytes) of a low-precision head with a hidden size of 1.

    From one token's logits and gradients to all tokens', so that chunks of every size meet every
    remainder of what stands in dweight's memory, what stands behind it, and what is made again.
    """
    count = 8 if backend == "torch" else 1
    for dtype in (torch.bfloat16, torch.float16):
        for names in ((), ("mask",), ("old_logp",)):
            for budget in torch.randint(1, tokens, (count,)).tolist():
                yield names, dtype, budget * vocabulary * 6


def linear_policy_loss_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(inputs: HeadInputs, **more):
        return partial(check_linear_policy_loss, op, inputs, backend=backend, **more)

    whole = head_inputs((19,), *ALL, bias=True, head=GEMMA, beta=0.1, entropy_coef=0.02,
                        temperature=1.3, delta=1.5)  # fmt: skip
    # these keep the gradients of their KL and their bonus
    whole.advantage[::3] = 0
    yield check(whole, chunk_bytes=4 * 37 * 4)
    yield check(head_inputs((19,), "old_logp", bias=True, head={"logit_scale": 0.3}), upstream=1.7,
                chunk_bytes=4 * 37 * 4)  # fmt: skip
    yield check(head_inputs((3, 6), "old_logp", "mask", temperature=0.6), chunk_bytes=5 * 37 * 4)
    yield check(head_inputs((3, 6), "mask", surrogate="reinforce", head=GEMMA), chunk_bytes=1)
    # in low precision: some gradients fit dweight's memory, others stand behind it, others neither
    for dtype, rows in ((torch.bfloat16, 4), (torch.bfloat16, 30), (torch.float16, 4)):
        low = head_inputs((41,), *ALL, dtype=dtype, bias=True, head=GEMMA, beta=0.1,
                          entropy_coef=0.5, temperature=1.3)  # fmt: skip
        yield check(low, chunk_bytes=rows * 37 * 6)
    plain = head_inputs((31,), "old_logp", dtype=torch.bfloat16, masked=0)
    plain.advantage[::3] = 0
    yield check(plain, chunk_bytes=8 * 37 * 6)
    for names, dtype, budget in budget_cases(backend):
        any_budget = head_inputs((17,), *names, dtype=dtype, bias=True, hidden_size=1, vocabulary=5)
        yield check(any_budget, chunk_bytes=budget)
    small = head_inputs((7,), dtype=torch.float16, surrogate="reinforce", num_items=2e7)
    yield check(small, upstream=65536.0)


def linear_token_logprob_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(inputs: HeadInputs, **more):
        return partial(check_linear_token_logprob, op, inputs, backend=backend, **more)

    yield check(head_inputs((11,), "mask", bias=True, head=GEMMA, temperature=1.3))
    yield check(head_inputs((11,), "mask", bias=True, head=GEMMA, temperature=0.7), chunk_bytes=600)
    yield check(head_inputs((2, 5), head={"logit_scale": 0.4}, bias=True), chunk_bytes=600)
    low = head_inputs((9,), "mask", bias=True, head=GEMMA, temperature=0.7, dtype=torch.bfloat16)
    yield check(low, chunk_bytes=900)
    for names, dtype, budget in budget_cases(backend):
        any_budget = head_inputs((17,), *names, dtype=dtype, bias=True, hidden_size=1, vocabulary=5)
        yield check(any_budget, chunk_bytes=budget)
    for head in (GEMMA, {"logit_scale": 0.4}):
        frozen = head_inputs((11,), "mask", bias=True, head=head, temperature=1.3)
        yield check(frozen, frozen=True, entropy=False, chunk_bytes=600)


HEAD_BATTERIES = {
    "linear_policy_loss": linear_policy_loss_checks,
    "linear_token_logprob": linear_token_logprob_checks,
}
