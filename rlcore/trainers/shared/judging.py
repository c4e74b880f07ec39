"""Who judges completions: the reward functions of a run, their names and weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.models.reward_model import RewardModel
from rlcore.sampling import sandbox
from rlcore.sampling.code_reward import code_runs, code_runs_in
from rlcore.sampling.length_reward import (
    repetition_of,
    repetition_penalty,
    soft_overlong_punishment,
    soft_overlong_within,
)
from rlcore.sampling.rewards import (
    RewardFunction,
    RewardLike,
    Rewards,
    as_functions,
    compute_rewards,
    load_reward,
    reward_name,
)
from rlcore.sampling.rollout import Rollout
from rlcore.trainers.options.reward import RewardConfig


@dataclass(frozen=True)
class Judge:
    """The run's reward functions, their names in the metrics, and their weights."""

    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None

    def __call__(self, columns: Mapping[str, Sequence], rollout: Rollout) -> Rewards:
        """The rewards of N completions; `columns` has the data's, N entries each."""
        others = {name: values for name, values in columns.items() if name != "prompt"}
        return compute_rewards(
            self.functions,
            self.weights,
            columns["prompt"],
            rollout.completions,
            others,
            completion_ids=_unpadded(rollout),
        )

    def prepare(self, tokenizer: Any, device: torch.device) -> None:
        """Load the reward models among the functions, for a policy with that tokenizer.

        Where programs are run, one line on stderr says what holds them.
        """
        for model in self.reward_models:
            model.prepare(tokenizer, device)
        if code_runs in self.functions and os.environ.get("RANK", "0") == "0":
            print(sandbox.describe(), file=sys.stderr)

    @property
    def reward_models(self) -> list[RewardModel]:
        """Those of the functions that are models."""
        return [each for each in self.functions if isinstance(each, RewardModel)]


def _unpadded(rollout: Rollout) -> list[list[int]]:
    """Each completion's tokens, up to and with eos."""
    pairs = zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def _with_options(function: RewardFunction, config: RewardConfig) -> RewardFunction:
    """A built-in reward as the config's options of it have it; any other as it is."""
    if function is code_runs and config.code_sandbox is not None:
        return code_runs_in(config.code_sandbox)
    if function is soft_overlong_punishment:
        return soft_overlong_within(config.max_completion_length, config.soft_punish_cache)
    if function is repetition_penalty:
        return repetition_of(config.repetition_ngram_size)
    return function


def make_judge(
    config: RewardConfig, functions: RewardLike | Sequence[RewardLike] | None = None
) -> Judge:
    """The config's rewards, and the `functions` besides; like names get a number each."""
    models = () if config.reward_model is None else (RewardModel(config.reward_model),)
    named = [_with_options(load_reward(name), config) for name in config.reward]
    functions = (*named, *as_functions(functions), *models)
    weights = config.reward_weights
    own = [reward_name(function) for function in functions]
    unique = tuple(
        name if own.count(name) == 1 else f"{name}_{own[:index].count(name)}"
        for index, name in enumerate(own)
    )
    return Judge(functions, unique, None if weights is None else tuple(weights))
