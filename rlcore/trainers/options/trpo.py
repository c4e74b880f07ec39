"""The options of TRPO, their checks, and the table of its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch

from rlcore.errors import UserError, unknown_name
from rlcore.functional.advantages import SCALES, group_advantage, leave_one_out_advantage
from rlcore.runs.ranges import Count, Fraction, NotNegative, Positive, Range, check_ranges
from rlcore.trainers.options.sampling import check_sampling_config
from rlcore.trainers.options.value import ValueConfig, check_unused, check_value_config


@dataclass(kw_only=True)
class TRPOConfig(ValueConfig):
    """TRPO.

    A step is a generation batch and one step of the policy, whose length follows the schedule of
    lr_scheduler_type (delta its square). The other optimization options are the value model's.
    """

    num_generations: Count = 8  # completions a prompt
    # what a reward is compared with: group, leave_one_out, batch_mean, value
    baseline: str = "group"
    scale_rewards: str = "group"  # baseline group: divide by the std of: group, batch, none
    lam: Fraction = 1.0  # baseline value: lambda of generalised advantage estimation
    num_value_epochs: Count = 1  # baseline value: times that the value model goes through a batch

    # Trust region

    # the mean KL(old || new) of a token, in nats, that a step may not exceed
    delta: Positive = 0.01
    cg_iterations: Count = 10  # of conjugate gradient at most: a Fisher product each
    cg_damping: NotNegative = 0.1  # added to the diagonal of the Fisher matrix
    cg_tolerance: NotNegative = 1e-10  # it ends at this residual, as a share of the gradient
    # completions on each process for the direction; None: all
    fisher_rows: Count | None = None
    line_search_steps: Count = 10  # trials at most
    # the factor from one to the next
    line_search_shrink: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.8
    # patterns (*, ?) of the names of the parameters that move; of those that can be trained
    trained_parameters: list[str] = field(default_factory=lambda: ["*"])


Advantages = Callable[[torch.Tensor, TRPOConfig], torch.Tensor]


def _group(scores: torch.Tensor, config: TRPOConfig) -> torch.Tensor:
    return group_advantage(scores, config.num_generations, scale_rewards=config.scale_rewards)


def _leave_one_out(scores: torch.Tensor, config: TRPOConfig) -> torch.Tensor:
    return leave_one_out_advantage(scores, config.num_generations)


def _batch_mean(scores: torch.Tensor, config: TRPOConfig) -> torch.Tensor:
    return (scores - scores.nanmean()).nan_to_num(0.0)


# scores (M,) of all processes, NaN where not judged -> advantages (M,); a value model has its own
ADVANTAGES: dict[str, Advantages | None] = {
    "group": _group,
    "leave_one_out": _leave_one_out,
    "batch_mean": _batch_mean,
    "value": None,
}


def check_trpo_config(config: TRPOConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    for name, known in (("baseline", ADVANTAGES), ("scale_rewards", SCALES)):
        if getattr(config, name) not in known:
            raise unknown_name(name, getattr(config, name), known)
    check_ranges(config)
    if not config.trained_parameters:
        raise UserError("trained_parameters is empty: name parameters, or * for all")
    _check_baseline(config)
    check_unused(config, "the trust region lies around the policy itself", "ref_model")
    check_unused(config, "the step of the policy comes from delta", "learning_rate")
    check_unused(config, "the step is on the surrogate alone", "router_aux_loss_coef")
    check_sampling_config(config, reward_count)
    check_value_config(config)


def _check_baseline(config: TRPOConfig) -> None:
    if config.baseline in ("group", "leave_one_out") and config.num_generations < 2:
        raise UserError(
            f"baseline {config.baseline} needs num_generations of at least 2, not "
            f"{config.num_generations}: it compares with the group's other completions"
        )
    if config.baseline != "group":
        check_unused(config, f"baseline is {config.baseline!r}", "scale_rewards")
    if config.baseline != "value":
        check_unused(
            config,
            f"baseline {config.baseline!r} has no value model",
            *("value_model", "value_learning_rate", "value_backbone", "vf_coef", "gamma", "lam"),
            *("num_value_epochs", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
        )
    elif config.value_backbone == "shared":
        raise UserError(
            "value_backbone must be own: fitting a shared one would move the policy out of its "
            "trust region"
        )
    elif config.value_learning_rate is None:
        raise UserError("baseline value needs value_learning_rate, 0.001 say")
