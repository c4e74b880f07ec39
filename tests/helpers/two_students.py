"""Run by each of two gloo processes: distillation from data, from samples, and in two goes.

python two_students.py DIRECTORY; every rank writes its weights and metrics there.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.tiny import PROMPTS, most_of, save_tiny
from rlcore.trainers import DistillConfig, train_distill


def make_config(directory: Path, **changes) -> DistillConfig:
    """Three steps of eight rows in all; of one process in micro-batches of four."""
    if not (directory / "rows.jsonl").exists():
        save_tiny(directory / "student", initializer_range=0.2)
        save_tiny(directory / "teacher", "llama", seed=1, initializer_range=0.2)
        lines = [
            f'{{"prompt": "{prompt}", "completion": " {"7 " * place}"}}'
            for place, prompt in enumerate(PROMPTS * 2, start=1)
        ]
        (directory / "rows.jsonl").write_text("\n".join(lines))
        most_of(directory / "rows.jsonl")
    options = dict(
        model=str(directory / "student"),
        teacher=str(directory / "teacher"),
        dataset=str(directory / "rows.jsonl"),
        eval_dataset=str(directory / "other_rows.jsonl"),
        per_device_train_batch_size=4,
        max_completion_length=6,
        max_steps=3,
        save_steps=0,
        learning_rate=1e-2,
        lmbda=0.0,
    )
    return DistillConfig(**(options | changes))


def main() -> None:
    directory, rank = Path(sys.argv[1]), Accelerator().process_index
    if rank == 0:
        make_config(directory, output_dir="nowhere")
    torch.distributed.barrier()
    results = {}
    for name, changes in {"data": {}, "samples": {"lmbda": 0.5, "seq_kd": True}}.items():
        config = make_config(directory, output_dir=str(directory / name), **changes)
        result = train_distill(config)
        results[name] = {"weights": result.model.state_dict(), "metrics": result.metrics}
    config = dataclasses.replace(
        config, output_dir=str(directory / "halves"), save_steps=2, lr_scheduler_type="constant"
    )
    train_distill(dataclasses.replace(config, max_steps=2))
    halves = train_distill(dataclasses.replace(config, resume=True))
    whole = train_distill(dataclasses.replace(config, output_dir=str(directory / "whole")))
    results["halves"] = [each.model.state_dict() for each in (halves, whole)]
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
