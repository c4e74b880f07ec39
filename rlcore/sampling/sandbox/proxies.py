"""The program's functions and objects as the tests see them: stand-ins that ask the worker.

Plain values come by value. An operator between two plain values is Python's own, so what a test
compares with never reaches the program. A stand-in gives a question to the program only where that
tells nothing of what is wanted: calls, attributes, items, iteration; operators of two of the
program's objects, and those of objects that the tests make themselves (`Vector(1, 2) * 2`). To be
equal to a plain value it has to have that value in it, as a namedtuple has a tuple's.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, BinaryIO

from . import wire

_NUMBER = "_sandbox_number"  # of an exception class made here
_ERROR = "_sandbox_error"  # the program's own exception, of one made here


class Program:
    """The program at the other end of two pipes."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO):
        self._requests = requests
        self._replies = replies
        self._stand_ins: dict[int, Any] = {}
        self._callbacks: list[Callable] = []
        self._changes: list[tuple[Any, Any]] = []
        self._held = 0

    def load(self, source: str) -> None:
        """Run the program; raises what it raises."""
        self._ask({"program": source})

    def named(self, name: str) -> Any:
        """What the program calls so. Raises KeyError."""
        found = self._ask({"name": name})["value"]
        if isinstance(found, dict) and ("import" in found or "module" in found):
            ((tag, payload),) = found.items()
            # under another name it could be anything that suits the program
            if tag == "import" and payload[1] != name:
                raise KeyError(name)
            return wire.imported(tag, payload)
        value = wire.decode(found, self._received)
        if type(value) is StandIn:
            _link(value).makes = name[:1].isupper()
        return value

    def operate(self, operation: str, *arguments: Any, **named: Any) -> Any:
        """The value of an operation that the program carries out."""
        request = {
            "operation": operation,
            "arguments": [wire.encode(argument, self._sent) for argument in arguments],
            "named": {name: wire.encode(value, self._sent) for name, value in named.items()},
        }
        reply = self._ask(request)
        given = dict(enumerate(arguments)) | named
        for key, new in reply.get("changed", {}).items():
            old = given[int(key) if key.isdigit() else key]
            self._changes.append((old, wire.decode(new, self._received)))
        self._apply_changes()
        return wire.decode(reply["value"], self._received)

    def __enter__(self) -> None:
        """Within the block arguments stay as they are, whatever the program does to its copies.

        An assert's expression is such a block: `assert f(a) == sorted(a)` means the `a` that f got.
        """
        self._held += 1

    def __exit__(self, *_: Any) -> None:
        self._held -= 1
        self._apply_changes()

    def _apply_changes(self) -> None:
        while self._changes and not self._held:
            wire.updated(*self._changes.pop(0))

    def _ask(self, request: Any) -> Any:
        wire.send(self._requests, request)
        while "callback" in (reply := wire.receive(self._replies)):
            wire.send(self._requests, self._call_back(reply))
        if "raised" in reply:
            raise self._exception(**reply["raised"])
        return reply

    def _call_back(self, request: Any) -> dict[str, Any]:
        """Call a function of the tests for the program."""
        arguments = [wire.decode(argument, self._received) for argument in request["arguments"]]
        named = {k: wire.decode(v, self._received) for k, v in request["named"].items()}
        try:
            value = self._callbacks[request["callback"]](*arguments, **named)
            return {"value": wire.encode(value, self._sent)}
        except wire.Closed:
            raise
        except Exception as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
            return {"raised": wire.importable(kind), "text": str(error)}

    def _sent(self, value: Any) -> Any:
        if type(value) is StandIn:
            return {"reference": _link(value).number}
        if isinstance(value, type) and _NUMBER in value.__dict__:
            return {"reference": value.__dict__[_NUMBER]}
        if hasattr(value, "__next__"):
            return {"iterator": [wire.encode(item, self._sent) for item in value]}
        try:
            return wire.importable(value)
        except TypeError:
            if not callable(value):
                raise TypeError(
                    f"tests cannot give the program a {type(value).__name__}: plain values, "
                    "functions and the program's own objects can be given"
                ) from None
        self._callbacks.append(value)
        names = [str(getattr(value, name, "")) for name in ("__name__", "__doc__")]
        return {"callback": [len(self._callbacks) - 1, *names]}

    def _received(self, tag: str, payload: Any) -> Any:
        if tag != "reference":
            value = wire.imported(tag, payload)
            if not wire.is_shared(value):
                raise TypeError(f"{payload} is no class that both sides have")
            return value
        number = payload["number"]
        if number not in self._stand_ins:
            self._stand_ins[number] = self._stand_in(payload)
        value = self._stand_ins[number]
        if type(value) is StandIn:
            _link(value).plain = wire.decode(payload.get("plain"), self._received)
        return value

    def _stand_in(self, payload: Any) -> Any:
        if "coroutine" in payload:
            return _awaited(self, StandIn(self, payload["number"]))
        if "exception" not in payload:
            return StandIn(self, payload["number"])
        bases = tuple(wire.decode(base, self._received) for base in payload["bases"])
        body = {
            _NUMBER: payload["number"],
            "__str__": lambda error: str(_error_of_program(error)),
            "__getattr__": lambda error, name: getattr(_error_of_program(error), name),
        }
        return type(payload["exception"], bases, body)

    def _exception(self, type: Any, arguments: list, object: Any) -> BaseException:
        """The exception that the program raised, as `except` and `pytest.raises` know it."""
        kind = wire.decode(type, self._received)
        if not issubclass(kind, BaseException):
            raise wire.Closed("the program raised what is no exception")
        if issubclass(kind, StopIteration | StopAsyncIteration):
            return ProgramStopped("the program raised StopIteration")
        values = [wire.decode(argument, self._received) for argument in arguments]
        try:
            error = kind(*values)
        except Exception:
            error = kind.__new__(kind, *values)
        error.__dict__[_ERROR] = StandIn(self, object["reference"]["number"])
        return error


class ProgramStopped(RuntimeError):
    """A StopIteration of the program's: as such it would end a loop of the tests."""


def _error_of_program(error: BaseException) -> Any:
    """What the program raised; of an error that the tests made themselves, its arguments."""
    return error.__dict__.get(_ERROR, error.args)


async def _awaited(program: Program, stand_in: StandIn) -> Any:
    return program.operate("await", stand_in)


@dataclasses.dataclass
class _Link:
    """What a stand-in stands for."""

    program: Program
    number: int
    plain: Any = None  # the plain value in an object of a subclass: a namedtuple's tuple
    makes: bool = False  # a class, by its name: tests make objects by calling it
    made: bool = False  # such an object


def _link(stand_in: StandIn) -> _Link:
    return object.__getattribute__(stand_in, "_sandbox_link")


def _mark_made(value: Any) -> Any:
    if type(value) is StandIn:
        _link(value).made = True
    return value


class StandIn:
    """An object of the program's. What is not defined here is asked of it by name."""

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_sandbox_link", _Link(program, number))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        value = _operate("call", self, *arguments, **named)
        return _mark_made(value) if _link(self).makes else value

    def __getattr__(self, name: str) -> Any:
        return _operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _operate("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        _operate("delattr", self, name)

    def __next__(self) -> Any:
        try:
            return _operate("next", self)
        except ProgramStopped:
            raise StopIteration from None

    def __exit__(self, kind: Any, *_: Any) -> Any:
        return _operate("exit", self, kind, None, None)

    @property
    def __doc__(self) -> Any:
        return _operate("getattr", self, "__doc__")

    @property
    def __class__(self) -> type:
        # isinstance(point, tuple) is true of a namedtuple
        plain = _link(self).plain
        return StandIn if plain is None else type(plain)

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is StandIn and _operate("isinstance", value, self)

    def __subclasscheck__(self, value: Any) -> bool:
        return _operate("issubclass", value, self)

    def __contains__(self, item: Any) -> bool:
        if _link(self).made or type(item) is StandIn:
            return bool(_operate("contains", self, item))
        plain = _link(self).plain
        return any(item == found for found in (self if plain is None else plain))


def _operate(operation: str, stand_in: StandIn, *arguments: Any, **named: Any) -> Any:
    return _link(stand_in).program.operate(operation, stand_in, *arguments, **named)


def _asked(operation: str) -> Callable:
    """A method that the program carries out."""
    return lambda self, *arguments: _operate(operation, self, *arguments)


def _binary(operation: str, swapped: bool = False) -> Callable:
    """An operator: of two of the program's objects its own, else one of the plain value in it."""

    def method(self: StandIn, other: Any) -> Any:
        pair = (other, self) if swapped else (self, other)
        made = _link(self).made
        if type(other) is StandIn or (made and operation not in ("eq", "ne")):
            value = _link(self).program.operate(operation, *pair)
            return _mark_made(value) if made else value
        plain = _link(self).plain
        if plain is None:
            return NotImplemented
        return getattr(operator, operation)(*((other, plain) if swapped else (plain, other)))

    return method


_ASKED = """
    len iter bool str repr hash int float complex abs round format reversed dir index neg pos invert
    getitem setitem delitem enter
"""
_COMPARISONS = "eq ne lt le gt ge"
_ARITHMETIC = "add sub mul matmul truediv floordiv mod and_ or_ xor lshift rshift pow"
for _name in _ASKED.split():
    setattr(StandIn, f"__{_name}__", _asked(_name))
for _name in _COMPARISONS.split():
    setattr(StandIn, f"__{_name}__", _binary(_name))
for _name in _ARITHMETIC.split():
    setattr(StandIn, f"__{_name.rstrip('_')}__", _binary(_name))
    setattr(StandIn, f"__r{_name.rstrip('_')}__", _binary(_name, swapped=True))
