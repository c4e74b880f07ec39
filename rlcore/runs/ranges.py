"""What values an option may take, said beside its field and checked in one place.

    learning_rate: Positive = 1e-6
    top_p: Share = 1.0

An option without a range may be any finite number; None and text are not looked at.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Annotated, Any

from rlcore.errors import UserError
from rlcore.runs.options import init_fields


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; infinite ones are outside unless `infinite`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # `low` itself is outside
    open_high: bool = False  # `high` itself is outside
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        # a whole number is finite, and may be too large for a float
        return above and below and (self.infinite or isinstance(value, int) or math.isfinite(value))

    def refusal(self, value: float) -> str:
        """What the value must be, and what it is: "at least 1, not 0"."""
        unbounded = isinstance(value, float) and not math.isfinite(value) and self.high == math.inf
        wanted = [text for text in (self._text, unbounded and "finite") if text]
        return f"{' and '.join(dict.fromkeys(wanted))}, not {value}"

    @property
    def _text(self) -> str:
        if self.high < math.inf:
            return f"in {'[('[self.open_low]}{self.low}, {self.high}{'])'[self.open_high]}"
        if self.low == -math.inf:
            return "finite"
        return "positive" if (self.low, self.open_low) == (0, True) else f"at least {self.low}"


Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, open_low=True)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Steps = Annotated[int, Range(-1)]  # -1: as many as the data gives
Length = Annotated[int, Range(2)]  # of a sequence: nothing predicts its first token
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what random number generators take


def check_ranges(config: Any) -> None:
    """Raise UserError for the first option of a dataclass that is out of its range."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name in init_fields(type(config)):
        allowed = _range_of(hints[name])
        if allowed is None:
            continue
        for value in _numbers(getattr(config, name)):
            if not isinstance(value, Real):
                raise UserError(f"{name} must be a number, not {value!r}")
            if value not in allowed:
                raise UserError(f"{name} must be {allowed.refusal(value)}")


def _range_of(hint: Any) -> Range | None:
    """The range in a type: of the number, of the one that may be None, or of a list's entries."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Range):
            return part
    if hint in (int, float):
        return Range()
    found = (_range_of(part) for part in typing.get_args(hint))
    return next((each for each in found if each is not None), None)


def _numbers(value: Any) -> Iterator[Any]:
    """An option's values: itself, its entries where it is several, nothing of a None."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    elif value is not None:
        yield value
