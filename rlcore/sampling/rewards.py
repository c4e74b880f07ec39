"""Reward functions: by built-in name or by import path, run and checked.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`: the batch's prompts
and completions (messages for chat prompts, as in TRL) and the data's other columns, one entry a
completion; and `completion_ids`, the sampled tokens, where it takes them. None says that it has no
opinion on a completion. An array or tensor of N numbers will do, and so will an `async` function.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch

from rlcore.errors import UserError, nearest
from rlcore.sampling.code_reward import code_runs, completion_text
from rlcore.sampling.length_reward import repetition_penalty, soft_overlong_punishment
from rlcore.sampling.reward_call import (
    LARGEST_REWARD,
    RewardCall,
    RewardFunction,
    RewardLike,
    reward_name,
)
from rlcore.sampling.user_code import import_function

REGEX_SECONDS = 1.0
# what a reward function is called with besides the data's columns
GIVEN = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Rewards:
    """What the reward functions gave for N completions."""

    total: torch.Tensor  # (N,) float32: the weighted sum; NaN where no function had an opinion
    per_function: torch.Tensor  # (N, F) float32, NaN where function f had none

    @property
    def judged(self) -> torch.Tensor:
        """(N,) bool: at least one function had an opinion."""
        return ~self.total.isnan()


def exact_match(prompts: list, completions: list, answer: list[str], **_: Any) -> list[float]:
    """1.0 where the completion, spaces around it aside, is the column `answer`."""
    return [
        float(completion_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def regex_match(prompts: list, completions: list, pattern: list[str], **_: Any) -> list[float]:
    """1.0 where the whole completion matches the column `pattern`, a regular expression.

    A match that takes more than about REGEX_SECONDS is none: some patterns would take years.
    """
    return [
        float(_matches(wanted, completion_text(completion)))
        for completion, wanted in zip(completions, pattern, strict=True)
    ]


def _matches(pattern: str, text: str) -> bool:
    # The standard library's `re` cannot be stopped.
    try:
        found = regex.fullmatch(pattern, text, regex.DOTALL | regex.VERSION0, timeout=REGEX_SECONDS)
    except TimeoutError:
        return False
    return found is not None


def think_format(prompts: list, completions: list, **_: Any) -> list[float]:
    """1.0 for `<think> ... </think>` followed by an answer, each tag once."""
    return [float(_is_one_thought(completion_text(completion))) for completion in completions]


def _is_one_thought(text: str) -> bool:
    thought, end, answer = text.partition("</think>")
    tags = text.count("<think>") == 1 and text.count("</think>") == 1
    return tags and bool(end and answer.strip()) and thought.lstrip().startswith("<think>")


def math_verify(
    prompts: list, completions: list, answer: list[str], **_: Any
) -> list[float | None]:
    """1.0 where the library math-verify finds the completion equal to the column `answer`.

    None where it cannot parse the answer itself. Needs `pip install math-verify`.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("the reward 'math_verify' needs `pip install math-verify`") from None
    scores: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        wanted = parse(str(gold))
        scores.append(float(verify(wanted, parse(completion_text(completion)))) if wanted else None)
    return scores


def arithmetic(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1.0 where the embedded task's verifier finds the column `answer`."""
    from rlcore.demo.arithmetic import correct

    return correct(prompts, completions, **columns)


REWARDS: dict[str, RewardFunction] = {
    "arithmetic": arithmetic,
    "code_runs": code_runs,
    "exact_match": exact_match,
    "math_verify": math_verify,
    "regex_match": regex_match,
    "repetition_penalty": repetition_penalty,
    "soft_overlong_punishment": soft_overlong_punishment,
    "think_format": think_format,
}

# what TRL's command line calls its own, and what stands for them here
_OF_TRL = "where TRL is installed trl.rewards.{} is that function"
TRL_REWARDS = {
    "accuracy_reward": f"take math_verify, which compares with the column 'answer'; or "
    f"{_OF_TRL.format('accuracy_reward')}, which wants the column 'solution'",
    "reasoning_accuracy_reward": _OF_TRL.format("reasoning_accuracy_reward"),
    "think_format_reward": f"take think_format; or {_OF_TRL.format('think_format_reward')}",
    "get_soft_overlong_punishment": "take soft_overlong_punishment, whose lengths are "
    "max_completion_length and soft_punish_cache",
    "get_repetition_penalty_reward": "take repetition_penalty, with repetition_ngram_size",
}


def load_reward(name: str) -> RewardFunction:
    """The built-in reward called `name`, or the user's function that it points at.

    That is "package.module:function", "package.module.function" or "path/to/file.py:function";
    modules of the working directory can be imported.

    Raises:
        UserError: an unknown name (the known ones are listed), a module that cannot be imported, or
            one without that function.
    """
    if name in REWARDS:
        return REWARDS[name]
    if "/" in name and ".py" not in name:
        raise UserError(
            f"reward {name!r} is no function's place: a model of rewards is named as reward_model, "
            "and a function as package.module:function or path/to/file.py:function"
        )
    if ":" not in name and "." not in name:
        if name in TRL_REWARDS:
            raise UserError(f"reward {name!r} is TRL's: {TRL_REWARDS[name]}")
        guess = nearest(name, REWARDS)
        raise UserError(
            f"unknown reward {name!r}.{f' Did you mean {guess!r}?' if guess else ''} "
            f"Known: {', '.join(sorted(REWARDS))}, or package.module:function"
        )
    return import_function("reward", name)


def as_functions(given: RewardLike | Sequence[RewardLike] | None) -> list[RewardFunction]:
    """One reward function or several, each itself or by its name, as functions.

    Raises:
        UserError: what is no function, or a name that names none.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    functions = [load_reward(each) if isinstance(each, str) else each for each in several]
    for each in functions:
        if isinstance(each, torch.nn.Module):
            raise UserError(
                f"reward_funcs holds a {type(each).__name__}: save the model with its tokenizer, "
                "and name its directory as reward_model"
            )
        if not callable(each):
            raise UserError(f"reward_funcs holds {each!r:.80}, which is neither function nor name")
    return functions


def compute_rewards(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    prompts: Sequence[str | list[dict]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    completion_ids: Sequence[list[int]] | None = None,
) -> Rewards:
    """Run every reward function on N completions and add the rewards up by `weights`.

    Without a function no completion is judged: totals (N,) are NaN.

    Args:
        weights: one a function; None weighs all of them by 1.
        prompts, completions: N each, texts; for chat prompts the functions get the completion as
            one assistant message, as in TRL.
        columns: the data's other columns, N entries each.
        completion_ids: the tokens of each completion, for the functions that take them.

    Raises:
        UserError: a function raised (told with file, line and row), gave another count than N, or
            something other than finite numbers and None; it is named, with what came.
        ValueError: as many weights as functions are needed.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(f"{len(weights)} reward weights for {len(functions)} reward functions")
    shown = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    calls = []
    for function in functions:
        given = dict(columns)
        if completion_ids is not None and _takes_tokens(function):
            given["completion_ids"] = completion_ids
        calls.append(RewardCall(function, list(prompts), shown, given))
    # all begin before any is waited for: asynchronous ones run while others do
    for call in calls:
        call.begin()
    scores = [call.scores() for call in calls]
    per_function = torch.tensor(scores, dtype=torch.float32).view(len(calls), len(completions)).T
    weighted = per_function * torch.tensor(weights, dtype=torch.float32)
    total = torch.where(per_function.isnan().all(1), torch.nan, weighted.nansum(1))
    if (total.abs() > LARGEST_REWARD).any():
        largest = total.abs().nan_to_num(0).max().item()
        raise UserError(
            f"rewards times reward_weights come to {largest:g}, and advantages square them: scale "
            f"them down to {LARGEST_REWARD:g} at most"
        )
    return Rewards(total, per_function)


def check_columns(functions: Sequence[RewardFunction], names: Sequence[str], source: str) -> None:
    """Raise UserError where the functions cannot be called with the data's columns.

    Args:
        names: the columns' names; source: what the data is called.
    """
    for name in GIVEN:
        if name in names:
            raise UserError(
                f"{source}: a column is called {name!r}, as reward functions call what the policy "
                "was given or wrote: rename it"
            )
    for function in functions:
        given = {"prompts", "completions", *names} - {"prompt"}
        if _takes_tokens(function):
            given.add("completion_ids")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            continue
        try:
            signature.bind(**dict.fromkeys(given))
        except TypeError as error:
            raise UserError(
                f"{source}: reward function {reward_name(function)!r} cannot be called with "
                f"{', '.join(sorted(given))}: {error}"
            ) from error


def _takes_tokens(function: RewardFunction) -> bool:
    """Whether it has a parameter for them, or takes whatever comes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "completion_ids" or p.kind is p.VAR_KEYWORD for p in parameters)
