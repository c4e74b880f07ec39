"""Reward functions: by built-in name or by import path, run and checked.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`: the batch's prompts
and completions (messages for chat prompts, as in TRL) and the data's other columns, one entry a
completion; and `completion_ids`, the sampled tokens, where it takes them. None says that it has no
opinion on a completion.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.errors import UserError, nearest
from rlcore.sandbox import run_python

RewardFunction = Callable[..., list]
CODE_SECONDS = 5.0


@dataclass(frozen=True)
class Rewards:
    """What the reward functions gave for N completions."""

    total: torch.Tensor  # (N,) float32: the weighted sum; NaN where no function had an opinion
    per_function: torch.Tensor  # (N, F) float32, NaN where function f had none

    @property
    def judged(self) -> torch.Tensor:
        """(N,) bool: at least one function had an opinion."""
        return ~self.total.isnan()


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, be it text or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def exact_match(prompts: list, completions: list, answer: list[str], **_: Any) -> list[float]:
    """1.0 where the completion, spaces around it aside, is the column `answer`."""
    return [
        float(completion_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def regex_match(prompts: list, completions: list, pattern: list[str], **_: Any) -> list[float]:
    """1.0 where the whole completion matches the column `pattern`, a regular expression."""
    return [
        float(re.fullmatch(wanted, completion_text(completion), re.DOTALL) is not None)
        for completion, wanted in zip(completions, pattern, strict=True)
    ]


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


def code_runs(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1.0 where the completion's Python code, followed by the column `tests` if any, exits with 0.

    The code is the last fenced block, or the whole completion. It runs in a process of its own with
    limits on time and memory: a fence against accidents, not against an attacker.
    """
    tests = columns.get("tests") or [""] * len(completions)
    programs = [
        f"{_last_code_block(completion_text(completion))}\n{test or ''}\n"
        for completion, test in zip(completions, tests, strict=True)
    ]
    return [float(run_python(program, seconds=CODE_SECONDS)) for program in programs]


def _last_code_block(text: str) -> str:
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


def arithmetic(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1.0 where the embedded task's verifier finds the column `answer`."""
    from rlcore.tasks.arithmetic import correct

    return correct(prompts, completions, **columns)


REWARDS: dict[str, RewardFunction] = {
    "arithmetic": arithmetic,
    "code_runs": code_runs,
    "exact_match": exact_match,
    "math_verify": math_verify,
    "regex_match": regex_match,
    "think_format": think_format,
}


def load_reward(name: str) -> RewardFunction:
    """The built-in reward called `name`, or the function at "package.module:function".

    Modules of the working directory can be imported.

    Raises:
        UserError: an unknown name (the known ones are listed), a module that cannot be imported, or
            one without that function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        guess = nearest(name, REWARDS)
        raise UserError(
            f"unknown reward {name!r}.{f' Did you mean {guess!r}?' if guess else ''} "
            f"Known: {', '.join(sorted(REWARDS))}, or package.module:function"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # The module is the user's: whatever it raises on import is the reason.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"reward {name!r}: cannot import {module_name!r}: {reason}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward {name!r}: {module_name!r} has no function {function_name!r}")
    return function


def reward_name(function: RewardFunction) -> str:
    """The name that metrics and errors give it: the function's own."""
    return getattr(function, "__name__", type(function).__name__)


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

    Args:
        weights: one a function; None weighs all of them by 1.
        prompts, completions: N each, texts; for chat prompts the functions get the completion as
            one assistant message, as in TRL.
        columns: the data's other columns, N entries each.
        completion_ids: the tokens of each completion, for the functions that take them.

    Raises:
        UserError: a function raised, gave another count than N, or something other than finite
            numbers and None; it is named, with what came.
        ValueError: as many weights as functions are needed.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(f"{len(weights)} reward weights for {len(functions)} reward functions")
    shown = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    scores = []
    for function in functions:
        given = dict(columns)
        if completion_ids is not None and _takes_tokens(function):
            given["completion_ids"] = completion_ids
        scores.append(_call(function, list(prompts), shown, given))
    per_function = torch.tensor(scores, dtype=torch.float32).T  # (N, F)
    weighted = per_function * torch.tensor(weights, dtype=torch.float32)
    total = torch.where(per_function.isnan().all(1), torch.nan, weighted.nansum(1))
    return Rewards(total, per_function)


def _takes_tokens(function: RewardFunction) -> bool:
    """Whether it has a parameter for them, or takes whatever comes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "completion_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _call(
    function: RewardFunction, prompts: list, completions: list, columns: Mapping[str, Sequence]
) -> list[float]:
    """The function's N rewards, None as NaN."""
    name = reward_name(function)
    try:
        scores = function(prompts=prompts, completions=completions, **columns)
    except UserError:
        raise
    except Exception as error:
        # The function is the user's: the error it raised is what they need to see.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"reward function {name!r} raised {reason}") from error
    if isinstance(scores, torch.Tensor):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise UserError(
            f"reward function {name!r} must return a list of {len(completions)} numbers, "
            f"not {type(scores).__name__}"
        )
    if len(scores) != len(completions):
        raise UserError(
            f"reward function {name!r} returned {len(scores)} rewards for "
            f"{len(completions)} completions"
        )
    return [_number(score, name, index) for index, score in enumerate(scores)]


def _number(score: Any, name: str, index: int) -> float:
    if score is None:
        return math.nan
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(score, str) or not math.isfinite(value):
        raise UserError(
            f"reward function {name!r} returned {score!r} for completion {index}: "
            "a reward is a finite number or None"
        )
    return value
