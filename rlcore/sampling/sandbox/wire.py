"""Plain values over a pipe: one JSON line a message, nothing that runs code as it is read.

    None, bool, float, str, list    themselves (an int too, below 2**63)
    everything else                 {tag: payload}

Containers and the standard library's number and date types travel by value; what is none of them
is the business of the `other` that a side gives (a reference, a callback, something importable).
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import importlib
import json
import pathlib
import sys
import types
from collections.abc import Callable, ItemsView, KeysView
from typing import Any, BinaryIO

MESSAGE_BYTES = 32 << 20
_SMALL = 1 << 63

_SEQUENCES = {kind.__name__: kind for kind in (tuple, set, frozenset, collections.deque)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, collections.OrderedDict, collections.Counter)}
# type: what its constructor takes to make the same value again
_PARTS: dict[type, Callable[[Any], list]] = {
    complex: lambda value: [value.real, value.imag],
    range: lambda value: [value.start, value.stop, value.step],
    fractions.Fraction: lambda value: [value.numerator, value.denominator],
    decimal.Decimal: lambda value: [str(value)],
    datetime.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    datetime.date: lambda value: [value.year, value.month, value.day],
    type(pathlib.Path()): lambda value: [str(value)],
    type(pathlib.PurePath()): lambda value: [str(value)],
}
# aware ones come with their offset, and are equal
_ISO = {kind.__name__: kind for kind in (datetime.datetime, datetime.time)}
_BUILT = {kind.__name__: kind for kind in _PARTS}
_PRIVATE = ("__main__", __name__.partition(".")[0])
_BASES = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset)


class Closed(RuntimeError):
    """The other side is gone, or said something that is no message."""


def send(pipe: BinaryIO, message: Any) -> None:
    """Write one message."""
    try:
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()
    except OSError as error:
        raise Closed("the pipe is closed") from error


def receive(pipe: BinaryIO) -> Any:
    """Read one message. Raises Closed at the end, and for what is too long or no JSON."""
    line = pipe.readline(MESSAGE_BYTES)
    if not line.endswith(b"\n"):
        raise Closed("no whole message came")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Closed("what came is no message") from error


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """`value` as JSON knows it; `other` encodes what is no plain value, or raises TypeError."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -_SMALL <= value < _SMALL else {"int": hex(value)}
    if kind is list:
        return [encode(item, other) for item in value]
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind in _SEQUENCES.values():
        return {kind.__name__: [encode(item, other) for item in value]}
    if kind is collections.defaultdict:
        kind = dict  # the two are equal, and a factory may be anything
    if kind in _MAPPINGS.values():
        return {kind.__name__: [[encode(k, other), encode(v, other)] for k, v in value.items()]}
    if kind in _PARTS:
        return {kind.__name__: _PARTS[kind](value)}
    if kind in _ISO.values():
        return {kind.__name__: value.isoformat()}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item(), other)
    if numpy is not None and kind is numpy.ndarray and value.dtype.kind in "biufcUS":
        return {"ndarray": [value.dtype.str, encode(value.tolist(), other)]}
    return other(value)


def decode(data: Any, other: Callable[[str, Any], Any]) -> Any:
    """The value of `data`; `other(tag, payload)` decodes the tags that are not this module's."""
    if isinstance(data, list):
        return [decode(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, payload),) = data.items()
    if tag == "int":
        return int(payload, 16)
    if tag in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(payload)
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode(item, other) for item in payload)
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({decode(k, other): decode(v, other) for k, v in payload})
    if tag in _BUILT:
        return _BUILT[tag](*payload)
    if tag in _ISO:
        return _ISO[tag].fromisoformat(payload)
    if tag == "ndarray":
        numpy = importlib.import_module("numpy")
        return numpy.array(decode(payload[1], other), dtype=numpy.dtype(payload[0]))
    return other(tag, payload)


def plain_base(value: Any) -> Any:
    """A value of a subclass of a plain type as that type, a namedtuple as a tuple; keys as a set.

    Raises TypeError for what is of no plain type.
    """
    if isinstance(value, KeysView | ItemsView):
        return set(value)
    for base in _BASES:
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"{type(value).__name__} is no plain value")


def importable(value: Any) -> Any:
    """How to find a function, class or module that both sides can import. Raises TypeError."""
    if isinstance(value, types.ModuleType) and value.__name__ != "__main__":
        return {"module": value.__name__}
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    home = sys.modules.get(module) if isinstance(module, str) else None
    if home is None or module == "__main__" or getattr(home, str(name), None) is not value:
        raise TypeError(f"{type(value).__name__} cannot be imported")
    return {"import": [module, name]}


def imported(tag: str, payload: Any) -> Any:
    """The module, function or class that `importable` described, from this side's own modules.

    Raises TypeError for anything else that a module may hold: an instance could be equal to
    everything (unittest.mock.ANY is).
    """
    name = payload if tag == "module" else payload[0]
    if tag not in ("module", "import") or name.partition(".")[0] in _PRIVATE:
        raise TypeError(f"{tag} {name}")
    value = importlib.import_module(name)
    if tag == "import":
        value = getattr(value, payload[1])
    known = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    if not isinstance(value, known):
        raise TypeError(f"{payload} is no module, function or class")
    return value


def is_shared(kind: Any) -> bool:
    """Whether a value that is this class may be the other side's own class of that name.

    The built-in ones are, and the standard library's exceptions; not those that skip a test.
    """
    if not isinstance(kind, type):
        return False
    module = kind.__module__.partition(".")[0]
    if issubclass(kind, BaseException):
        return module in sys.stdlib_module_names and module != "unittest"
    return module == "builtins"


def updated(old: Any, new: Any) -> Any:
    """Give `old`, where it can change, what `new` holds; returns what stands for both."""
    if type(old) is not type(new):
        return new
    if isinstance(old, list | bytearray):
        old[:] = [updated(*pair) for pair in zip(old, new, strict=False)] + list(new[len(old) :])
    elif hasattr(old, "appendleft"):
        old.clear()
        old.extend(new)
    elif isinstance(old, dict):
        kept = {key: updated(old[key], value) for key, value in new.items() if key in old}
        old.clear()
        old.update(new | kept)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    else:
        return new
    return old
