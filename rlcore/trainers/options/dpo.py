"""The options of DPO and its relatives, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from rlcore.errors import UserError
from rlcore.runs.options import default_of
from rlcore.runs.ranges import Count, Fraction, Length, Positive, check_ranges
from rlcore.trainers.options.base import TrainConfig, check_train_config
from rlcore.trainers.options.sampling import SamplingConfig, check_sampling_config

# options of SamplingConfig that pairs from a file know too
_OFFLINE = {"ref_model"}


@dataclass(kw_only=True)
class DPOConfig(SamplingConfig):
    """DPO."""

    per_device_train_batch_size: Count = 8  # pairs in a micro-step on each process
    # tokens of prompt and answer; longer ones are cut at their end
    max_length: Length | None = 1024
    padding_free: bool = False  # a micro-step's sequences in one row; wants flash attention

    # Loss

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # see rl.preference_loss
    loss_weights: list[float] | None = None  # one a loss_type; None: 1 each
    beta: Positive = 0.1  # the larger, the closer the policy stays to the reference
    label_smoothing: float = 0.0  # the share of pairs that are taken to be the wrong way round
    f_divergence_type: str = "reverse_kl"  # forward_kl, js_divergence, alpha_divergence
    f_alpha_divergence_coef: float = 0.5  # alpha of alpha_divergence
    discopop_tau: float = 0.05  # temperature of discopop
    simpo_gamma: float = 0.5  # margin of simpo
    cpo_alpha: float = 1.0  # weight of cpo's imitation of the chosen answer
    use_weighting: bool = False  # weigh pairs by how likely the policy finds them (WPO)
    # weight of what an answer has beyond the shorter one's length
    ld_alpha: Fraction | None = None
    precompute_ref_log_probs: bool = False  # ask the reference once, before the first step

    # Online

    online: bool = False  # sample the pairs from the policy and let a reward tell which is better
    num_generations: Count = 2  # completions a prompt: the best and the worst of them are a pair

    @property
    def pairs_per_process(self) -> int:
        """Pairs of each process in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def completions_per_process(self) -> int:
        """Completions that each process samples at a time."""
        return self.pairs_per_process * self.num_generations

    @property
    def correction(self) -> str:
        # pairs have no weights
        return "none"

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers in the loss, by their names there."""
        from rlcore.kernels.formulas.pair_losses import Parameters

        return {each.name: getattr(self, each.name) for each in fields(Parameters)}

    @property
    def wants_reference(self) -> bool:
        from rlcore.kernels.formulas.pair_losses import PREFERENCE_LOSSES

        return any(PREFERENCE_LOSSES[name].uses_reference for name in self.loss_type)


def check_dpo_config(config: DPOConfig, reward_count: int) -> None:
    """Raise UserError for options out of their range or at odds with each other."""
    check_ranges(config)
    _check_loss(config)
    if config.ref_model is not None and not config.wants_reference:
        raise UserError(
            f"ref_model is set, but loss_type {' '.join(config.loss_type)} uses no reference"
        )
    if config.precompute_ref_log_probs and not config.wants_reference:
        raise UserError("precompute_ref_log_probs is set, but no loss_type uses a reference")
    if config.online:
        _check_online(config, reward_count)
        return
    check_train_config(config)
    if config.peft is not None and config.lora_dropout:
        raise UserError(
            "lora_dropout must be 0 here: the reference has none, and the policy is "
            "compared with it"
        )
    for field_ in fields(SamplingConfig):
        name = field_.name
        known = name in _OFFLINE or name in {train.name for train in fields(TrainConfig)}
        own = {each.name: each for each in fields(config)}[name]
        if not known and getattr(config, name) != default_of(own):
            raise UserError(f"{name} is for sampled pairs: add --online, or leave it out")


def _check_loss(config: DPOConfig) -> None:
    from rlcore.kernels.pairs.preference_loss import preference_options

    try:
        preference_options(
            config.loss_type,
            config.loss_weights,
            config.f_divergence_type,
            config.f_alpha_divergence_coef,
            **config.parameters,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_online(config: DPOConfig, reward_count: int) -> None:
    if config.num_generations < 2:
        raise UserError(f"num_generations must be at least 2, not {config.num_generations}: a pair")
    if config.importance_sampling_correction not in (None, "none"):
        raise UserError(
            "importance_sampling_correction weighs tokens, and a preference loss has pairs: leave "
            "it out"
        )
    if config.rejection is not None:
        raise UserError(
            "rejection leaves tokens out, and a preference loss has pairs: leave it out"
        )
    if config.precompute_ref_log_probs:
        raise UserError("precompute_ref_log_probs needs pairs that are there: leave out --online")
    check_sampling_config(config, reward_count, weight="loss_type")
