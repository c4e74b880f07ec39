"""The side of the tests: they run here, on values that the program's process is asked for.

Started by `rlcore.sampling.sandbox` with a job on its input; the verdict is what it writes, and no
process of the program's can write there, end this process, or read its memory.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
import types
from typing import Any, BinaryIO

from . import confine, linux, wire
from .collect import run_collected
from .proxies import Program
from .worker import READY, Worker

PASSED, FAILED, BROKEN = b"passed", b"failed", b"broken"
# as which modules tests import the program
PROGRAM_MODULES = ("solution", "program", "main", "__main__")


def main() -> None:
    """Judge one program: options are argv[1], the job is on stdin, the verdict goes to stdout."""
    if sys.platform == "linux":
        linux.die_with_parent()
        linux.hide_memory()
    options = json.loads(sys.argv[1])
    fences, limits = frozenset(options["fences"]), confine.Limits(**options["limits"])
    verdict, job = os.dup(1), os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    # Before the job is read: a fork has all that its parent had in memory.
    requests, replies, alive = _start_worker(fences, limits)
    with open(job, "rb") as stream:
        work = json.load(stream)
    confine.confine_self(fences, limits)
    os.write(verdict, _judge(requests, replies, work["program"], work["tests"]))
    os.close(alive)
    os._exit(0)


def _start_worker(fences: frozenset[str], limits: confine.Limits) -> tuple[BinaryIO, BinaryIO, int]:
    """(pipe to the worker, pipe from it, what ends it when it is closed)."""
    asks, asked = os.pipe()
    answers, answered = os.pipe()

    def serve() -> None:
        with open(asks, "rb") as requests, open(answered, "wb") as replies:
            Worker(requests, replies).serve()

    alive = confine.start_worker(serve, fences, limits, keep=[asks, answered])
    os.close(asks)
    os.close(answered)
    return open(asked, "wb"), open(answers, "rb"), alive


def _judge(requests: BinaryIO, replies: BinaryIO, source: str, tests: str) -> bytes:
    try:
        if wire.receive(replies) != READY:
            return BROKEN
    except wire.Closed:
        return BROKEN  # no word of the program's has been read yet
    try:
        program = Program(requests, replies)
        program.load(source)
        run_tests(program, tests)
    except BaseException:
        # SystemExit too: tests that end early have not passed, whoever made them end
        return FAILED
    return PASSED


def run_tests(program: Program, source: str) -> None:
    """Run tests that name what the program defines; raises what a failing one raises.

    Tests that name nothing of it (a `check` that nobody calls) would content every program.
    """
    tree = _Held().visit(ast.parse(source))
    names = _Names(program, tree)
    for name in PROGRAM_MODULES:
        sys.modules[name] = _ProgramModule(name, names)
    sys.argv = ["tests.py"]
    for runner in ("unittest", "pytest"):
        if runner in source:
            with contextlib.suppress(ImportError):
                importlib.import_module(runner).main = lambda *_, **__: None  # they run below
    exec(compile(ast.fix_missing_locations(tree), "tests.py", "exec"), names)
    run_collected(names, _words(tree))
    if tree.body and not names.asked:
        raise AssertionError("the tests ask nothing of the program")


class _Held(ast.NodeTransformer):
    """`assert E` as `with <program>: assert E`, which keeps what E says of its arguments true."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        held = ast.withitem(ast.Name(_HOLDER, ast.Load()), None)
        return ast.copy_location(ast.With([held], [node]), node)


_HOLDER = "_sandbox_program"


class _Names(dict):
    """The tests' globals; what is not there is the program's.

    A built-in's name is the built-in, so that no program defines the `abs` or `all` that it is
    tested with; but the program's where tests use no other name of it (`assert sum(10, 15) == 6`).
    """

    def __init__(self, program: Program, tree: ast.AST):
        super().__init__({"__name__": "__main__", "__file__": "tests.py", _HOLDER: program})
        self._program = program
        self.asked = False  # whether anything of the program was named
        used = _words(tree) - {_HOLDER}
        self._programs_own = not used - _bound(tree) - set(dir(builtins))

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and not self._programs_own):
            raise KeyError(name)
        self.asked = True
        return self._program.named(name)


def _words(tree: ast.AST) -> set[str]:
    """The names in a source, but for attributes and what is imported."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _bound(tree: ast.AST) -> set[str]:
    """The names that tests bind themselves, to what is not the program's."""
    bound, of_program = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in PROGRAM_MODULES:
            of_program.update(node.names)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias) and not (
            node in of_program or node.name in PROGRAM_MODULES
        ):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound


class _ProgramModule(types.ModuleType):
    """The tests' names, then the program's, as a module: some tests import what they test."""

    def __init__(self, name: str, names: _Names):
        super().__init__(name)
        self.__dict__["_sandbox_names"] = names

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self.__dict__["_sandbox_names"], name)
        except KeyError:
            raise AttributeError(name) from None


def print_fences() -> None:
    """Print which of the fences in argv[1] hold, and Landlock's version, as JSON."""
    print(json.dumps([confine.probe(json.loads(sys.argv[1])), linux.landlock_version()]))
