"""The trainers: each one function that reads top to bottom.

`from rlcore.trainers import GRPOConfig, train_grpo` imports that trainer and no other.
"""

from __future__ import annotations

import importlib
from typing import Any

# module: its config and its function
_TRAINERS = {
    "sft": ("SFTConfig", "train_sft"),
    "reward_model": ("RewardModelConfig", "train_reward_model"),
    "pg": ("PGConfig", "train_pg"),
    "trpo": ("TRPOConfig", "train_trpo"),
    "ppo": ("PPOConfig", "train_ppo"),
    "grpo": ("GRPOConfig", "train_grpo"),
    "dpo": ("DPOConfig", "train_dpo"),
}
_MODULES = {name: module for module, names in _TRAINERS.items() for name in names}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
