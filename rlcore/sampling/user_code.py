"""Functions of the user's: found by import path, and their errors told with where and on what."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlcore.errors import UserError
from rlcore.sampling.started import started

# Looking for the row on which a function raises stops here: each may take a call to a server.
SEARCH_SECONDS = 10.0
_SHOWN = 200  # characters of a value in a message


def import_function(what: str, name: str) -> Callable:
    """The function that `name` points at; modules of the working directory count.

    Args:
        what: what it is wanted for, for messages.
        name: "package.module:function", "package.module.function" or "path/to/file.py:function".

    Raises:
        UserError: a module or file that cannot be imported, or one without that function.
    """
    separator = ":" if ":" in name else "."
    module_name, _, function_name = name.rpartition(separator)
    if module_name.endswith(".py"):
        module = _module_of_file(what, name, Path(module_name).expanduser())
    elif name.endswith(".py"):
        raise UserError(f"{what} {name!r} is a file: name its function too, as {name}:function")
    else:
        module = _module(what, name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{what} {name!r}: {module_name!r} has no function {function_name!r}")
    return function


def _module(what: str, name: str, module_name: str) -> ModuleType:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    with _explained(what, name, module_name):
        return importlib.import_module(module_name)


def _module_of_file(what: str, name: str, path: Path) -> ModuleType:
    """The file as a module, run once; it may import its neighbours, as a script may."""
    if not path.is_file():
        raise UserError(f"{what} {name!r}: there is no file {str(path)!r}")
    path = path.resolve()
    # a name that no other module has
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _explained(what, name, str(path)):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[module_name]
        raise
    return module


@contextlib.contextmanager
def _explained(what: str, name: str, module_name: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        # The module is the user's: whatever it raises on import is the reason.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {name!r}: cannot import {module_name!r}: {reason}") from error


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
    began = time.monotonic()
    for row in range(len(completions)):
        here = slice(row, row + 1)
        own = {name: values[here] for name, values in columns.items()}
        try:
            started(function, prompts=prompts[here], completions=completions[here], **own)()
        except (Exception, SystemExit) as again:
            if type(again) is type(error):
                return row
        if time.monotonic() - began > SEARCH_SECONDS:
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
