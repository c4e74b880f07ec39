"""Ten seeded steps of a TRL trainer on a tiny model, and how two such runs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from helpers.tiny import PROMPTS, save_tiny
from transformers import AutoTokenizer

STEPS = 10
ANSWERS = (" 9+8=17", " 7", " 17+8=25, 25+1=26", " 8-3=5")
PAIRS = [
    {"prompt": prompt, "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 1) % 4]}
    for i, prompt in enumerate(PROMPTS)
]
ROWS = {
    "SFT": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "DPO": PAIRS,
    "KTO": [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for row in PAIRS
        for which in ("chosen", "rejected")
    ],
    "Reward": [
        {which: row["prompt"] + row[which] for which in ("chosen", "rejected")} for row in PAIRS
    ],
    "GRPO": [{"prompt": prompt} for prompt in PROMPTS],
    "RLOO": [{"prompt": prompt} for prompt in PROMPTS],
}
OWN = {
    "GRPO": {"num_generations": 4, "max_completion_length": 8, "temperature": 0.9},
    "RLOO": {"num_generations": 4, "max_completion_length": 8, "temperature": 0.9},
    "Reward": {"learning_rate": 0.01},
}
# of the clock, or of a schedule that has nothing to do with the loss
UNCOMPARED = ("time", "runtime", "per_second", "flos", "num_tokens", "mfu")


@dataclass(frozen=True)
class Result:
    losses: list[float]  # of every micro-batch, unrounded
    logs: list[dict[str, float]]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def many_words(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group, and is the same at every run."""
    return [float(len(set(completion))) + 0.1 * len(completion) for completion in completions]


def make_trainer(
    kind: str, directory: Path, model: Any = None, adapter: Any = None, **options: Any
) -> Any:
    """A TRL trainer of that kind on the directory's tiny model, made where it is missing."""
    if not (directory / "model").is_dir():
        save_tiny(directory / "model", "llama", initializer_range=0.1, tie_word_embeddings=False)
    shared = {
        "output_dir": str(directory / "run"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        # AdamW would blow the rounding of gradients that are zero up to whole steps
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    config = getattr(trl, f"{kind}Config")(**(shared | OWN.get(kind, {}) | options))
    rewards = {"reward_funcs": many_words} if kind in ("GRPO", "RLOO") else {}
    return getattr(trl, f"{kind}Trainer")(
        model=model or str(directory / "model"),
        args=config,
        train_dataset=Dataset.from_list(ROWS[kind] * 8),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
        peft_config=adapter,
        **rewards,
    )


def run(kind: str, directory: Path, **options: Any) -> Result:
    """Trains for STEPS steps."""
    trainer = make_trainer(kind, directory, **options)
    start = copies(trainer.model)
    losses: list[float] = []
    step: Callable = trainer.training_step

    def recording_step(*args: Any, **more: Any) -> torch.Tensor:
        loss = step(*args, **more)
        losses.append(loss.item())
        return loss

    trainer.training_step = recording_step
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Result(losses, logs, start, copies(trainer.model))


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(patched: Result, plain: Result) -> None:
    """Losses and metrics to 1e-5; weights to 1e-5, and what training did to them to 1e-3."""
    assert len(patched.losses) == len(plain.losses) >= STEPS
    scale = max(map(abs, plain.losses))
    for mine, theirs in zip(patched.losses, plain.losses, strict=True):
        assert abs(mine - theirs) <= 1e-5 * scale, (mine, theirs)
    assert len(patched.logs) == len(plain.logs) == STEPS
    for mine, theirs in zip(patched.logs, plain.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            # before the first step policy and reference are one: rounding alone breaks the tie
            if name == "rewards/accuracies" and abs(theirs["rewards/margins"]) < 1e-6:
                continue
            if isinstance(value, float) and not any(word in name for word in UNCOMPARED):
                assert abs(mine[name] - value) <= 1e-4 * (1 + abs(value)), name
    moved = 0.0
    for name, theirs in plain.weights.items():
        difference = (patched.weights[name] - theirs).norm()
        step = (theirs - plain.start[name]).norm()
        assert difference <= 1e-5 * theirs.norm(), name
        assert difference <= 1e-3 * step + 1e-6 * theirs.norm(), name
        moved += step.item()
    assert moved > 1e-2, "the run hardly trained"
