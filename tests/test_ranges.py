"""Every number that an option may be is known beside its field, and asked for by every command."""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from dataclasses import dataclass
from typing import Annotated

import pytest

from rlcore.cli import COMMANDS, main
from rlcore.errors import UserError
from rlcore.runs.options import default_of, init_fields
from rlcore.runs.ranges import (
    BelowOne,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Range,
    Share,
    check_ranges,
)

NAN, INF = math.nan, math.inf
# beside infinity, what no number of the library's options may be
FAR = {float: (NAN, INF, -INF), int: (-(10**9),)}
# (option, value) that means something
ALLOWED = {("limit_seconds", INF)}


@dataclass
class Options:
    count: Count = 1
    positive: Positive = 1.0
    not_negative: NotNegative | None = 1.0
    fraction: Fraction = 1.0
    share: Share = 1.0
    below_one: BelowOne = 0.5
    several: list[Positive] | None = None
    any_finite: float = 0.0
    forever: Annotated[float, Range(0, infinite=True)] = INF
    name: str = "nan"
    flag: bool = False


def config_class(command: str) -> type:
    found = COMMANDS[command]
    return getattr(importlib.import_module(found.module), found.config)


def numeric_options(cls: type) -> list[tuple[str, type, bool]]:
    """(name, int or float, whether a list of them) of a config's numbers."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        text = str(hint)
        kinds = [kind for kind in (float, int) if hint is kind or kind.__name__ in text]
        if kinds and hint is not bool and "Literal" not in text:
            found.append((name, kinds[0], "list[" in text))
    return found


def far_values() -> list[tuple[str, str, object]]:
    return [
        (command, name, [value] if many else value)
        for command in COMMANDS
        for name, kind, many in numeric_options(config_class(command))
        for value in FAR[kind]
        if (name, value) not in ALLOWED
    ]


def filled(cls: type, **values: object) -> object:
    required = [n for n, f in init_fields(cls).items() if default_of(f) is dataclasses.MISSING]
    return cls(**(dict.fromkeys(required, "x") | values))


def test_there_are_numbers_to_ask_about():
    assert len(far_values()) > 300
    assert ("train sft", "adam_beta2", NAN) in far_values()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_of_every_command_are_in_range(command):
    check_ranges(filled(config_class(command)))


def test_numbers_far_out_are_refused_by_name_in_every_config():
    for command, name, value in far_values():
        with pytest.raises(UserError, match=rf"^{name} must be .*, not "):
            check_ranges(filled(config_class(command), **{name: value}))


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if numeric_options(config_class(name))]
)
def test_every_command_asks_before_it_does_anything(command, capsys):
    """One flag each is enough: one function looks at all of them."""
    cls = config_class(command)
    flags = [word for name, field in init_fields(cls).items()
             if default_of(field) is dataclasses.MISSING
             for word in (f"--{name}", "/nowhere/at/all")]  # fmt: skip
    name, kind, _ = numeric_options(cls)[-1]
    bad = {float: "nan", int: "-7"}[kind]
    assert main([*command.split(), *flags, f"--{name}", bad]) == 2
    shown = capsys.readouterr().err
    assert f"error: {name} must be" in shown and f"not {bad}" in shown


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("count", [1, 10**400], [0, -1]),
        ("positive", [1e-300, 1e300], [0.0, -1.0, INF, NAN]),
        ("not_negative", [0.0, None], [-1e-300, INF, -INF, NAN]),
        ("fraction", [0.0, 1.0], [-1e-9, 1 + 1e-9, NAN, INF]),
        ("share", [1e-300, 1.0], [0.0, 1.1, NAN]),
        ("below_one", [0.0, 0.999], [1.0, -0.1, NAN]),
        ("several", [None, [], [1.0, 2.0]], [[1.0, 0.0], [INF], ["x"]]),
        ("any_finite", [-1e300, 3], [NAN, INF, "3"]),
        ("forever", [0.0, INF], [-1.0, NAN]),
    ],
)
def test_the_ends_of_a_range_by_hand(name, inside, outside):
    for value in inside:
        check_ranges(Options(**{name: value}))
    for value in outside:
        with pytest.raises(UserError, match=name):
            check_ranges(Options(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"positive": INF}, "positive must be positive and finite, not inf"),
        ({"positive": 0.0}, "positive must be positive, not 0.0"),
        ({"not_negative": NAN}, "not_negative must be at least 0 and finite, not nan"),
        ({"below_one": 1.5}, "below_one must be in [0, 1), not 1.5"),
        ({"share": 0.0}, "share must be in (0, 1], not 0.0"),
        ({"any_finite": -INF}, "any_finite must be finite, not -inf"),
    ],
)
def test_the_sentence_names_the_option_its_range_and_what_came(changes, sentence):
    with pytest.raises(UserError) as caught:
        check_ranges(Options(**changes))
    assert str(caught.value) == sentence
