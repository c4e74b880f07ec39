"""The side of the program: run it, then answer questions about what it defined.

Nothing that this process says is a verdict, and nothing in it is a secret: it is given arguments
and asked for values, and what they are compared with never comes here.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from . import wire

_CHANGEABLE = ("list", "dict", "set", "bytearray", "deque", "OrderedDict", "Counter")
READY = "ready"


class Worker:
    """Holds the program's names, and its objects that the judge has references to."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO):
        self._requests = requests
        self._replies = replies
        self._module = types.ModuleType("__main__")
        self._objects: list[Any] = []  # by reference; alive, so that no id comes twice
        self._numbers: dict[int, int] = {}

    def load(self, program: str) -> None:
        """Run the program as `python program.py` would; leaving by status 0 is an end, too."""
        name = self._module.__file__ = "program.py"
        sys.argv = [name]
        sys.modules["__main__"] = self._module
        Path(name).write_bytes(program.encode("utf-8", "surrogatepass"))
        try:
            exec(compile(program, name, "exec"), self._module.__dict__)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise

    def serve(self) -> None:
        """Answer until the judge has no more questions."""
        wire.send(self._replies, READY)
        while True:
            self._answer(wire.receive(self._requests))

    def _answer(self, request: Any) -> None:
        try:
            reply = self._reply(request)
        except wire.Closed:
            raise
        except BaseException as error:
            reply = {"raised": self._exception(error)}
        wire.send(self._replies, reply)

    def _reply(self, request: Any) -> dict[str, Any]:
        if "program" in request:
            self.load(request["program"])
            return {"value": None}
        if "name" in request:
            return {"value": self._named(request["name"])}
        arguments = [wire.decode(argument, self._received) for argument in request["arguments"]]
        named = {k: wire.decode(v, self._received) for k, v in request["named"].items()}
        value = _OPERATIONS[request["operation"]](*arguments, **named)
        return {"value": self.encode(value), "changed": self._changed(request, arguments, named)}

    def _named(self, name: str) -> Any:
        value = self._module.__dict__[name]
        if isinstance(value, types.ModuleType) or getattr(value, "__qualname__", None) == name:
            with contextlib.suppress(TypeError):
                return wire.importable(value)
        return wire.encode(value, self._numbered)

    def _changed(self, request: Any, arguments: list, named: dict) -> dict[str, Any]:
        """The arguments that hold other values now: the program may have sorted a list in place."""
        now = {}
        before = dict(enumerate(request["arguments"])) | request["named"]
        for key, value in (dict(enumerate(arguments)) | named).items():
            changeable = isinstance(before[key], list) or (
                isinstance(before[key], dict) and next(iter(before[key])) in _CHANGEABLE
            )
            if changeable and (encoded := self.encode(value)) != before[key]:
                now[str(key)] = encoded
        return now

    def encode(self, value: Any) -> Any:
        """Plain values as they are, built-in classes by name, all else as a reference."""
        return wire.encode(value, self._reference)

    def _reference(self, value: Any) -> Any:
        if wire.is_shared(value):
            with contextlib.suppress(TypeError):
                return wire.importable(value)
        return self._numbered(value)

    def _numbered(self, value: Any) -> Any:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        reference: dict[str, Any] = {"number": number}
        if isinstance(value, type) and issubclass(value, BaseException):
            reference["exception"] = value.__name__
            reference["bases"] = [self.encode(base) for base in value.__bases__]
        elif inspect.iscoroutine(value):
            reference["coroutine"] = True
        else:
            with contextlib.suppress(TypeError, RecursionError):
                reference["plain"] = self.encode(wire.plain_base(value))
        return {"reference": reference}

    def _received(self, tag: str, payload: Any) -> Any:
        if tag == "reference":
            return self._objects[payload]
        if tag == "callback":
            return self._callback(*payload)
        if tag == "iterator":
            return iter(wire.decode(payload, self._received))
        return wire.imported(tag, payload)

    def _callback(self, number: int, name: str, doc: str) -> Callable:
        def function(*arguments: Any, **named: Any) -> Any:
            request = {
                "callback": number,
                "arguments": [self.encode(argument) for argument in arguments],
                "named": {name: self.encode(value) for name, value in named.items()},
            }
            wire.send(self._replies, request)
            while "value" not in (reply := wire.receive(self._requests)):
                if "raised" in reply:
                    raise wire.decode(reply["raised"], self._received)(reply["text"])
                self._answer(reply)
            return wire.decode(reply["value"], self._received)

        function.__name__, function.__doc__ = name, doc
        return function

    def _exception(self, error: BaseException) -> dict[str, Any]:
        return {
            "type": self.encode(type(error)),
            "arguments": [self.encode(argument) for argument in error.args],
            "object": self._numbered(error),
        }


def _bound(name: str) -> Callable:
    """The method of that name as an operator calls it: the class's own."""
    return lambda value, *others: getattr(type(value), name)(value, *others)


def _run_coroutine(coroutine: Any) -> Any:
    import asyncio  # takes longer than most programs

    return asyncio.run(coroutine)


# what the judge may ask for beside the operators of the module `operator`
_OPERATIONS: dict[str, Callable] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "await": _run_coroutine,
    **{
        function.__name__: function
        for function in (
            getattr, setattr, delattr, len, iter, next, bool, str, repr, hash, int, float, complex,
            abs, round, format, reversed, dir, isinstance, issubclass, pow, divmod,
        )
    },
    **{name: getattr(operator, name) for name in (
        "getitem", "setitem", "delitem", "contains", "index", "neg", "pos", "invert",
        "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "matmul", "truediv", "floordiv",
        "mod", "and_", "or_", "xor", "lshift", "rshift",
    )},
    "enter": _bound("__enter__"),
    "exit": _bound("__exit__"),
}  # fmt: skip
