"""The contestants of the exact KL to a reference: two heads -> mean KL, gradients of the policy's.

The reference is frozen. Run as a script (head_pairs.py CONTESTANT), it prints how many bytes one
forward and backward adds to the resident peak above the inputs and their gradients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rlcore as rl
from rlcore.bench.memory import reset_resident_peak, resident_peak

N, H, V = 2048, 896, 32000


@dataclass
class Step:
    """hidden (N, H) and weight (V, H) of the policy and of its reference."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor


def make_step(tokens: int = N) -> Step:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, H, generator=generator)
    weight = torch.randn(V, H, generator=generator).mul_(0.05)
    noise = torch.randn(tokens, H, generator=generator).mul_(0.1)
    return Step(hidden, weight, hidden + noise, weight.clone())


def ours(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    given = (hidden, weight, step.ref_hidden, step.ref_weight)
    return rl.linear_categorical_kl(*given, backend="torch").mean()


def ours_logits(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        ref_logits = F.linear(step.ref_hidden, step.ref_weight)
    return rl.categorical_kl(F.linear(hidden, weight), ref_logits, backend="torch").mean()


def torch_logits(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """As it is usually written."""
    with torch.no_grad():
        ref_logp = F.linear(step.ref_hidden, step.ref_weight).log_softmax(-1)
    logp = F.linear(hidden, weight).log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1).mean()


CONTESTANTS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "rlcore": ours,
    "rlcore logits": ours_logits,
    "torch logits": torch_logits,
}


def forward_backward(name: str, step: Step, frozen: bool = False) -> tuple[Tensor, ...]:
    """(loss, dhidden, dweight) of one step; frozen leaves dweight out."""
    hidden, weight = (t.detach().requires_grad_() for t in (step.hidden, step.weight))
    loss = CONTESTANTS[name](step, hidden, weight.requires_grad_(not frozen))
    wanted = (hidden,) if frozen else (hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def main(name: str) -> None:
    torch.set_num_threads(1)
    step, tiny = make_step(), make_step(64)
    forward_backward(name, tiny)
    reset_resident_peak()
    before = resident_peak()
    gradients = forward_backward(name, step)[1:]
    print(json.dumps(resident_peak() - before - sum(g.nbytes for g in gradients)))


if __name__ == "__main__":
    main(*sys.argv[1:])
