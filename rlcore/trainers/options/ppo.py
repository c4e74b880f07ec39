"""The options of PPO, their checks, and the table of what holds the policy near its older self.

A step, in max_steps, save_steps, eval_steps and logging_steps, is a generation batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlcore.errors import UserError, unknown_name
from rlcore.runs.ranges import Count, Fraction, Natural, NotNegative, Positive, Steps, check_ranges
from rlcore.trainers.options.sampling import check_sampling_config
from rlcore.trainers.options.value import ValueConfig, check_unused, check_value_config

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class KLMode:
    """How a policy's distance from the one that sampled is held small."""

    surrogate: str  # of rl.policy_loss
    options: tuple[str, ...]  # those that no other mode has a use for


KL_MODES = {
    "clip": KLMode("ppo_clip", ("cliprange",)),
    "penalty": KLMode("ppo_penalty", ("penalty_coef", "penalty_target")),
}


@dataclass(kw_only=True)
class PPOConfig(ValueConfig):
    """PPO."""

    # generation batches, each of num_ppo_epochs x num_mini_batches optimizer steps; -1: as many as
    # num_train_epochs need
    max_steps: Steps = -1
    num_ppo_epochs: Count = 4  # times that a generation batch is gone through
    num_mini_batches: Count = 1  # optimizer steps that one pass over it takes
    kl_mode: str = "clip"  # what holds the policy near the one that sampled: clip or penalty
    cliprange: Positive = 0.2  # clip: the ratio is clipped to 1 - cliprange, 1 + cliprange
    penalty_coef: Positive = 1.0  # penalty: weight of KL(old || new) at first, then it adapts
    penalty_target: Positive = 0.01  # penalty: the KL a token, in nats, that it adapts to
    # end a batch's updates beyond this KL(old || new); None: never
    target_kl: Positive | None = None
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus

    # Reward of a token

    kl_coef: NotNegative = 0.05  # weight of the KL to the reference; 0: no reference is loaded
    kl_estimator: str = "k1"  # k1, k2 or k3
    kl_target: Positive | None = None  # KL a completion that kl_coef adapts to; None: it is fixed
    kl_gain: Positive = 0.1  # how fast kl_coef adapts
    whiten_rewards: bool = False  # scale the tokens' rewards to unit variance

    # Advantage and value

    lam: Fraction = 0.95  # of GAE
    whiten_advantages: bool = True  # to zero mean and unit variance
    # a value moves this far in a batch at most; None: anywhere
    cliprange_value: Positive | None = 0.2
    value_warmup_steps: Natural = 0  # first generation batches, on which it alone learns
    # a completion cut short is not over: the value after it stands there instead of its score
    bootstrap_truncated: bool = False

    @property
    def updates_per_pass(self) -> int:
        return self.num_mini_batches

    @property
    def wants_reference(self) -> bool:
        return self.kl_coef != 0


def check_ppo_config(config: PPOConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    if config.kl_mode not in KL_MODES:
        raise unknown_name("kl_mode", config.kl_mode, KL_MODES)
    if config.kl_estimator not in KL_ESTIMATORS:
        raise unknown_name("kl_estimator", config.kl_estimator, KL_ESTIMATORS)
    check_ranges(config)
    for name, mode in KL_MODES.items():
        if name != config.kl_mode:
            check_unused(config, f"it goes with kl_mode {name!r}", *mode.options)
    _check_reference_options(config)
    if config.value_warmup_steps and config.value_backbone == "shared":
        raise UserError(
            "value_warmup_steps needs value_backbone own: on a shared one the policy would move too"
        )
    check_sampling_config(config, reward_count, weight="kl_coef")
    check_value_config(config)


def _check_reference_options(config: PPOConfig) -> None:
    if config.kl_coef == 0:
        check_unused(config, "kl_coef is 0", "kl_estimator", "kl_target", "kl_gain")
    if config.kl_target is None:
        check_unused(config, "without a kl_target kl_coef is fixed", "kl_gain")
    elif config.kl_gain >= 5:
        # the relative error counts for 0.2 at most
        raise UserError(f"kl_gain must be below 5, not {config.kl_gain}")
