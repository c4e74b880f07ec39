"""Functions of the user's: found by import path, and their errors told with where and on what."""

from __future__ import annotations

import importlib
import inspect
import linecache
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.errors import UserError

# Looking for the row on which a function raises stops here: each may take a call to a server.
SEARCH_SECONDS = 10.0
_SHOWN = 200  # characters of a value in a message


def import_function(what: str, name: str) -> Callable:
    """The function at `name`, "package.module:function"; modules of the working directory count.

    Raises:
        UserError: a module that cannot be imported, or one without that function. `what` says
            there what it was wanted for.
    """
    module_name, _, function_name = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # The module is the user's: whatever it raises on import is the reason.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {name!r}: cannot import {module_name!r}: {reason}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{what} {name!r}: {module_name!r} has no function {function_name!r}")
    return function


def explain(
    error: BaseException,
    function: Callable,
    prompts: Sequence,
    completions: Sequence,
    columns: Mapping[str, Sequence],
) -> str:
    """What `function(prompts=..., completions=..., **columns)` raised, where, and on which row.

    To find the row, the function is called once more, with one row at a time.
    """
    row = _raising_row(error, function, prompts, completions, columns)
    others = ", ".join(f"{name}={_shown(values[row])}" for name, values in columns.items())
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())} at {_place(error, function)}, "
        f"for completion {row} of "
        f"{len(completions)}: prompt={_shown(prompts[row])}, "
        f"completion={_shown(completions[row])}, columns: {others or 'none'}"
    )


def _raising_row(
    error: BaseException,
    function: Callable,
    prompts: Sequence,
    completions: Sequence,
    columns: Mapping[str, Sequence],
) -> int:
    """The first row on which the function raises the like; 0 where no single one makes it."""
    started = time.monotonic()
    for row in range(len(completions)):
        here = slice(row, row + 1)
        own = {name: values[here] for name, values in columns.items()}
        try:
            function(prompts=prompts[here], completions=completions[here], **own)
        except (Exception, SystemExit) as again:
            if type(again) is type(error):
                return row
        if time.monotonic() - started > SEARCH_SECONDS:
            break
    return 0


def _place(error: BaseException, function: Callable) -> str:
    """File, line and text of the user's own code that the error passed last, or the function's."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    libraries.append(str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    code = getattr(inspect.unwrap(function), "__code__", None)
    if own or code is None:
        file, number = (own or frames)[-1].filename, (own or frames)[-1].lineno or 0
    else:
        file, number = code.co_filename, code.co_firstlineno
    line = linecache.getline(file, number).strip()
    return f"{file}:{number}" + (f" (`{line}`)" if line else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
