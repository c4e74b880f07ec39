"""Config dataclasses that check themselves: each mistake is a sentence, where it is made.

    @dataclass(kw_only=True)
    class TrainConfig(Checked): ...

    TrainConfig(learning_rte=1e-5)   UserError: TrainConfig has no option 'learning_rte'; ...
    MergeConfig(adapter="a")         UserError: MergeConfig needs output_dir: ...

A lone value where a list is wanted becomes a list of one, a path text, a number of numpy's a plain
one. Ranges are those beside the fields, see `rlcore.runs.ranges`.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from rlcore.errors import UserError
from rlcore.runs.aliases import unknown_option
from rlcore.runs.options import OBJECT, init_fields, type_name
from rlcore.runs.ranges import check_ranges

_SHOWN = (str, bool, int, float, type(None), list, tuple, dict)


class Checked:
    """Base of config dataclasses: names, types and ranges are checked as one is made.

    A field with OBJECT in its metadata may hold anything: the thing itself instead of its name.
    """

    if not TYPE_CHECKING:  # what type checkers read is the dataclass's own __init__

        def __new__(cls, *positional: Any, **options: Any) -> Any:
            known = init_fields(cls)
            if positional:
                given = f"{positional[0]!r:.80}"
                raise UserError(f"options of a {cls.__name__} are given by name: not {given}")
            for name in options:
                if name not in known:
                    answer = unknown_option(name, known)
                    raise UserError(f"{cls.__name__} has no option {name!r}{answer}")
            missing = [name for name in known if name not in options and _is_wanted(known[name])]
            if missing:
                raise UserError(
                    f"{cls.__name__} needs {', '.join(missing)}: give every one by name"
                )
            return super().__new__(cls)

        def __reduce__(self) -> Any:  # a copy is checked already, and is not made from options
            return object.__new__, (type(self),), vars(self)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name, field in init_fields(type(self)).items():
            value = getattr(self, name)
            is_missing = value is None and field.default is None  # what is required is asked later
            if not is_missing:
                setattr(self, name, _typed(field, value, hints[name]))
        check_ranges(self)


def _is_wanted(field: dataclasses.Field) -> bool:
    """Whether `__init__` takes no default for it."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(field: dataclasses.Field, value: Any, hint: Any) -> Any:
    try:
        return as_type(value, hint)
    except TypeError:
        if OBJECT in field.metadata:
            return value
    shown = f"{value!r:.80}" if isinstance(value, _SHOWN) else f"a {type(value).__name__}"
    raise UserError(f"{field.name} must be {type_name(hint)}, not {shown}")


def as_type(value: Any, hint: Any) -> Any:
    """`value` as the type of a config's field; raises TypeError where it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for each in typing.get_args(hint):
            try:
                return as_type(value, each)
            except TypeError:
                continue
        raise TypeError(hint)
    if typing.get_origin(hint) is list:
        (entry,) = typing.get_args(hint)
        values = value if isinstance(value, list | tuple) else [value]
        return [as_type(each, entry) for each in values]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise TypeError(hint)
        key, entry = typing.get_args(hint)
        return {as_type(name, key): as_type(each, entry) for name, each in value.items()}
    return _AS[hint](value)


def _text(value: Any) -> str:
    text = os.fspath(value)  # raises TypeError for what is neither text nor a path
    return text if isinstance(text, str) else _refuse(value)


def _truth(value: Any) -> bool:
    # bool, and numpy's
    return bool(value) if type(value).__name__ in ("bool", "bool_") else _refuse(value)


def _whole(value: Any) -> int:
    return (
        int(value) if isinstance(value, Integral) and value is not bool(value) else _refuse(value)
    )


def _number(value: Any) -> float:
    if isinstance(value, Integral):
        return _whole(value)
    return float(value) if isinstance(value, Real) else _refuse(value)


def _nothing(value: Any) -> None:
    return None if value is None else _refuse(value)


def _refuse(value: Any) -> Any:
    raise TypeError(f"{value!r:.80}")


_AS = {str: _text, bool: _truth, int: _whole, float: _number, type(None): _nothing}
