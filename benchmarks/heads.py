"""The contestants of the fused-head benchmark: hidden, weight -> PPO loss with entropy, gradients.

Run as a script (heads.py CONTESTANT DTYPE), it prints how many bytes one forward and backward
adds to the resident peak above the inputs and their gradients.
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

B, T, H, V = 8, 256, 896, 32000
ENTROPY_COEF = 0.01


@dataclass
class Step:
    """hidden (B, T, H), weight (V, H), target, old_logp and mask (B, T), advantage (B,)."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor
    old_logp: Tensor
    mask: Tensor


def make_step(dtype: torch.dtype, masked: bool, batch: int = B) -> Step:
    """Inputs of one step; with `masked`, the last quarter of every sequence does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, T, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).mul_(0.05).to(dtype)
    target = torch.randint(V, (batch, T), generator=generator)
    mask = torch.ones(batch, T, dtype=torch.bool)
    mask[:, T - masked * T // 4 :] = False
    noise = 0.05 * torch.randn(batch, T, generator=generator)
    with torch.no_grad():
        logp = rl.linear_token_logprob(hidden, weight, target, entropy=False, backend="torch").logp
    advantage = torch.randn(batch, generator=generator)
    return Step(hidden, weight, target, advantage, logp + noise, mask)


def _ppo(step: Step, logp: Tensor, entropy: Tensor) -> Tensor:
    ratio, advantage = (logp - step.old_logp).exp(), step.advantage[:, None]
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return ((loss - ENTROPY_COEF * entropy) * step.mask).sum() / step.mask.sum()


def ours(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    return rl.linear_policy_loss(
        hidden, weight, step.target, step.advantage, old_logp=step.old_logp, mask=step.mask,
        entropy_coef=ENTROPY_COEF, backend="torch",
    ).loss  # fmt: skip


def ours_logprob(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    out = rl.linear_token_logprob(hidden, weight, step.target, mask=step.mask, backend="torch")
    return _ppo(step, out.logp, out.entropy)


def trl_logits(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = F.linear(hidden, weight)
    logp = selective_log_softmax(logits, step.target)
    return _ppo(step, logp, entropy_from_logits(logits))


def trl_chunked(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """Counted tokens alone, as TRL's trainers call it."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    logp, entropy = (torch.zeros(step.mask.shape) for _ in range(2))
    out = _ChunkedLogProbFunction.apply(
        hidden[step.mask], weight, None, step.target[step.mask], 1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",),
    )  # fmt: skip
    logp = logp.masked_scatter(step.mask, out[0].float())
    return _ppo(step, logp, entropy.masked_scatter(step.mask, out[1].float()))


def liger(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    """Its loss has no entropy bonus, which makes its work less."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="bnpo",
        max_completion_length=T, temperature=1.0,
    )  # fmt: skip
    return loss(
        hidden, weight, step.target, step.mask, step.advantage, old_per_token_logps=step.old_logp
    )[0]


CONTESTANTS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "rlcore": ours,
    "rlcore, any loss": ours_logprob,
    "trl logits": trl_logits,
    "trl chunked": trl_chunked,
    "liger chunked": liger,
}


def forward_backward(name: str, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dhidden, dweight) of one step."""
    hidden, weight = (t.detach().requires_grad_() for t in (step.hidden, step.weight))
    loss = CONTESTANTS[name](step, hidden, weight)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def main(name: str, dtype: str) -> None:
    torch.set_num_threads(1)
    step, tiny = make_step(getattr(torch, dtype), True), make_step(getattr(torch, dtype), True, 1)
    forward_backward(name, tiny)
    give_back_freed()
    reset_resident_peak()
    before = resident_peak()
    gradients = forward_backward(name, step)[1:]
    print(json.dumps(resident_peak() - before - sum(g.nbytes for g in gradients)))


if __name__ == "__main__":
    main(*sys.argv[1:])
