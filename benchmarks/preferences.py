"""The contestants of the preference benchmark: hidden, weight -> DPO loss and its gradients.

The reference's log-probabilities are given to all. Run as a script (preferences.py CONTESTANT), it
prints how many bytes one forward and backward adds to the resident peak above the inputs and their
gradients.
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
from rlcore.bench.memory import give_back_freed, reset_resident_peak, resident_peak

PAIRS, T, H, V = 8, 256, 896, 32000
BETA = 0.1


@dataclass
class Step:
    """hidden (2B, T, H), weight (V, H), target and mask (2B, T), ref_logp (2B,)."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    mask: Tensor
    ref_logp: Tensor


def make_step(pairs: int = PAIRS) -> Step:
    """Inputs of one step; every token counts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator).mul_(0.05)
    target = torch.randint(V, (2 * pairs, T), generator=generator)
    mask = torch.ones(2 * pairs, T, dtype=torch.bool)
    with torch.no_grad():
        logp = rl.linear_token_logprob(hidden, weight, target, entropy=False, backend="torch").logp
    noise = torch.randn(2 * pairs, generator=generator)
    return Step(hidden, weight, target, mask, logp.sum(1) + noise)


def _dpo(step: Step, logp: Tensor) -> Tensor:
    chosen, rejected = ((logp * step.mask).sum(1) - step.ref_logp).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def ours(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    return rl.linear_preference_loss(
        hidden, weight, step.target, step.mask, step.ref_logp, beta=BETA, backend="torch"
    ).loss


def ours_composed(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities first, their gradients by recomputing: what a longer pair takes."""
    out = rl.linear_token_logprob(
        hidden, weight, step.target, mask=step.mask, entropy=False, backend="torch"
    )
    return _dpo(step, out.logp)


def trl_chunked(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """As TRL 1.16's DPOTrainer asks for log-probabilities, with the statistics that it logs."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    out = _ChunkedLogProbFunction.apply(
        hidden[step.mask], weight, None, step.target[step.mask], 1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy", "is_top1", "mean_logits"),
    )  # fmt: skip
    logp = torch.zeros(step.mask.shape).masked_scatter(step.mask, out[0].float())
    return _dpo(step, logp)


def trl_logits(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits path that TRL had before: no statistics beside the log-probabilities."""
    from trl.trainer.utils import selective_log_softmax

    return _dpo(step, selective_log_softmax(F.linear(hidden, weight), step.target))


CONTESTANTS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "rlcore": ours,
    "rlcore, composed": ours_composed,
    "trl chunked": trl_chunked,
    "trl logits": trl_logits,
}


def forward_backward(name: str, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dhidden, dweight) of one step."""
    hidden, weight = (t.detach().requires_grad_() for t in (step.hidden, step.weight))
    loss = CONTESTANTS[name](step, hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def main(name: str) -> None:
    torch.set_num_threads(1)
    step, tiny = make_step(), make_step(1)
    forward_backward(name, tiny)
    give_back_freed()
    reset_resident_peak()
    before = resident_peak()
    gradients = forward_backward(name, step)[1:]
    print(json.dumps(resident_peak() - before - sum(g.nbytes for g in gradients)))


if __name__ == "__main__":
    main(*sys.argv[1:])
