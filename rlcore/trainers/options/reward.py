"""The options of everything that judges completions."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlcore.errors import UserError
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count


@dataclass(kw_only=True)
class RewardConfig(Checked):
    """Reward."""

    # package.module:function or path/to/file.py:function of your own, or arithmetic, code_runs,
    # exact_match, math_verify, regex_match, repetition_penalty, soft_overlong_punishment,
    # think_format
    reward: list[str] = field(default_factory=list)
    code_sandbox: str | None = None  # package.module:function that runs code_runs' programs
    # soft_overlong_punishment: the tokens before max_completion_length over which it falls from 0
    # to -1; None: a fifth of them
    soft_punish_cache: Count | None = None
    repetition_ngram_size: Count = 3  # repetition_penalty: the tokens of what may not be repeated
    reward_model: str | None = None  # a trained reward model; may stand beside other rewards
    reward_weights: list[float] | None = None  # one a reward, the model's last; None: 1 each


def check_reward_options(config: RewardConfig, max_length: int) -> None:
    """Raise UserError for options of a reward that is not there, or not within `max_length`."""
    default = type(config).__dataclass_fields__
    for option, reward in (
        ("code_sandbox", "code_runs"),
        ("soft_punish_cache", "soft_overlong_punishment"),
        ("repetition_ngram_size", "repetition_penalty"),
    ):
        is_set = getattr(config, option) != default[option].default
        if is_set and reward not in config.reward:
            raise UserError(f"{option} is set, but the reward {reward}, which it serves, is not")
    cache = config.soft_punish_cache
    if cache is not None and cache > max_length:
        raise UserError(
            f"soft_punish_cache ({cache}) must be at most max_completion_length ({max_length}), of "
            "which it is a part"
        )
