"""The options of every trainer that samples completions and has them judged, and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from rlcore.errors import UserError, unknown_name
from rlcore.runs.options import default_of
from rlcore.runs.ranges import Count, Natural, NotNegative, Positive, Share
from rlcore.trainers.options.base import TrainConfig, check_train_config
from rlcore.trainers.options.reward import RewardConfig, check_reward_options

COMPLETIONS_FORMATS = ("jsonl", "parquet")
SAMPLERS = ("local", "vllm")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none")
# LEVEL_KIND or LEVEL_REDUCTION_KIND of rl.rejection_mask
REJECTIONS = (
    *("token_k1", "token_k2", "token_k3", "sequence_sum_k1", "sequence_sum_k2", "sequence_sum_k3"),
    *("sequence_mean_k1", "sequence_mean_k2", "sequence_mean_k3"),
    *("sequence_max_k2", "sequence_max_k3"),
)


@dataclass(kw_only=True)
class SamplingConfig(RewardConfig, TrainConfig):
    """Sampling."""

    num_generations: Count = 1  # completions a prompt
    max_prompt_length: Count | None = 512  # of longer prompts the last tokens stay; None: all
    max_completion_length: Count = 512  # new tokens at most
    temperature: Positive = 1.0  # of sampling, and of the policy that is trained
    top_p: Share = 1.0  # sample from the likeliest tokens of this mass
    top_k: Natural = 0  # sample from this many of the likeliest tokens; 0: all
    # sampled completions of each held-out prompt, for mean@k and pass@k beside the greedy one's
    eval_num_generations: Natural = 0
    log_completions: Natural = 3  # completions of a batch to show and keep in completions.jsonl
    completions_format: str = "jsonl"  # or parquet: at the end they are in completions.parquet too

    # Sampler

    sampler: str = "local"  # who samples: local, this process; vllm, the servers at sampler_url
    sampler_url: list[str] = field(default_factory=list)  # http://HOST:PORT of each vLLM server
    sampler_timeout: Positive = 600.0  # seconds to wait for a server that does not answer
    sampler_requests: Count = 64  # prompts in flight at a time, of each process
    # where weights are put for the servers to read; None: a temporary directory of this machine
    sampler_weights_dir: str | None = None
    # the run ends where the log-probabilities of sampler and trainer differ by more on average
    sampler_tolerance: Positive = 0.05

    # Correction of what was sampled from another policy than the trainer's

    # importance weights, policy over sampler: token_truncate, token_mask, sequence_truncate,
    # sequence_mask or none; None: token_truncate where a server samples
    importance_sampling_correction: str | None = None
    importance_sampling_clip_max: Positive = 3.0  # their upper bound
    importance_sampling_clip_min: NotNegative = 0.0  # and their lower one
    # what the surrogate leaves out where r, policy over sampler, is out of bounds: token_k1 (r),
    # token_k2 ((log r)^2 / 2), token_k3 (r - 1 - log r), or all of a completion by its tokens:
    # sequence_sum_k1, sequence_mean_k1, the same with k2 and k3, sequence_max_k2, sequence_max_k3
    rejection: str | None = None
    rejection_upper: Positive | None = None  # the bound; None: none
    rejection_lower: Positive | None = None  # of k1 alone; None: none

    # Use of the rewards

    normalize_rewards: bool = False  # by the mean and std of all rewards of the run so far
    missing_eos_penalty: NotNegative | None = None  # taken off a completion that does not end
    mask_truncated_completions: bool = False  # leave completions without an end out of the loss

    # Reference

    ref_model: str | None = None  # the reference; None: where the policy starts

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps that one pass over a generation batch takes."""
        return 1

    @property
    def steps_per_batch(self) -> int:
        """Steps of the run, as max_steps counts them, that a generation batch serves."""
        return 1

    @property
    def micro_steps(self) -> int:
        """Micro-steps that a generation batch is cut into."""
        return self.gradient_accumulation_steps * self.updates_per_pass

    @property
    def completions_per_process(self) -> int:
        """Completions that each process samples at a time."""
        return self.per_device_train_batch_size * self.micro_steps

    @property
    def prompts_per_process(self) -> int:
        """Prompts that each process samples completions of at a time."""
        return self.completions_per_process // self.num_generations

    @property
    def correction(self) -> str:
        """One of CORRECTIONS."""
        usual = "none" if self.sampler == "local" else "token_truncate"
        return self.importance_sampling_correction or usual

    @property
    def wants_reference(self) -> bool:
        """Some term of this run asks for the reference's opinion."""
        return False


def check_sampling_config(config: SamplingConfig, reward_count: int, weight: str = "beta") -> None:
    """Raise UserError for options out of their range or at odds with each other.

    Args:
        reward_count: rewards that the run has.
        weight: the option that, where it is not 0, makes a reference wanted.
    """
    check_train_config(config)
    if config.completions_format not in COMPLETIONS_FORMATS:
        raise unknown_name("completions_format", config.completions_format, COMPLETIONS_FORMATS)
    _check_sampler(config)
    _check_correction(config)
    if config.peft is not None and config.lora_dropout:
        raise UserError(
            "lora_dropout must be 0 here: a policy's ratio to its older self means nothing where "
            "each pass draws another network"
        )
    completions = config.completions_per_process
    if completions % config.num_generations:
        raise UserError(
            f"a process samples per_device_train_batch_size x micro-steps = "
            f"{config.per_device_train_batch_size} x {config.micro_steps} = {completions} "
            f"completions at a time, which num_generations ({config.num_generations}) must divide"
        )
    if reward_count == 0:
        raise UserError(
            "no reward: give --reward NAME, --reward package.module:function or --reward-model DIR"
        )
    check_reward_options(config, config.max_completion_length)
    if config.reward_weights is not None and len(config.reward_weights) != reward_count:
        raise UserError(
            f"reward_weights has {len(config.reward_weights)} entries for {reward_count} rewards"
        )
    if config.ref_model is not None and not config.wants_reference:
        raise UserError(
            f"ref_model is set, but with {weight} 0 no reference is used: set {weight} too"
        )


def _check_sampler(config: SamplingConfig) -> None:
    if config.sampler not in SAMPLERS:
        raise unknown_name("sampler", config.sampler, SAMPLERS)
    if config.sampler == "local":
        for each in fields(SamplingConfig):
            is_set = getattr(config, each.name) != default_of(each)
            if each.name.startswith("sampler_") and is_set:
                raise UserError(
                    f"{each.name} is set, but this process samples: add --sampler vllm, or leave "
                    "it out"
                )
        return
    if not config.sampler_url:
        raise UserError(
            "sampler vllm needs the servers' addresses: give --sampler-url http://HOST:PORT, and "
            "start one with `rlcore serve`"
        )
    for url in config.sampler_url:
        if not re.fullmatch(r"https?://[^\s/?#,]+(/[^\s?#,]*)?", url):
            raise UserError(f"sampler_url {url!r} is no http://HOST:PORT")
    place = config.sampler_weights_dir
    if place is not None and not Path(place).is_dir():
        raise UserError(
            f"sampler_weights_dir {place} is no directory: make one that the servers can read"
        )


def _check_correction(config: SamplingConfig) -> None:
    _check_rejection(config)
    chosen = config.importance_sampling_correction
    if chosen not in (None, *CORRECTIONS):
        raise unknown_name("importance_sampling_correction", chosen, CORRECTIONS)
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if low > high:
        raise UserError(
            f"importance_sampling_clip_min ({low:g}) must not be above "
            f"importance_sampling_clip_max ({high:g})"
        )
    if config.correction == "none":
        for each in fields(SamplingConfig):
            is_set = getattr(config, each.name) != default_of(each)
            if each.name.startswith("importance_sampling_clip_") and is_set:
                raise UserError(
                    f"{each.name} is set, but nothing is corrected: set "
                    "importance_sampling_correction too, or leave it out"
                )


def _check_rejection(config: SamplingConfig) -> None:
    chosen, low, high = config.rejection, config.rejection_lower, config.rejection_upper
    if chosen is None:
        for name in ("rejection_lower", "rejection_upper"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"{name} is set, but nothing is rejected: set rejection too, or leave it out"
                )
        return
    if chosen not in REJECTIONS:
        raise unknown_name("rejection", chosen, REJECTIONS)
    is_ratio = chosen.endswith("k1")
    if low is not None and not is_ratio:
        raise UserError(
            f"rejection_lower bounds ratios, and rejection {chosen} is a distance: leave it out"
        )
    if low is None and high is None:
        lower = " or rejection_lower" if is_ratio else ""
        raise UserError(f"rejection {chosen} needs rejection_upper{lower}: set a bound")
    if low is not None and high is not None and low > high:
        raise UserError(f"rejection_lower ({low:g}) must not be above rejection_upper ({high:g})")
