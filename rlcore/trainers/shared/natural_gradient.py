"""The natural gradient of a policy: products with its Fisher matrix, and the step they lead to.

    F = mean over tokens of J^T (diag(p) - p p^T) J / T^2,    J = d logits / d theta
    step = sqrt(2 delta / s^T F s) s,    (F + damping I) s = g

(TRPO: Schulman et al. 2015, arXiv:1502.05477, appendix C.) A product F v is a forward pass on dual
numbers (J v), `rl.fisher_vector_product` in the logits, and a backward pass (J^T), a micro-batch at
a time. Vectors are lists of tensors, one a parameter: nothing is ever flattened. They are float32
where the weights are narrower, as conjugate gradient would lose its way in bfloat16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import rlcore as rl
from rlcore.errors import reason_of

Vector = list[Tensor]


class Tokens(Protocol):
    """A micro-batch of sampled completions; `advantage` may be (B,), one a completion."""

    mask: Tensor  # (B, C) bool: the tokens that count
    target: Tensor  # (B, C) int64
    advantage: Tensor  # (B,) or (B, C)


def _as_it_is(totals: Vector) -> Vector:
    return totals


@dataclass(frozen=True)
class Policy:
    """A softmax policy, and those of its parameters that move."""

    model: torch.nn.Module  # a micro-batch -> (B, C, V) logits of its tokens
    parameters: Mapping[str, torch.nn.Parameter]  # by their names in the model
    temperature: float = 1.0  # divides the logits
    # sums of this process -> sums of all processes
    reduce: Callable[[Vector], Vector] = _as_it_is

    def logits(self, batch: Tokens, others: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, V); with `others` in the place of the parameters called so."""
        if others is None:
            return self.model(batch)
        return functional_call(self.model, dict(others), (batch,))

    def named(self, vector: Sequence[Tensor]) -> dict[str, Tensor]:
        """The vector's tensors by the names of the parameters."""
        return dict(zip(self.parameters, vector, strict=True))

    def zeros(self) -> Vector:
        """A vector of zeros."""
        return [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in self.parameters.values()
        ]

    def tangent(self, batch: Tokens, vector: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits, J v), each (B, C, V), in one forward pass that keeps no activations."""
        # the fused attention kernels know no forward derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(parameter.detach(), part.to(parameter.dtype))
                for (name, parameter), part in zip(self.parameters.items(), vector, strict=True)
            }
            logits, tangent = forward_ad.unpack_dual(self.logits(batch, duals))
        return logits, torch.zeros_like(logits) if tangent is None else tangent


@dataclass(frozen=True)
class Fisher:
    """v -> F v, F the Fisher matrix of a policy averaged over the counted tokens of `batches`."""

    policy: Policy
    batches: Sequence[Tokens]  # this process's
    count: float  # counted tokens of all processes

    def __call__(self, vector: Sequence[Tensor]) -> Vector:
        """F v, like v."""
        parameters = list(self.policy.parameters.values())
        total = self.policy.zeros()
        for batch in self.batches:
            product = self._logit_product(batch, vector)
            logits = self.policy.logits(batch)
            parts = torch.autograd.grad(logits, parameters, product, allow_unused=True)
            for part, addend in zip(total, parts, strict=True):
                if addend is not None:
                    part += addend
            del parts, addend  # the next micro-batch's need their room
        return self.policy.reduce(total)

    def _logit_product(self, batch: Tokens, vector: Sequence[Tensor]) -> Tensor:
        """(B, C, V): (diag(p) - p p^T) J v / T^2 / count, 0 for tokens that do not count."""
        logits, tangent = self.policy.tangent(batch, vector)
        tangent = torch.where(batch.mask[..., None], tangent, 0.0) / self.count
        return rl.fisher_vector_product(logits, tangent, temperature=self.policy.temperature)


class NaturalStep(NamedTuple):
    """What `natural_step` returns."""

    step: Vector  # to be added to the parameters
    expected: float  # g^T step: the improvement, to first order
    residual: float  # |g - (F + damping I) s| / |g|, as conjugate gradient keeps it
    iterations: int  # of conjugate gradient


def natural_step(
    gradient: Vector,
    fisher: Callable[[Vector], Vector],
    whole_fisher: Callable[[Vector], Vector],
    *,
    delta: float,
    damping: float,
    max_iter: int,
    tol: float = 1e-10,
) -> NaturalStep:
    """The step along the natural gradient at whose end the quadratic KL is `delta`.

    Args:
        gradient: g, of what is to rise.
        fisher: v -> F v for the direction s, over a part of the data, say.
        whole_fisher: the same for the length sqrt(2 delta / s^T F s), over all of it.
        delta: the KL; positive.
        damping, max_iter, tol: of `rl.conjugate_gradient`.

    Returns:
        A NaturalStep; one of zeros where the gradient is 0, or the KL does not change along s.
    """
    solution = rl.conjugate_gradient(fisher, gradient, max_iter=max_iter, tol=tol, damping=damping)
    curvature = dot(solution.x, whole_fisher(solution.x))
    scale = math.sqrt(2 * delta / curvature) if curvature > 0 else 0.0
    size = math.sqrt(dot(gradient, gradient))
    return NaturalStep(
        [scale * part for part in solution.x],
        scale * dot(gradient, solution.x),
        float(solution.residual) / size if size else 0.0,
        int(solution.iterations),
    )


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The inner product of two vectors, summed in float64."""
    return sum(float((a * b).double().sum()) for a, b in zip(left, right, strict=True))


def search_step(
    policy: Policy,
    step: Sequence[Tensor],
    batches: Sequence[Tokens],
    count: float,
    *,
    delta: float,
    shrink: float,
    max_trials: int,
) -> rl.LineSearch:
    """Move the parameters by as much of `step` as improves within the trust region.

    Over the counted tokens of `batches`: the surrogate must rise, and the exact KL(old || new) be
    at most `delta`. Where no trial does both, the parameters are what they were, bit for bit.
    """
    with _old_parameters(policy) as (old, keep):

        def evaluate(size: float) -> tuple[float, float]:
            with torch.no_grad():
                for parameter, start, part in zip(
                    policy.parameters.values(), old, step, strict=True
                ):
                    torch.add(start, part, alpha=size, out=parameter.data)
            return improvement_and_kl(policy, policy.named(old), batches, count)

        search = rl.line_search(evaluate, delta=delta, shrink=shrink, max_trials=max_trials)
        if search.step is not None:
            keep()
    return search


@contextlib.contextmanager
def _old_parameters(policy: Policy) -> Iterator[tuple[Vector, Callable[[], None]]]:
    """(copies of the parameters, keep): without a call of `keep` they come back at the end."""
    old = [parameter.detach().clone() for parameter in policy.parameters.values()]
    kept: list[bool] = []
    try:
        yield old, lambda: kept.append(True)
    finally:
        if not kept:
            for parameter, start in zip(policy.parameters.values(), old, strict=True):
                parameter.data.copy_(start)


@torch.no_grad()
def improvement_and_kl(
    policy: Policy, old: Mapping[str, Tensor], batches: Sequence[Tokens], count: float
) -> tuple[float, float]:
    """(mean of (ratio - 1) A, mean KL(old || new)) of the counted tokens: both 0 at `old`.

    The old logits are computed anew beside the new ones: those of a whole batch may not fit.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=next(iter(old.values())).device)
    for batch in batches:
        logits, old_logits = policy.logits(batch), policy.logits(batch, old)
        options = {"mask": batch.mask, "temperature": policy.temperature}
        logp, old_logp = (
            rl.token_logprob(z, batch.target, entropy=False, **options).logp
            for z in (logits, old_logits)
        )
        advantage = batch.advantage if batch.advantage.dim() == 2 else batch.advantage[:, None]
        gain = torch.where(batch.mask, torch.expm1(logp - old_logp) * advantage, 0.0)
        kl = rl.categorical_kl(old_logits, logits, **options)
        sums += torch.stack([gain.double().sum(), kl.double().sum()])
    improvement, kl = (policy.reduce([sums])[0] / count).tolist()
    return improvement, kl


def supports_forward_ad(policy: Policy, batch: Any) -> str | None:
    """Why the model has no forward derivative on `batch`; None where it has one."""
    try:
        policy.tangent(batch, policy.zeros())
    except (RuntimeError, NotImplementedError) as error:
        return reason_of(error)
    return None
