"""The options of distillation, and their checks.

A step is a batch of completions and one optimizer step on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlcore.errors import UserError
from rlcore.runs.options import OBJECT
from rlcore.runs.ranges import Fraction, Positive, check_ranges
from rlcore.trainers.options.sampling import SamplingConfig, check_sampling_config
from rlcore.trainers.options.value import check_unused


@dataclass(kw_only=True)
class DistillConfig(SamplingConfig):
    """Distillation."""

    # directory or hub name of the model to learn from, which stays as it is
    teacher: str | None = field(default=None, metadata={OBJECT: True})
    temperature: Positive = 0.9  # of sampling, and of both distributions of the loss
    lmbda: Fraction = 0.5  # share of steps on completions that the student samples
    # the other steps are on completions that the teacher samples, not on the data's
    seq_kd: bool = False
    # the loss: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the
    # generalised Jensen-Shannon divergence
    beta: Fraction = 0.5

    @property
    def wants_reference(self) -> bool:
        """The teacher has that place."""
        return True

    @property
    def correction(self) -> str:
        """A divergence of whole distributions weighs no token by who sampled it."""
        return "none"

    @property
    def learns_from_data(self) -> bool:
        """Some steps are on the data's own completions."""
        return self.lmbda < 1 and not self.seq_kd

    @property
    def divergence(self) -> dict[str, object]:
        """The loss as `rl.categorical_divergence` calls it."""
        if self.beta in (0, 1):
            return {"kind": "reverse_kl" if self.beta else "forward_kl"}
        return {"kind": "jsd", "jsd_beta": self.beta}


def check_distill_config(config: DistillConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    if config.teacher is None:
        raise UserError("teacher is not given: name the model to learn from with --teacher")
    check_ranges(config)
    check_unused(config, "the teacher is the one model to compare with", "ref_model")
    corrections = [f"importance_sampling_{name}" for name in ("correction", "clip_max", "clip_min")]
    check_unused(
        config, "a divergence of whole distributions is not weighed", "rejection", *corrections
    )
    check_unused(
        config, "rewards measure here, and teach nothing", "normalize_rewards",
        "missing_eos_penalty",
    )  # fmt: skip
    if reward_count == 0:
        check_unused(config, "there is no reward", "reward_weights", "eval_num_generations")
    if config.lmbda == 1:
        check_unused(config, "with lmbda 1 the student samples everything", "seq_kd")
    if config.num_generations > 1 and config.learns_from_data:
        raise UserError(
            f"num_generations {config.num_generations} samples several completions a prompt, and "
            "the data has one: set lmbda 1 or seq_kd, or leave it out"
        )
    # no reward is needed
    check_sampling_config(config, reward_count or 1)
