"""The options of the policy gradient, and their checks.

A step is a generation batch and one optimizer step on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlcore.errors import UserError, unknown_name
from rlcore.runs.ranges import Count, NotNegative, check_ranges
from rlcore.trainers.options.sampling import check_sampling_config
from rlcore.trainers.options.value import ValueConfig, check_unused, check_value_config

BASELINES = ("none", "batch_mean", "leave_one_out", "value")
RETURN_TYPES = ("sequence", "reward_to_go")
# where the KL to the reference goes, and the estimator that is right there
KL_PLACEMENTS = {"reward": "k1", "loss": "k2"}
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(kw_only=True)
class PGConfig(ValueConfig):
    """Policy gradient."""

    baseline: str = "batch_mean"  # taken off the returns: none, batch_mean, leave_one_out, value
    return_type: str = "sequence"  # of a token: its whole sequence's reward, or the reward_to_go
    whiten_advantages: bool = False  # to zero mean and unit variance over the batch's tokens
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus
    num_value_epochs: Count = 1  # baseline value: times that the value model goes through a batch

    # KL to the reference

    beta: NotNegative = 0.0  # its weight; 0: no reference is loaded
    kl_placement: str = (
        "reward"  # taken off each token's reward, or added to the loss: reward, loss
    )
    kl_estimator: str | None = None  # k1, k2 or k3; None: k1 in the reward, k2 in the loss

    @property
    def wants_reference(self) -> bool:
        return self.beta != 0

    @property
    def kl_in_reward(self) -> float:
        """The KL's weight in the rewards of tokens."""
        return self.beta if self.kl_placement == "reward" else 0.0

    @property
    def kl_in_loss(self) -> float:
        """The KL's weight in the loss."""
        return self.beta - self.kl_in_reward

    @property
    def estimator(self) -> str:
        """The KL's estimator."""
        return self.kl_estimator or KL_PLACEMENTS[self.kl_placement]


@dataclass(kw_only=True)
class RLOOConfig(PGConfig):
    """RLOO: the policy gradient, with TRL's defaults of it."""

    baseline: str = "leave_one_out"
    num_generations: Count = 2
    beta: NotNegative = 0.05


def check_pg_config(config: PGConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    for name, known in (
        ("baseline", BASELINES),
        ("return_type", RETURN_TYPES),
        ("kl_placement", KL_PLACEMENTS),
        ("kl_estimator", (None, *KL_ESTIMATORS)),
    ):
        if getattr(config, name) not in known:
            raise unknown_name(name, getattr(config, name), filter(None, known))
    check_ranges(config)
    if config.beta == 0:
        check_unused(config, "beta is 0", "kl_placement", "kl_estimator")
    if config.kl_placement == "loss" and config.kl_estimator == "k1":
        raise UserError(
            "kl_estimator k1 does nothing with kl_placement loss, as its gradient is 0 on average: "
            "take k2, or kl_placement reward"
        )
    _check_baseline(config)
    check_sampling_config(config, reward_count)
    check_value_config(config)


def _check_baseline(config: PGConfig) -> None:
    if config.baseline == "leave_one_out" and config.num_generations < 2:
        raise UserError(
            "baseline leave_one_out needs num_generations of at least 2, not "
            f"{config.num_generations}: it is the mean of the group's other completions"
        )
    if config.return_type == "sequence":
        check_unused(config, "return_type 'sequence' discounts nothing", "gamma")
    if config.baseline != "value":
        check_unused(
            config,
            f"baseline {config.baseline!r} has no value model",
            *("value_backbone", "value_model", "value_learning_rate", "vf_coef"),
            "num_value_epochs",
        )
    elif config.return_type != "reward_to_go":
        raise UserError(
            "baseline value predicts the reward to go: set return_type reward_to_go with it"
        )
    elif config.value_backbone == "shared":
        check_unused(config, "on a shared backbone the policy would move too", "num_value_epochs")
