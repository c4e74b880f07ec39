"""The tests that a source defines without calling them, run as pytest would run them.

Functions called test..., with their parametrize marks; methods called so of classes called Test...;
unittest.TestCases. Fixtures are not known: a test that wants one fails.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any


def run_collected(names: Mapping[str, Any], called: Collection[str]) -> None:
    """Run what is defined in `names`; raises what a failing test raises.

    A function that wants arguments is taken for a helper where the tests use it: is it `called`?
    """
    for name, value in list(names.items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            _run_function(value, name in called)
        elif isinstance(value, type) and value.__module__ == "__main__":
            if hasattr(value, "defaultTestResult"):
                _run_case(value)
            elif name.startswith("Test"):
                _run_methods(value)


def _run_case(case: type) -> None:
    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if not result.wasSuccessful():
        raise AssertionError(case.__name__)


def _run_methods(owner: type) -> None:
    for name in dir(owner):
        if name.startswith("test"):
            instance = owner()
            for prepare in ("setup_class", "setup_method"):
                getattr(instance, prepare, lambda: None)()
            _run_function(getattr(instance, name), False)


def _run_function(function: Callable, called: bool) -> None:
    marks = getattr(function, "pytestmark", ())
    if any(mark.name in ("skip", "skipif", "xfail") for mark in marks):
        return
    cases: list[dict[str, Any]] = [{}]
    for mark in marks:
        if mark.name == "parametrize":
            rows = [_row(*mark.args[:2], index) for index in range(len(mark.args[1]))]
            cases = [case | row for case in cases for row in rows]
    given = set().union(*cases)
    wanting = [name for name in _required(function) if name not in given]
    if wanting and not called:
        raise TypeError(f"{function.__name__} wants {', '.join(wanting)}, which nobody gives")
    for case in cases if not wanting else ():
        value = function(**case)
        if inspect.iscoroutine(value):
            import asyncio

            asyncio.run(value)


def _row(names: str | list[str], rows: Any, index: int) -> dict[str, Any]:
    """The arguments of one row of a parametrize mark."""
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    row = getattr(rows[index], "values", rows[index])  # pytest.param(...) has values
    single = len(split) == 1 and row is rows[index]
    return dict(zip(split, (row,) if single else row, strict=True))


def _required(function: Callable) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
