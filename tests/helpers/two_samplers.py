"""Run by two processes: a short run on a server whose weights the main process brings.

python two_samplers.py DIRECTORY URL; every rank writes its last metrics there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.runs import grpo_config
from rlcore.trainers.grpo import train_grpo


def lengths(prompts: list, completions: list, **_) -> list[float]:
    return [float(len(text)) for text in completions]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    options = {"sampler": "vllm", "sampler_url": [sys.argv[2]], "sampler_timeout": 30.0}
    result = train_grpo(grpo_config(directory, **options), reward_funcs=[lengths])
    torch.save(result.metrics, directory / f"rank{os.environ['RANK']}.pt")
