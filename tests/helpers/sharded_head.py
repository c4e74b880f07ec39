"""Run by each of two gloo processes: the head's weight is sharded by FSDP2, rows are the rank's.

python sharded_head.py DIRECTORY; every rank writes its loss and the full gradients there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

import rlcore as rl


def make_inputs(rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(6, 8, generator=generator)
    target = torch.randint(31, (6,), generator=generator)
    return hidden, target, torch.randn(6, generator=generator)


def make_head() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(8, 31)


def loss_of(head: nn.Linear, rank: int, name: str) -> torch.Tensor:
    hidden, target, advantage = make_inputs(rank)
    if name == "policy":
        return rl.linear_policy_loss(
            hidden, head.weight, target, advantage, bias=head.bias, chunk_bytes=400
        ).loss
    out = rl.linear_token_logprob(hidden, head.weight, target, bias=head.bias, chunk_bytes=400)
    return (out.logp * advantage).mean() + 0.1 * out.entropy.mean()


def refusal_of_sharded_hidden(mesh) -> str:
    """What a DTensor in hidden's place is told."""
    hidden, target, advantage = make_inputs(0)
    try:
        rl.linear_policy_loss(
            DTensor.from_local(hidden, mesh, [Replicate()]), make_head().weight, target, advantage
        )
    except ValueError as error:
        return str(error)
    return "accepted"


def gathered_weights(head: nn.Linear) -> dict[str, int]:
    """How often each loss gathers the head's weight."""
    hidden, target, advantage = make_inputs(0)
    shared = {"bias": head.bias, "chunk_bytes": 400}
    tokens = (hidden, head.weight, target)
    answers = (hidden.view(2, 3, 8), head.weight, target.view(2, 3))
    answers += (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2))
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    losses = {
        "logprob": lambda: rl.linear_token_logprob(*tokens, **shared),
        "policy": lambda: rl.linear_policy_loss(*tokens, advantage, **shared),
        "sequence": lambda: rl.linear_policy_loss(
            *tokens,
            advantage,
            importance_sampling_level="sequence",
            cu_seqlens=boundaries,
            **shared,
        ),
        "pairs": lambda: rl.linear_preference_loss(*answers, **shared | {"chunk_bytes": 1 << 20}),
        "long pairs": lambda: rl.linear_preference_loss(*answers, **shared),
        "coupled pairs": lambda: rl.linear_preference_loss(*answers, loss_type="aot", **shared),
        "weighted pairs": lambda: rl.linear_preference_loss(
            *answers, use_weighting=True, ld_alpha=0.5, **shared
        ),
    }
    gather, counts = DTensor.full_tensor, {}
    for name, loss in losses.items():
        counts[name] = 0

        def counting(tensor, _name=name, **options):
            counts[_name] += tensor.dim() == 2
            return gather(tensor, **options)

        DTensor.full_tensor = counting
        loss()
    DTensor.full_tensor = gather
    return counts


def main() -> None:
    directory = Path(sys.argv[1])
    rank = int(sys.argv[2])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    results = {}
    for name in ("policy", "logprob"):
        head = fully_shard(make_head(), mesh=mesh)
        loss = loss_of(head, rank, name)
        loss.backward()
        full = [p.grad.full_tensor() for p in (head.weight, head.bias)]
        sharded = type(head.weight.grad).__name__
        results[name] = {"loss": loss.detach(), "gradients": full, "type": sharded}
    results["gathers"] = gathered_weights(fully_shard(make_head(), mesh=mesh))
    results["refused"] = refusal_of_sharded_hidden(mesh)
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
