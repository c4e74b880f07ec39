"""Run by each of two gloo processes: updates of actor and critic on half the rows each, then runs.

python two_critics.py DIRECTORY; every rank writes its results there.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import actor_critic as make
from helpers import grpo as grpo_make
from helpers.tiny import PROMPTS, save_tiny
from rlcore.trainers.pg import PGConfig, train_pg
from rlcore.trainers.ppo import PPOConfig, train_ppo
from rlcore.trainers.ppo_update import update
from rlcore.trainers.shared.credit import whitened

HALF = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def one_update(directory: Path, backbone: str) -> dict:
    """The gradients and metrics of this rank's four rows in micro-batches of two."""
    run, critic = make.make_run(make.ppo_config(directory, value_backbone=backbone, **HALF))
    rank = run.accelerator.process_index
    made = make.experience(ref=0.4).take(torch.arange(4 * rank, 4 * rank + 4))
    # one rank's completions are shorter than the other's
    made = made.trimmed() if rank else made
    metrics = update(run, critic, 1, made, torch.arange(4), 1.0)
    return {
        "policy": grpo_make.gradient(run.policy),
        "value": grpo_make.gradient(critic.run.policy),
        "metrics": metrics,
        "whitened": whitened(run, torch.where(made.mask, made.returns, 0.0), made.mask),
    }


def short_runs(directory: Path, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after three steps on a few prompts."""
    if rank == 0:
        save_tiny(directory / "model", initializer_range=0.05)
        lines = [f'{{"prompt": "{prompt}", "answer": "7"}}' for prompt in PROMPTS]
        (directory / "rows.jsonl").write_text("\n".join(lines))
    torch.distributed.barrier()
    common = {
        "model": str(directory / "model"),
        "dataset": str(directory / "rows.jsonl"),
        "reward": ["helpers.two_processes:seven"],
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 3,
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    ppo = PPOConfig(output_dir=str(directory / "ppo"), num_ppo_epochs=2, **common)
    shared = dataclasses.replace(ppo, value_backbone="shared", output_dir=str(directory / "shared"))
    pg = PGConfig(output_dir=str(directory / "pg"), baseline="leave_one_out", **common)
    return {
        "ppo": train_ppo(ppo).model.state_dict(),
        "shared": train_ppo(shared).model.state_dict(),
        "pg": train_pg(pg).model.state_dict(),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    make.make_run(make.ppo_config(directory))  # sets the process group up
    rank = torch.distributed.get_rank()
    results = {backbone: one_update(directory, backbone) for backbone in ("own", "shared")}
    results["weights"] = short_runs(directory, rank)
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
