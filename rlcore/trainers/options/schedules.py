"""The learning rate as a function of the step: warm-up, then one of a table of decays.

lr(step) = peak * min(step / warmup, 1) * (min_ratio + (1 - min_ratio) * decay(progress))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlcore.errors import UserError, unknown_name

if TYPE_CHECKING:
    from rlcore.trainers.options.base import TrainConfig

STABLE_DECAY = "warmup_stable_decay"


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


# The decay from 1 to 0 as progress goes from 0 to 1; transformers' longer names mean the same.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    STABLE_DECAY: _linear,
}


def check_schedule(config: TrainConfig) -> None:
    """Raise UserError for an unknown schedule, or options that it has no use for."""
    name = config.lr_scheduler_type
    if name not in DECAYS:
        raise unknown_name("lr_scheduler_type", name, DECAYS)
    if config.warmup_ratio and config.warmup_steps:
        raise UserError(
            f"warmup_ratio {config.warmup_ratio} and warmup_steps {config.warmup_steps} both say "
            "how long to warm up: give one of them"
        )
    if config.lr_min_ratio and DECAYS[name] is _constant:
        raise UserError(f"lr_min_ratio has no meaning for lr_scheduler_type {name!r}")
    if (config.lr_decay_ratio is not None) != (name == STABLE_DECAY):
        raise UserError(
            f"lr_decay_ratio goes with lr_scheduler_type {STABLE_DECAY!r} and only with it; "
            f"here they are {config.lr_decay_ratio} and {name!r}"
        )


def learning_rate_scale(config: TrainConfig, step: int, total: int) -> float:
    """The share of the peak learning rate that optimizer step `step` of `total` takes (from 1)."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    start = warmup
    if config.lr_decay_ratio is not None:
        start = max(warmup, round(total * (1 - config.lr_decay_ratio)))
    # Past the last step of the decay the rate stays where it ended: a run may be prolonged.
    progress = min(max(step - 1 - start, 0) / max(total - start, 1), 1.0)
    decay = DECAYS[config.lr_scheduler_type](progress)
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * decay
