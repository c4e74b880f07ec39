"""The trainers: each one function that reads top to bottom.

`from rlcore.trainers import GRPOConfig, train_grpo` imports that trainer and no other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlcore.trainers.distill import DistillConfig, train_distill
    from rlcore.trainers.dpo import DPOConfig, train_dpo
    from rlcore.trainers.grpo import GRPOConfig, train_grpo
    from rlcore.trainers.kto import KTOConfig, train_kto
    from rlcore.trainers.pg import PGConfig, RLOOConfig, train_pg
    from rlcore.trainers.ppo import PPOConfig, train_ppo
    from rlcore.trainers.reward_model import RewardModelConfig, train_reward_model
    from rlcore.trainers.sft import SFTConfig, train_sft
    from rlcore.trainers.shared.given import Callback
    from rlcore.trainers.trpo import TRPOConfig, train_trpo

# module: its configs and its function
_TRAINERS = {
    "sft": ("SFTConfig", "train_sft"),
    "reward_model": ("RewardModelConfig", "train_reward_model"),
    "pg": ("PGConfig", "RLOOConfig", "train_pg"),
    "trpo": ("TRPOConfig", "train_trpo"),
    "ppo": ("PPOConfig", "train_ppo"),
    "grpo": ("GRPOConfig", "train_grpo"),
    "dpo": ("DPOConfig", "train_dpo"),
    "kto": ("KTOConfig", "train_kto"),
    "distill": ("DistillConfig", "train_distill"),
}
_MODULES = {name: module for module, names in _TRAINERS.items() for name in names}
_MODULES["Callback"] = "shared.given"

# written out for type checkers and editors
__all__ = [
    "Callback",
    "DPOConfig",
    "DistillConfig",
    "GRPOConfig",
    "KTOConfig",
    "PGConfig",
    "PPOConfig",
    "RLOOConfig",
    "RewardModelConfig",
    "SFTConfig",
    "TRPOConfig",
    "train_distill",
    "train_dpo",
    "train_grpo",
    "train_kto",
    "train_pg",
    "train_ppo",
    "train_reward_model",
    "train_sft",
    "train_trpo",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
