"""What every trainer runs with on the embedded task; recipes/ says the same as YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore.demo.arithmetic import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, PairPaths, TaskPaths

if TYPE_CHECKING:
    from rlcore.trainers.distill import DistillConfig
    from rlcore.trainers.dpo import DPOConfig
    from rlcore.trainers.grpo import GRPOConfig
    from rlcore.trainers.kto import KTOConfig
    from rlcore.trainers.pg import PGConfig
    from rlcore.trainers.ppo import PPOConfig
    from rlcore.trainers.reward_model import RewardModelConfig
    from rlcore.trainers.sft import SFTConfig
    from rlcore.trainers.trpo import TRPOConfig


def sft_config(paths: TaskPaths, output_dir: str | Path, seed: int = 0) -> SFTConfig:
    """What the demo's warm start runs with; recipes/arithmetic_sft.yaml says the same."""
    from rlcore.trainers.sft import SFTConfig

    return SFTConfig(
        model=str(paths.model),
        dataset=str(paths.sft),
        output_dir=str(output_dir),
        seed=seed,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_steps=1200,
        learning_rate=2e-3,
        adam_beta2=0.98,
        warmup_steps=20,
        lr_scheduler_type="warmup_stable_decay",
        lr_decay_ratio=0.4,
        logging_steps=10,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def _sampling(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int
) -> dict[str, Any]:
    """What every run that samples and is judged by the verifier has in common."""
    return {
        "model": str(model),
        "dataset": str(paths.train),
        "output_dir": str(output_dir),
        "eval_dataset": str(paths.test),
        "reward": ["arithmetic"],
        "seed": seed,
        "per_device_train_batch_size": 512,
        "num_generations": 8,
        "max_prompt_length": MAX_PROMPT_LENGTH,
        "max_completion_length": MAX_COMPLETION_LENGTH,
    }


def grpo_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> GRPOConfig:
    """What the demo's GRPO runs with, from the warm start in `model`."""
    from rlcore.trainers.grpo import GRPOConfig

    return GRPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=4,
        num_iterations=2,
        max_steps=20,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        temperature=1.0,
    )


def pg_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> PGConfig:
    """The policy gradient with a leave-one-out baseline, from the warm start in `model`."""
    from rlcore.trainers.pg import PGConfig

    return PGConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        baseline="leave_one_out",
        max_steps=10,
        learning_rate=1e-3,
        lr_min_ratio=0.1,
    )


def trpo_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> TRPOConfig:
    """TRPO with a group's mean for a baseline, from the warm start in `model`."""
    from rlcore.trainers.trpo import TRPOConfig

    return TRPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        max_steps=10,
        lr_min_ratio=0.1,
        fisher_rows=128,
    )


def ppo_config(
    paths: TaskPaths,
    model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
    kl_mode: str = "clip",
) -> PPOConfig:
    """PPO of either kind, from the warm start in `model`."""
    from rlcore.trainers.ppo import PPOConfig

    return PPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        kl_mode=kl_mode,
        num_ppo_epochs=4,
        max_steps=10,
        learning_rate=3e-4,
        lr_min_ratio=0.1,
        value_learning_rate=1e-3,
        value_warmup_steps=1,
        cliprange_value=None,
        kl_coef=0.0,
    )


def reward_model_config(
    pairs: PairPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> RewardModelConfig:
    """What the demo's reward model learns with, from the warm start in `model`."""
    from rlcore.trainers.reward_model import RewardModelConfig

    return RewardModelConfig(
        model=str(model),
        dataset=str(pairs.train),
        output_dir=str(output_dir),
        eval_dataset=str(pairs.test),
        seed=seed,
        per_device_train_batch_size=32,
        num_train_epochs=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def grpo_reward_model_config(
    paths: TaskPaths,
    model: str | Path,
    reward_model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
) -> GRPOConfig:
    """`grpo_config` with the reward model as judge, held close to the reference by a KL term."""
    return dataclasses.replace(
        grpo_config(paths, model, output_dir, seed),
        reward=[],
        reward_model=str(reward_model),
        learning_rate=3e-4,
        beta=0.1,
        scale_rewards="batch",
    )


def ppo_reward_model_config(
    paths: TaskPaths,
    model: str | Path,
    reward_model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
) -> PPOConfig:
    """`ppo_config` with the reward model as judge, the KL to the reference off the rewards."""
    return dataclasses.replace(
        ppo_config(paths, model, output_dir, seed),
        reward=[],
        reward_model=str(reward_model),
        normalize_rewards=True,
        kl_coef=0.05,
    )


def dpo_config(
    pairs: PairPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> DPOConfig:
    """What the demo's DPO runs with: one epoch of what the warm start in `model` sampled."""
    from rlcore.trainers.dpo import DPOConfig

    return DPOConfig(
        model=str(model),
        dataset=str(pairs.train),
        output_dir=str(output_dir),
        eval_dataset=str(pairs.test),
        seed=seed,
        per_device_train_batch_size=32,
        num_train_epochs=1.0,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        beta=0.1,
        precompute_ref_log_probs=True,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def kto_config(
    pairs: PairPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> KTOConfig:
    """What KTO runs with: one epoch of DPO's pairs, each a good and a bad completion."""
    from rlcore.trainers.kto import KTOConfig

    return KTOConfig(
        model=str(model),
        dataset=str(pairs.train),
        output_dir=str(output_dir),
        eval_dataset=str(pairs.test),
        seed=seed,
        per_device_train_batch_size=64,
        num_train_epochs=1.0,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        beta=0.1,
        precompute_ref_log_probs=True,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def distill_config(
    paths: TaskPaths,
    model: str | Path,
    teacher: str | Path,
    output_dir: str | Path,
    seed: int = 0,
) -> DistillConfig:
    """What distillation runs with: on what the warm start in `model` itself samples."""
    from rlcore.trainers.distill import DistillConfig

    return DistillConfig(
        **_sampling(paths, model, output_dir, seed)
        | {"per_device_train_batch_size": 128, "num_generations": 1},
        teacher=str(teacher),
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        eval_steps=5,
        max_steps=20,
        learning_rate=1e-3,
        lr_min_ratio=0.1,
    )
