"""Run by each of two gloo processes: TRPO's update on half the rows each, then a whole short run.

python two_trust_regions.py DIRECTORY; every rank writes its results there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import grpo as make
from helpers.tiny import PROMPTS, save_tiny
from rlcore.trainers.trpo import TRPOConfig, _policy, _update, train_trpo

COMMON = {"reward": ["helpers.two_processes:seven"], "cg_iterations": 4, "max_steps": 3}


def update(directory: Path, rows: torch.Tensor, size: int) -> tuple[dict, dict[str, float]]:
    """(weights, metrics) after a step on those of the eight rows, `size` at a time."""
    config = TRPOConfig(
        model="unused",
        dataset="unused",
        output_dir=str(directory / "run"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(rows) // size,
        **COMMON,
    )
    run = make.make_run(config)
    metrics = _update(run, 1, _policy(run), make.experience().take(rows), 0)
    return run.policy.state_dict(), metrics


def short_run(directory: Path, rank: int) -> dict[str, torch.Tensor]:
    """The weights after three steps on a few prompts."""
    if rank == 0:
        save_tiny(directory / "model", initializer_range=0.05)
        lines = [f'{{"prompt": "{prompt}", "answer": "7"}}' for prompt in PROMPTS]
        (directory / "rows.jsonl").write_text("\n".join(lines))
    torch.distributed.barrier()
    config = TRPOConfig(
        model=str(directory / "model"),
        dataset=str(directory / "rows.jsonl"),
        output_dir=str(directory / "run"),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=4,
        fisher_rows=3,
        **COMMON,
    )
    return train_trpo(config).model.state_dict()


def main() -> None:
    directory = Path(sys.argv[1])
    make.make_run(make.config(directory))  # sets the process group up
    rank = torch.distributed.get_rank()
    updated, metrics = update(directory, torch.arange(4 * rank, 4 * rank + 4), 2)
    results = {"updated": updated, "metrics": metrics, "weights": short_run(directory, rank)}
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
