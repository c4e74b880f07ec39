"""The options of trainers that fit a value model, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rlcore.errors import UserError, unknown_name
from rlcore.runs.ranges import Fraction, Positive
from rlcore.trainers.options.sampling import SamplingConfig

BACKBONES = ("own", "shared")


@dataclass(kw_only=True)
class ValueConfig(SamplingConfig):
    """Value model."""

    value_backbone: str = "own"  # own: a model of its own; shared: a head on the policy's
    value_model: str | None = None  # where it starts, a reward model say; None: where model does
    value_learning_rate: Positive | None = None  # its peak; None: learning_rate
    vf_coef: Positive = 0.1  # weight of the value loss where the backbone is shared
    gamma: Fraction = 1.0  # discount a token

    @property
    def value_rate(self) -> float:
        """The value model's peak learning rate."""
        return self.value_learning_rate or self.learning_rate


def check_value_config(config: ValueConfig) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    if config.value_backbone not in BACKBONES:
        raise unknown_name("value_backbone", config.value_backbone, BACKBONES)
    if config.value_backbone == "own":
        check_unused(config, "it weighs the losses of a shared value_backbone", "vf_coef")
    else:
        check_unused(config, "a shared value_backbone is the policy's", "value_model")


def check_unused(config: SamplingConfig, reason: str, *names: str) -> None:
    """Raise UserError where an option called so is not what it is by default."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise UserError(f"{name} is set, but has no effect here: {reason}")
