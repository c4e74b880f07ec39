"""The options of GRPO, their checks, and the table of its loss types.

A loss type is a row of LOSS_TYPES, or any surrogate of rl.policy_loss, registered ones too: that
one is averaged over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlcore.errors import UserError, unknown_name
from rlcore.functional.advantages import SCALES
from rlcore.runs.ranges import Count, Fraction, NotNegative, Positive, check_ranges
from rlcore.trainers.options.sampling import SamplingConfig, check_sampling_config
from rlcore.trainers.options.value import check_unused

if TYPE_CHECKING:
    from rlcore.kernels.formulas.surrogates import Surrogate


@dataclass(frozen=True)
class LossType:
    """How a loss is summed up over the optimization batch."""

    loss_agg_mode: str  # of rl.policy_loss, as is the surrogate
    all_processes: bool = True  # whose tokens or sequences the denominator counts
    fixed_length: bool = False  # max_completion_length stands for every sequence's length
    surrogate: str = "ppo_clip"
    future_kl: bool = False  # rl.future_kl_weight multiplies the advantages
    # where the loss has no other: the default of the option of this name is then this
    importance_sampling_level: str | None = None


LOSS_TYPES = {
    "grpo": LossType("seq-mean-token-mean"),
    "bnpo": LossType("token-mean", all_processes=False),
    "dapo": LossType("token-mean"),
    "dr_grpo": LossType("seq-mean-token-sum-norm", fixed_length=True),
    "cispo": LossType("token-mean", surrogate="cispo"),
    # TRL's "cispo": epsilon_high bounds the ratio itself
    "cispo_abs": LossType("token-mean", surrogate="cispo_abs"),
    "sapo": LossType("seq-mean-token-mean", surrogate="sapo"),
    "vespo": LossType("token-mean", surrogate="vespo"),
    # arXiv:2603.19835
    "fipo": LossType("token-mean", future_kl=True),
    # arXiv:2602.05261: GSPO whose sequences weigh as much as they are long
    "luspo": LossType("seq-mean-token-sum", importance_sampling_level="sequence"),
}
LEVELS = ("token", "sequence")
MULTI_OBJECTIVE = ("sum_then_normalize", "normalize_then_sum")


def loss_type_of(name: str) -> LossType:
    """The row of LOSS_TYPES, or the surrogate of that name averaged over tokens."""
    return LOSS_TYPES.get(name) or LossType("token-mean", surrogate=name)


KL_ESTIMATORS = ("k1", "k2", "k3", "k3_ratio")


@dataclass(kw_only=True)
class GRPOConfig(SamplingConfig):
    """GRPO."""

    num_generations: Count = 8  # completions a prompt: a group
    num_iterations: Count = 1  # times that a generation batch is gone through
    steps_per_generation: Count | None = None  # micro-steps; None: gradient_accumulation_steps
    # divide advantages by the std of the group or of the batch, by the group's mean, or by none
    scale_rewards: str = "group"
    # several rewards: sum_then_normalize, or normalize_then_sum, each in its group before the sum
    multi_objective_aggregation: str = "sum_then_normalize"

    # Loss

    # grpo, dapo, dr_grpo, bnpo, luspo, fipo, cispo, cispo_abs, sapo, vespo, or another surrogate
    loss_type: str = "dapo"
    # parameters of the surrogate's own, as JSON: '{"tau_pos": 1.0}'; None: those of its table
    surrogate_params: dict[str, float] | None = None
    fipo_decay_rate: Positive = 32.0  # fipo: tokens after which a log-ratio counts half
    fipo_clip_range: Fraction = 0.2  # fipo: weights are within [1, 1 + this]
    fipo_clip_high_only: bool = True  # or, with --no-fipo-clip-high-only, [1 - this, 1 + this]
    # token, or sequence: a completion's tokens share a ratio; None: token where the loss has it
    importance_sampling_level: str | None = None
    epsilon: Positive = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: Positive | None = None  # and above 1 + epsilon_high; None: epsilon
    # the ratio's bound where the advantage is negative; None: none
    delta: Positive | None = None
    beta: NotNegative = 0.0  # weight of the KL to the reference; 0: no reference is loaded
    kl_estimator: str = "k3"  # k1, k2, k3 or k3_ratio (k3 times the importance ratio)
    entropy_coef: float = 0.0  # weight of the entropy bonus

    # Tokens left out of the surrogate; each is one more forward pass of a step

    # sequences of negative advantage where log(old / policy) is above this on average; None: none
    off_policy_mask_threshold: Positive | None = None
    # tokens of the largest ratios, until the mean of (log ratio)^2 is at most this; None: none
    second_moment_threshold: Positive | None = None
    top_entropy_quantile: Fraction = 1.0  # all but this share, of the highest entropy

    @property
    def micro_steps(self) -> int:
        """Micro-steps that a generation batch is cut into."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps that one pass over a generation batch takes."""
        return self.micro_steps // self.gradient_accumulation_steps

    @property
    def steps_per_batch(self) -> int:
        return self.num_iterations * self.updates_per_pass

    @property
    def masks_ratios(self) -> bool:
        """Tokens are left out by the ratio of the policy to the one that sampled."""
        return not (self.off_policy_mask_threshold is None and self.second_moment_threshold is None)

    @property
    def weighs_ratios(self) -> bool:
        """The surrogate is weighed by those ratios, or tokens left out."""
        return self.masks_ratios or loss_type_of(self.loss_type).future_kl

    @property
    def wants_reference(self) -> bool:
        # without a KL term nothing asks for the reference's opinion
        return self.beta != 0

    @property
    def surrogate_alone(self) -> bool:
        """Nothing but advantages moves the policy."""
        return self.beta == 0 and self.entropy_coef == 0 and self.surrogate.needs_advantage

    @property
    def surrogate(self) -> Surrogate:
        """The row of the table of surrogates that the loss type takes."""
        return _surrogates()[loss_type_of(self.loss_type).surrogate]

    @property
    def level(self) -> str:
        """The importance_sampling_level; left out, the one that the loss type has."""
        own = loss_type_of(self.loss_type).importance_sampling_level
        return self.importance_sampling_level or own or self.surrogate.levels[0]


def check_grpo_config(config: GRPOConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    _check_names(config)
    check_ranges(config)
    if config.num_generations < 2:
        raise UserError(
            f"num_generations must be at least 2, not {config.num_generations}: an advantage is "
            "relative to the group's other completions"
        )
    if config.micro_steps % config.gradient_accumulation_steps:
        raise UserError(
            f"steps_per_generation ({config.micro_steps}) must be a multiple of "
            f"gradient_accumulation_steps ({config.gradient_accumulation_steps})"
        )
    check_sampling_config(config, reward_count)
    if config.multi_objective_aggregation == "normalize_then_sum":
        check_unused(
            config,
            "multi_objective_aggregation normalize_then_sum scales each reward for itself",
            *("scale_rewards", "normalize_rewards", "missing_eos_penalty"),
        )
    _check_surrogate(config)
    if config.masks_ratios and config.sampler == "local" and config.steps_per_batch == 1:
        raise UserError(
            "off_policy_mask_threshold and second_moment_threshold leave nothing out where a batch "
            "serves one step of the policy that sampled it: set num_iterations or "
            "steps_per_generation with them"
        )


def _surrogates() -> Mapping[str, Surrogate]:
    # imported here: the command line shows its help without the kernels
    from rlcore.kernels.formulas.surrogates import SURROGATES

    return SURROGATES


def _check_names(config: GRPOConfig) -> None:
    for name, known in (
        ("loss_type", {**LOSS_TYPES, **_surrogates()}),
        ("scale_rewards", SCALES),
        ("multi_objective_aggregation", MULTI_OBJECTIVE),
        ("kl_estimator", KL_ESTIMATORS),
        ("importance_sampling_level", (None, *LEVELS)),
    ):
        if getattr(config, name) not in known:
            raise unknown_name(name, getattr(config, name), filter(None, known))


def _check_surrogate(config: GRPOConfig) -> None:
    # imported here, as the table is
    from rlcore.kernels.rows.policy_inputs import own_parameters

    loss_type, surrogate = loss_type_of(config.loss_type), config.surrogate
    if not loss_type.future_kl:
        own = ("fipo_decay_rate", "fipo_clip_range", "fipo_clip_high_only")
        check_unused(config, f"loss_type {config.loss_type!r} weighs no future", *own)
    for name in ("epsilon_high", "delta"):
        value = getattr(config, name)
        if value is not None and name not in surrogate.parameters:
            raise UserError(f"loss_type {config.loss_type!r} does not use {name}: leave it out")
        if value is None and name in surrogate.explicit:
            raise UserError(f"loss_type {config.loss_type!r} needs {name}, 5.0 say")
    own_level = loss_type.importance_sampling_level
    if config.level not in ((own_level,) if own_level else surrogate.levels):
        raise UserError(
            f"loss_type {config.loss_type!r} has no importance ratio at {config.level} level: "
            "leave importance_sampling_level out"
        )
    if config.kl_estimator == "k3_ratio" and surrogate.clip_token is not None:
        raise UserError(
            f"loss_type {config.loss_type!r} clips its tokens' ratios, which kl_estimator k3_ratio "
            "needs whole: take k1, k2 or k3"
        )
    try:
        own_parameters(loss_type.surrogate, config.surrogate_params or {})
    except ValueError as error:
        raise UserError(f"loss_type {config.loss_type!r}: {error}") from error
