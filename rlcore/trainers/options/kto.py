"""The options of KTO, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

from rlcore.errors import UserError, unknown_name
from rlcore.runs.ranges import Count, Length, Natural, Positive
from rlcore.trainers.options.base import TrainConfig, check_train_config


@dataclass(kw_only=True)
class KTOConfig(TrainConfig):
    """KTO."""

    per_device_train_batch_size: Count = 8  # completions in a micro-step on each process
    # tokens of prompt and completion; longer ones are cut at their end
    max_length: Length | None = 1024
    # greedy completions of held-out prompts to show and keep in completions.jsonl
    log_completions: Natural = 3
    completions_format: str = "jsonl"  # or parquet: at the end they are in completions.parquet too

    # Loss

    loss_type: str = "kto"  # or apo_zero_unpaired, which has no reference point
    beta: Positive = 0.1  # the larger, the closer the policy stays to the reference
    desirable_weight: Positive = 1.0  # of the losses of good completions
    undesirable_weight: Positive = 1.0  # of the losses of bad ones
    ref_model: str | None = None  # the reference; None: where the policy starts
    precompute_ref_log_probs: bool = False  # ask the reference once, before the first step

    @property
    def wants_reference(self) -> bool:
        """Every loss here compares with a reference."""
        return True

    @property
    def uses_kl(self) -> bool:
        """The loss has a reference point: the KL to the reference."""
        from rlcore.kernels.formulas.unpaired_losses import UNPAIRED_LOSSES

        return UNPAIRED_LOSSES[self.loss_type].uses_kl


def check_kto_config(config: KTOConfig) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    from rlcore.kernels.formulas.unpaired_losses import UNPAIRED_LOSSES

    check_train_config(config)
    if config.loss_type not in UNPAIRED_LOSSES:
        raise unknown_name("loss_type", config.loss_type, UNPAIRED_LOSSES)
    if config.peft is not None and config.lora_dropout:
        raise UserError(
            "lora_dropout must be 0 here: the reference has none, and the policy is "
            "compared with it"
        )
