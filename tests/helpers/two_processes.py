"""Run by each of two gloo processes: one update on half the rows each, then a whole short run.

python two_processes.py DIRECTORY LOSS_TYPE...; every rank writes its results there.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import grpo as make
from helpers.tiny import PROMPTS, most_of, save_tiny
from rlcore.errors import TrainingStopped
from rlcore.trainers.grpo import GRPOConfig, train_grpo, update_policy

# updates that are no loss type's
VARIANTS = {
    "masked": {
        "second_moment_threshold": 0.01, "top_entropy_quantile": 0.5, "num_iterations": 2,
        "off_policy_mask_threshold": 0.1,
    }
}  # fmt: skip


def one_update(directory: Path, loss_type: str) -> dict:
    """The gradient and metrics of this rank's four rows in micro-batches of two."""
    config = make.config(
        directory,
        beta=0.3,
        **VARIANTS.get(loss_type, {"loss_type": loss_type}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    run = make.make_run(config)
    rank = run.accelerator.process_index
    made = make.experience(old=0.3, ref=0.4).take(torch.arange(4 * rank, 4 * rank + 4))
    _, metrics = update_policy(run, 1, made, torch.arange(4))
    return {"gradient": make.gradient(run.policy), "metrics": metrics}


def short_run(directory: Path, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after three steps of GRPO on a few prompts, in one go and stopped halfway."""
    if rank == 0:
        save_tiny(directory / "model", initializer_range=0.05)
        lines = [f'{{"prompt": "{prompt}", "answer": "7"}}' for prompt in PROMPTS]
        (directory / "rows.jsonl").write_text("\n".join(lines))
        most_of(directory / "rows.jsonl")
    torch.distributed.barrier()
    config = GRPOConfig(
        model=str(directory / "model"),
        dataset=str(directory / "rows.jsonl"),
        eval_dataset=str(directory / "other_rows.jsonl"),
        output_dir=str(directory / "run"),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=4,
        num_iterations=2,
        max_steps=3,
        save_steps=2,
        learning_rate=1e-2,
    )
    whole = train_grpo(config, reward_funcs=[seven]).model.state_dict()
    config = dataclasses.replace(config, output_dir=str(directory / "stopped"), save_steps=0)
    global asked
    asked = rank == 1
    try:
        train_grpo(config, reward_funcs=[seven])
    except TrainingStopped as stop:
        assert (stop.signal_name, stop.step) == ("SIGTERM", 2)
    else:
        raise AssertionError("nobody stopped")
    asked = False
    halves = train_grpo(dataclasses.replace(config, resume=True), reward_funcs=[seven])
    return {"weights": whole, "weights in two goes": halves.model.state_dict()}


asked = False  # the reward has this process asked to stop


def seven(prompts: list, completions: list, **_) -> list[float]:
    """How often the completion says 7, and how long it is: no two groups are all alike."""
    if asked:
        os.kill(os.getpid(), signal.SIGTERM)
    return [text.count("7") + 0.01 * len(text) for text in completions]


def main() -> None:
    directory = Path(sys.argv[1])
    make.make_run(make.config(directory))  # sets the process group up
    rank = torch.distributed.get_rank()
    results = {name: one_update(directory, name) for name in sys.argv[2:]}
    results |= short_run(directory, rank)
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
