"""One call of a reward function on a batch: begun, waited for, and what it gave checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from rlcore.errors import UserError
from rlcore.sampling.started import started
from rlcore.sampling.user_code import explain

RewardFunction = Callable[..., Any]  # gives N numbers, or a coroutine of them
RewardLike: TypeAlias = "str | RewardFunction"  # or its name
LARGEST_REWARD = 1e18  # float32 holds the sum of the squares of a batch of them


def reward_name(function: RewardFunction) -> str:
    """The name that metrics and errors give it: the function's own."""
    return getattr(function, "__name__", type(function).__name__)


class RewardCall:
    """A reward function at work on a batch."""

    def __init__(
        self,
        function: RewardFunction,
        prompts: list,
        completions: list,
        columns: Mapping[str, Sequence],
    ):
        self._function = function
        self._given = (prompts, completions, columns)

    def begin(self) -> None:
        """Call the function; an asynchronous one goes on while others run."""
        prompts, completions, columns = self._given
        with self._explained():
            self._result = started(
                self._function, prompts=prompts, completions=completions, **columns
            )

    def scores(self) -> list[float]:
        """The N rewards, None as NaN."""
        name, count = reward_name(self._function), len(self._given[1])
        with self._explained():
            scores = self._result()
        if hasattr(scores, "tolist"):  # a tensor, an array
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            raise UserError(
                f"reward function {name!r} must return a list of {count} numbers, "
                f"not {type(scores).__name__}"
            )
        if len(scores) != count:
            raise UserError(
                f"reward function {name!r} returned {len(scores)} rewards for {count} completions"
            )
        return [_number(score, name, index) for index, score in enumerate(scores)]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """The function is the user's: the error it raised is what they need to see."""
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            reason = explain(error, self._function, *self._given)
            name = reward_name(self._function)
            raise UserError(f"reward function {name!r} raised {reason}") from error


def _number(score: Any, name: str, index: int) -> float:
    if score is None:
        return math.nan
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(score, str) or not math.isfinite(value) or abs(value) > LARGEST_REWARD:
        raise UserError(
            f"reward function {name!r} returned {score!r} for completion {index}: "
            f"a reward is a finite number of {LARGEST_REWARD:g} at most, or None"
        )
    return value
