"""Run by each of two gloo processes: every trainer, with held-out data that does not share evenly.

python uneven_shares.py DIRECTORY; every rank writes what its runs ended with there. Alone, without
torchrun, `every_run` does the same work in one process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.tiny import PROMPTS, save_tiny
from rlcore.runs import checkpoint
from rlcore.trainers import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    PGConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    TRPOConfig,
    train_dpo,
    train_grpo,
    train_kto,
    train_pg,
    train_ppo,
    train_reward_model,
    train_sft,
    train_trpo,
)
from rlcore.trainers.shared.run import Result

HELD_OUT = (1, 3)  # rows: one process has none; one has a batch more
SAMPLING = {
    "reward": ["helpers.uneven_shares:sevens"],
    "num_generations": 2,
    "max_completion_length": 3,
}
SHARED_CRITIC = {"value_backbone": "shared"}


def sevens(prompts: list, completions: list, **_: Any) -> list[float]:
    """How often a completion says 7, and how long it is; on the second process nobody differs."""
    if os.environ.get("RANK") == "1":
        return [0.0] * len(completions)
    return [text.count("7") + 0.01 * len(text) + 0.1 * n for n, text in enumerate(completions)]


def write_data(directory: Path) -> None:
    save_tiny(directory / "model", initializer_range=0.05)
    rows = [
        {
            "prompt": prompt,
            "completion": f" {n}7",
            "label": n % 2 == 0,
            "chosen": f" {n}7",
            "rejected": f" {n}",
        }
        for n, prompt in enumerate(PROMPTS)
    ]
    for count in (*HELD_OUT, len(rows)):
        lines = map(json.dumps, rows[:count])
        (directory / f"rows{count}.jsonl").write_text("\n".join(lines))


def assert_same_step(found: dict, expected: dict, start: dict) -> None:
    """The weights differ by little of the way that they went: Adam's first step is a sign."""
    assert found.keys() == expected.keys()
    off = sum((found[name] - expected[name]).square().sum() for name in expected)
    way = sum((expected[name] - start[name]).square().sum() for name in expected if name in start)
    assert way > 0 and off < 1e-4 * way, f"{(off / way).sqrt():.1e} of the way off"


def options_of(directory: Path, name: str, held_out: int, **changes: Any) -> dict[str, Any]:
    """Of a run of one short step, evaluated on so many rows."""
    return {
        "model": str(directory / "model"),
        "dataset": str(directory / f"rows{len(PROMPTS)}.jsonl"),
        "eval_dataset": str(directory / f"rows{held_out}.jsonl"),
        "output_dir": str(directory / name),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "learning_rate": 1e-3,
    } | changes


def every_run(directory: Path, processes: int) -> dict[str, dict[str, Any]]:
    """{run: weights, and metrics of the last step}, of the same rows a step."""
    accumulated = 2 // processes

    def options(name: str, held_out: int, **changes: Any) -> dict[str, Any]:
        changes = {"gradient_accumulation_steps": accumulated} | changes
        return options_of(directory, f"{name}{held_out}-of-{processes}", held_out, **changes)

    online = {
        "online": True,
        "max_steps": 2,
        "gradient_accumulation_steps": 2 * accumulated,
        **SAMPLING,
    }
    two = {"gradient_accumulation_steps": 2 * accumulated}
    runs: dict[str, dict[str, Any]] = {}

    def train(name: str, trainer: Callable[[Any], Result], config: Any) -> None:
        result = trainer(config)
        saved = (result.output_dir / "model.safetensors").exists()
        weights = result.model.state_dict()
        runs[name] = {"weights": weights, "metrics": result.metrics, "saved": saved}

    for held_out in HELD_OUT:
        for name, trainer, config, changes in (
            ("sft", train_sft, SFTConfig, {}),
            ("dpo", train_dpo, DPOConfig, {}),
            ("precomputed", train_dpo, DPOConfig, {"precompute_ref_log_probs": True}),
            ("reward_model", train_reward_model, RewardModelConfig, {}),
            ("grpo", train_grpo, GRPOConfig, SAMPLING | two),
        ):
            train(f"{name}{held_out}", trainer, config(**options(name, held_out, **changes)))
    # it compares with completions of other prompts, which one pair does not have
    # with this seed its KL is above 0, where it would hide what a process adds to it
    train("kto3", train_kto, KTOConfig(**options("kto", 3, seed=2)))
    assert runs["kto3"]["metrics"]["eval/kl"] > 0.1
    train("online", train_dpo, DPOConfig(**options("online", 1, **online)))
    train("pg", train_pg, PGConfig(**options("pg", 1, **SAMPLING, **two)))
    trpo = options("trpo", 1, **SAMPLING, **two)
    del trpo["learning_rate"]  # delta says how far it goes
    train("trpo", train_trpo, TRPOConfig(**trpo))
    train("ppo", train_ppo, PPOConfig(**options("ppo", 1, **SAMPLING, **two, **SHARED_CRITIC)))
    return runs


def main() -> None:
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    save_model = checkpoint.save_model

    def save_slowly(*args: Any) -> Path:
        time.sleep(0.2)  # long enough for a process that does not wait to be seen
        return save_model(*args)

    checkpoint.save_model = save_slowly
    torch.save(every_run(directory, 2), directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
