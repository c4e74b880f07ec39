"""Which configurations of TRL's GRPO and RLOO `rl.linear_policy_loss` computes in one pass.

That is where a token's dloss/dlogp follows from the token alone; elsewhere a plan is the reason why
not, in words for the log.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# what TRL hands to a model that also sees images
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def _grpo(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any] | str:
    """The options of `rl.linear_policy_loss` that are the trainer's, or what is in the way."""
    obstacle = _shared_obstacle(trainer, inputs) or _obstacle(trainer, inputs)
    if obstacle is not None:
        return obstacle
    args = trainer.args
    surrogate, mode, num_items = LOSS_TYPES[trainer.loss_type]
    mask = tokens_of(inputs)[2]
    options = {
        "surrogate": surrogate,
        "loss_agg_mode": mode,
        "num_items": num_items(trainer, inputs, mask),
        "old_logp": inputs.get("old_per_token_logps"),
    }
    if surrogate == "ppo_clip":
        options |= {"epsilon": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
        options["delta"] = args.delta
    elif surrogate == "cispo_abs":
        options["epsilon_high"] = trainer.epsilon_high
    else:
        taus = {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
        options["surrogate_params"] = taus
    if trainer.beta != 0:
        # k3 times the ratio has k2's gradient where the ratio is 1
        estimator = "k2" if args.use_bias_correction_kl else "k3"
        options |= {"beta": trainer.beta, "kl_estimator": estimator}
        options["ref_logp"] = inputs["ref_per_token_logps"]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        options["importance_sampling_ratio"] = inputs["importance_sampling_ratio"].expand_as(mask)
    return options


def _obstacle(trainer: Any, inputs: dict[str, Any]) -> str | None:
    args = trainer.args
    if trainer.loss_type not in LOSS_TYPES:
        return f"loss_type {trainer.loss_type!r} is not among {', '.join(LOSS_TYPES)}"
    clips = LOSS_TYPES[trainer.loss_type][0] == "ppo_clip"
    bounded = clips and args.delta is not None
    on_policy = inputs.get("old_per_token_logps") is None
    obstacles = {
        "a sequence's ratio follows from all of its tokens": (
            trainer.importance_sampling_level != "token"
        ),
        "entropy_coef": getattr(trainer, "_entropy_bonus_enabled", False),
        "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "use_bias_correction_kl off-policy": (
            trainer.beta != 0 and args.use_bias_correction_kl and not on_policy
        ),
        "a delta below 1 + epsilon_high": bounded and args.delta < 1 + trainer.epsilon_high,
        "an epsilon of 0": min(trainer.epsilon_low, trainer.epsilon_high) <= 0,
    }
    return next((reason for reason, there in obstacles.items() if there), None)


def _rloo(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any] | str:
    """On-policy, where every ratio is 1, RLOO's gradient is REINFORCE's on whole sequences."""
    args = trainer.args
    steps = args.steps_per_generation
    if trainer.num_iterations > 1 or steps > args.gradient_accumulation_steps:
        return "off-policy steps weigh a sequence by its ratio, which follows from all its tokens"
    plan = {"surrogate": "reinforce", "old_logp": None, "num_items": len(inputs["advantages"])}
    return _shared_obstacle(trainer, inputs) or plan


def _shared_obstacle(trainer: Any, inputs: dict[str, Any]) -> str | None:
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router's loss"
    more = [name for name in MULTIMODAL if inputs.get(name) is not None]
    return f"the batch has {', '.join(more)}" if more else None


def tokens_of(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids (B, T), attention_mask (B, T), what counts of the completion (B, C) bool)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return ids, attention, mask.bool()


def _steps(trainer: Any) -> float:
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def _rows(trainer: Any, inputs: dict, mask: Tensor) -> float:
    return len(mask) * _steps(trainer)


def _counted(trainer: Any, inputs: dict, mask: Tensor) -> Tensor:
    return mask.sum().clamp(min=1) * _steps(trainer)


def _longest(trainer: Any, inputs: dict, mask: Tensor) -> float:
    return len(mask) * trainer.max_completion_length * _steps(trainer)


def _window(trainer: Any, inputs: dict, mask: Tensor) -> Tensor:
    """A rank's share of the generation batch's tokens, and of that an accumulation window's."""
    items = torch.as_tensor(inputs["num_items_in_batch"]).clamp(min=1.0)
    share = items / trainer.accelerator.num_processes
    if not trainer.model.training:
        return share
    return share * _steps(trainer) / trainer.args.steps_per_generation


# loss_type: (surrogate, loss_agg_mode, its num_items)
LOSS_TYPES = {
    "grpo": ("ppo_clip", "seq-mean-token-mean", _rows),
    "bnpo": ("ppo_clip", "token-mean", _counted),
    "dr_grpo": ("ppo_clip", "token-mean", _longest),
    "dapo": ("ppo_clip", "token-mean", _window),
    "luspo": ("ppo_clip", "token-mean", _rows),
    "cispo": ("cispo_abs", "token-mean", _window),
    "sapo": ("sapo", "seq-mean-token-mean", _rows),
}
PLANS = {"GRPOTrainer": _grpo, "RLOOTrainer": _rloo}
