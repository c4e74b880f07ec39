"""The operations: their inputs, their formula in plain PyTorch, and the least work they can be.

A formula in float64 is the truth that every contestant is held to; at the case's own dtype it is
the contestant "eager". Tensors among the inputs have a token (or row) dimension first, but those
that the operation names in `shared`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlcore.bench.cases import Case

Inputs = dict[str, Any]
EPSILON, GAMMA, LAM, BETA = 0.2, 1.0, 0.95, 0.1


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Args:
        make: inputs of a case, seeded, on the CPU or a GPU.
        formula: inputs -> outputs, in the order of `outputs`.
        outputs: their names; a name in `summed` is a scalar, a sum over tokens.
        leaves: inputs that get a gradient.
        shared: inputs without a token dimension, whose gradient is a sum over tokens.
        bytes: the fewest bytes that a case can move.
        products: the fewest floating-point operations of its matrix products.
        couples: rows that must stay together in a block; None = all rows.
    """

    make: Callable[[Case, torch.device], Inputs]
    formula: Callable[[Inputs], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    bytes: Callable[[Case], float]
    leaves: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    products: Callable[[Case], float] = lambda case: 0.0
    couples: Callable[[Case], int | None] = lambda case: 1


def itemsize(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize


def logit_passes(forward: float, backward: float) -> Callable[[Case], float]:
    """Bytes where the directions read or write the logits so many times."""
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return lambda case: passes[case.direction] * case.N * case.V * itemsize(case)


def _generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(shape, device, dtype="float32", scale=1.0, seed=0) -> Tensor:
    """Normal numbers made in blocks of rows: never a whole float32 copy of bfloat16 logits."""
    made = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    generator = _generator(device, seed)
    for block in made.view(shape[0], -1).split(64):
        noise = torch.randn(block.shape, generator=generator, device=device)
        block.copy_(noise.mul_(scale))
    return made


def _tokens(case: Case, device) -> Inputs:
    """Targets, log-probabilities of the old policy, and advantages constant over a sequence."""
    generator = _generator(device, 1)
    target = torch.randint(case.V, (case.N,), generator=generator, device=device)
    per_sequence = torch.randn(case.B, generator=generator, device=device)
    advantage = per_sequence.repeat_interleave(case.T)
    counts = torch.arange(case.T, device=device) < case.T - int(case.masked * case.T)
    return {"target": target, "advantage": advantage, "mask": counts.repeat(case.B)}


def _upstream(case: Case, device, *names: str) -> Inputs:
    """The gradients that arrive at per-token outputs."""
    values = torch.randn(len(names), case.N, generator=_generator(device, 2), device=device)
    return {f"d{name}": value for name, value in zip(names, values, strict=True)}


def _logits(*outputs: str) -> Callable[[Case, torch.device], Inputs]:
    def make(case: Case, device) -> Inputs:
        inputs = {"logits": _normal((case.N, case.V), device, case.dtype, 2.0)}
        inputs |= _tokens(case, device) | _upstream(case, device, *outputs)
        return inputs | _old_policy(case, device, inputs)

    return make


def _old_policy(case: Case, device, inputs: Inputs) -> Inputs:
    with torch.no_grad():
        parts = zip(inputs["logits"].split(64), inputs["target"].split(64), strict=True)
        logp = torch.cat([token_logp(logits.float(), target) for logits, target in parts])
    return {"old_logp": logp - policy_gap(case, device), "num_items": case.N, "T": case.T}


def policy_gap(case: Case, device) -> Tensor:
    """logp - old_logp (N,): one token in 16 beyond the clip, the others well inside it.

    None is near a bound, where rounding to bfloat16 would decide whether it has a gradient.
    """
    index = torch.arange(case.N, device=device)
    size = torch.where(index % 16 == 7, 0.5, 0.08)
    return torch.where(index % 32 < 16, size, -size)


def make_head(case: Case, device) -> Inputs:
    hidden = _normal((case.N, case.H), device, case.dtype)
    weight = _normal((case.V, case.H), device, case.dtype, 2.0 / case.H**0.5, seed=4)
    inputs = {"hidden": hidden, "weight": weight} | _tokens(case, device)
    with torch.no_grad():
        parts = zip(hidden.split(64), inputs["target"].split(64), strict=True)
        logp = torch.cat([token_logp(F.linear(h, weight).float(), t) for h, t in parts])
    noise = torch.randn(case.N, generator=_generator(device, 3), device=device)
    inputs |= {"old_logp": logp - policy_gap(case, device), "ref_logp": logp - 0.2 * noise}
    inputs |= {"num_items": case.counted, "T": case.T}
    return inputs | _upstream(case, device, "logp", "entropy")


def _pair(case: Case, device) -> Inputs:
    p, q = (_normal((case.N, case.V), device, case.dtype, 2.0, seed) for seed in (0, 5))
    return {"p_logits": p, "q_logits": q} | _upstream(case, device, "kl")


def _tangent(case: Case, device) -> Inputs:
    logits, tangent = (_normal((case.N, case.V), device, case.dtype, 1.0, s) for s in (0, 5))
    return {"logits": logits, "tangent": tangent}


def _episodes(case: Case, device) -> Inputs:
    shape = (case.B, case.T)
    return {name: _normal(shape, device, seed=i) for i, name in enumerate(("reward", "value"))}


def token_logp(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)


def token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    logps = torch.log_softmax(inputs["logits"], -1)
    logp = logps.gather(-1, inputs["target"][:, None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def clipped_loss(inputs: Inputs, logp: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017), summed and divided by the counted tokens."""
    ratio = (logp - inputs["old_logp"] if log_ratio is None else log_ratio).exp()
    advantage = inputs["advantage"]
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    return (loss * inputs["mask"]).sum() / inputs["num_items"]


def policy_loss(inputs: Inputs) -> tuple[Tensor]:
    return (clipped_loss(inputs, token_logp(inputs["logits"], inputs["target"])),)


def sequence_policy_loss(inputs: Inputs) -> tuple[Tensor]:
    """GSPO: the ratio is the mean over the sequence, with the token's own gradient path."""
    logp = token_logp(inputs["logits"], inputs["target"])
    gap = (logp - inputs["old_logp"]).view(-1, inputs["T"])
    return (clipped_loss(inputs, logp, gap.mean(1, keepdim=True).expand_as(gap).reshape(-1)),)


def cross_entropy(inputs: Inputs) -> tuple[Tensor]:
    loss = F.cross_entropy(inputs["logits"], inputs["target"], reduction="sum")
    return (loss / inputs["num_items"],)


def categorical_kl(inputs: Inputs) -> tuple[Tensor]:
    p, q = (torch.log_softmax(inputs[name], -1) for name in ("p_logits", "q_logits"))
    return ((p.exp() * (p - q)).sum(-1),)


def fisher_vector_product(inputs: Inputs) -> tuple[Tensor]:
    p, tangent = torch.softmax(inputs["logits"], -1), inputs["tangent"]
    return (p * tangent - p * (p * tangent).sum(-1, keepdim=True),)


def head_logits(inputs: Inputs) -> Inputs:
    """The inputs with the head's logits in them."""
    return inputs | {"logits": F.linear(inputs["hidden"], inputs["weight"])}


def linear_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(x * inputs["mask"] for x in token_logprob(head_logits(inputs)))


def linear_policy_loss(inputs: Inputs) -> tuple[Tensor]:
    return policy_loss(head_logits(inputs))


def linear_cross_entropy(inputs: Inputs) -> tuple[Tensor]:
    logits, mask = head_logits(inputs)["logits"], inputs["mask"]
    nll = F.cross_entropy(logits, inputs["target"], reduction="none")
    return ((nll * mask).sum() / inputs["num_items"],)


def dpo_loss(inputs: Inputs, logp: Tensor) -> Tensor:
    """DPO's sigmoid loss on (2B, T) rows, chosen first (Rafailov et al. 2023, arXiv:2305.18290)."""
    gap = ((logp - inputs["ref_logp"]) * inputs["mask"]).view(-1, inputs["T"]).sum(1)
    chosen, rejected = gap.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def linear_dpo(inputs: Inputs) -> tuple[Tensor]:
    return (dpo_loss(inputs, token_logp(head_logits(inputs)["logits"], inputs["target"])),)


def gae(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The usual loop over T, as PPO trainers have it."""
    reward, value = inputs["reward"], inputs["value"]
    advantage = torch.empty_like(reward)
    last, following = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(reward.shape[1])):
        last = reward[:, t] + GAMMA * following - value[:, t] + GAMMA * LAM * last
        advantage[:, t] = last
        following = value[:, t]
    return advantage, advantage + value


def _head_bytes(case: Case) -> float:
    """Hidden and weight read; without a gradient that is all, else both gradients written too."""
    return (1 + _takes_gradient(case)) * (case.N + case.V) * case.H * itemsize(case)


def _head_products(case: Case) -> float:
    return (2.0 + 4.0 * _takes_gradient(case)) * case.counted * case.H * case.V


def _takes_gradient(case: Case) -> bool:
    return case.direction != "forward"


HEAD = {"bytes": _head_bytes, "products": _head_products, "leaves": ("hidden", "weight")}
HEAD |= {"shared": ("weight",)}
OPERATIONS = {
    "token_logprob": Operation(
        _logits("logp", "entropy"), token_logprob, ("logp", "entropy"), logit_passes(1, 2),
        leaves=("logits",),
    ),
    "token_logp": Operation(
        _logits("logp"), lambda inputs: (token_logp(inputs["logits"], inputs["target"]),),
        ("logp",), logit_passes(1, 2), leaves=("logits",),
    ),
    "policy_loss": Operation(
        _logits(), policy_loss, ("loss",), logit_passes(1, 1), ("logits",), summed=("loss",)
    ),
    "sequence_policy_loss": Operation(
        _logits(), sequence_policy_loss, ("loss",), logit_passes(1, 2), ("logits",),
        summed=("loss",), couples=lambda case: case.T,
    ),
    "cross_entropy": Operation(
        _logits(), cross_entropy, ("loss",), logit_passes(1, 1), ("logits",), summed=("loss",)
    ),
    "categorical_kl": Operation(
        _pair, categorical_kl, ("kl",), logit_passes(2, 4), ("p_logits", "q_logits")
    ),
    "fisher_vector_product": Operation(
        _tangent, fisher_vector_product, ("product",), logit_passes(3, 0)
    ),
    "linear_token_logprob": Operation(
        make_head, linear_token_logprob, ("logp", "entropy"), **HEAD
    ),
    "linear_policy_loss": Operation(
        make_head, linear_policy_loss, ("loss",), summed=("loss",), **HEAD
    ),
    "linear_cross_entropy": Operation(
        make_head, linear_cross_entropy, ("loss",), summed=("loss",), **HEAD
    ),
    "linear_dpo": Operation(
        make_head, linear_dpo, ("loss",), summed=("loss",), couples=lambda case: None, **HEAD
    ),
    "gae": Operation(
        _episodes, gae, ("advantage", "returns"),
        lambda case: 4.0 * case.B * case.T * itemsize(case),
    ),
}  # fmt: skip
