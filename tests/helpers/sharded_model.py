"""Run by each of two gloo processes: a whole model sharded by FSDP2, its loss by the fused head.

python sharded_model.py DIRECTORY; every rank writes its losses and the full gradients there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rlcore as rl
from helpers.tiny import tiny_model
from rlcore.models.forward import unwrapped

# what is sharded apart, before the root takes the rest
WAYS = {
    "root alone": [],
    "layers": ["layers"],
    "layers and head": ["layers", "head"],
    "peft": ["layers"],
}


def make_batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids (3, 7), advantage (3,)) of that rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(300, (3, 7), generator=generator), torch.randn(3, generator=generator)


def loss_of(model: Any, rank: int) -> torch.Tensor:
    input_ids, advantage = make_batch(rank)
    return rl.fused_head(model).policy_loss(input_ids, advantage, surrogate="reinforce").loss


def make_model(way: str = "root alone") -> Any:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    if way != "peft":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def shard(whole: Any, parts: list[str], mesh: Any) -> Any:
    model = unwrapped(whole)
    if "layers" in parts:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
    if "head" in parts:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def main() -> None:
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    results = {}
    for way, parts in WAYS.items():
        model = shard(make_model(way), parts, mesh)
        loss = loss_of(model, rank)
        loss.backward()
        gradients = {
            name: None if p.grad is None else p.grad.full_tensor()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        results[way] = {"loss": loss.detach(), "gradients": gradients}
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
