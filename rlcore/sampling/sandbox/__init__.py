"""Whether a Python program that nobody trusts passes tests that it must not see.

    trainer -> judge (runs the tests) -> keeper -> guard -> worker (runs the program)

The program never meets the tests: they run in the judge, on values that the worker is asked for
over a pipe, once the program has run. The worker's end, its exit status and whatever it writes are
no verdict. docs/code_rewards.md says what each process can reach, and which forgeries remain.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FENCES", "cores", "describe", "fences_here", "passes"]

# How long the processes of a program may take to end after they have been told to.
_END_SECONDS = 10.0
# In the order in which they are tried: the later need the earlier where one is not root.
FENCES = {
    "uid": "a user without rights in root's place",
    "user": "user namespace",
    "mount": "mount namespace with a small disk",
    "pid": "process namespace",
    "net": "network namespace",
    "ipc": "IPC namespace",
    "landlock": "Landlock",
    "seccomp": "system call filter",
}
# what Landlock restricts from which of its versions on
_LANDLOCK = {1: "files", 4: "TCP", 6: "signals"}
# The package under another name, and without rlcore: torch would take seconds to import.
_START = """
import importlib, sys, types
package = types.ModuleType("rlcore_sandbox")
package.__path__ = [{directory!r}]
sys.modules[package.__name__] = package
importlib.import_module("rlcore_sandbox.judge").{function}()
"""


def passes(
    program: str,
    tests: str = "",
    seconds: float = 5.0,
    *,
    memory_bytes: int = 1 << 30,
    fences: Iterable[str] | None = None,
) -> bool:
    """Whether `program` runs to its end and then passes `tests`.

    Args:
        tests: Python that names what the program defines; "" asks for no more than the end.
        seconds: of wall time in all, and of processor time for each process.
        memory_bytes: for each process, and for all of the program's together.
        fences: of `FENCES` those to put up; None: all that hold on this machine.

    Raises:
        ValueError: a fence that is none. RuntimeError: the sandbox could not be built; nothing is
        known of the program then.
    """
    names = fences_here() if fences is None else tuple(fences)
    for name in names:
        if name not in FENCES:
            raise ValueError(f"unknown fence {name!r}: known are {', '.join(map(repr, FENCES))}")
    limits = {"seconds": seconds, "memory_bytes": memory_bytes}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        process = _start("main", directory, json.dumps({"fences": names, "limits": limits}))
        job = json.dumps({"program": program, "tests": tests}).encode()
        try:
            verdict, _ = process.communicate(job, timeout=seconds)
        except subprocess.TimeoutExpired:
            verdict = b"failed"
        finally:
            process.kill()
            # Its output ends when keeper and guard have ended too, and with them the program.
            process.communicate(timeout=_END_SECONDS)
    if verdict == b"broken" or (not verdict and process.returncode > 0):
        raise RuntimeError(
            f"the sandbox does not start behind its fences ({', '.join(names) or 'none'})"
        )
    return verdict == b"passed"


def cores() -> int:
    """How many programs to run at a time: the processors of each of a machine's trainers."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return max(1, len(usable) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def fences_here() -> tuple[str, ...]:
    """The fences that hold on this machine, found by trying each once."""
    return _probe()[0]


def describe() -> str:
    """One line: which fences hold on this machine, and which do not."""
    held, version = _probe()
    parts = ", ".join(part for since, part in _LANDLOCK.items() if version >= since)
    names = {**FENCES, "landlock": f"Landlock ({parts})" if parts else FENCES["landlock"]}
    inside = ", ".join(["resource limits", *(names[name] for name in FENCES if name in held)])
    line = f"code_runs holds programs by {inside}"
    # who is not root has no rights of root's to leave
    wanted = [name for name in FENCES if name != "uid" or os.getuid() == 0]
    missing = [names[name] for name in wanted if name not in held]
    return f"{line}; not to be had here: {', '.join(missing)}" if missing else line


@functools.cache
def _probe() -> tuple[tuple[str, ...], int]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        process = _start("print_fences", directory, json.dumps(list(FENCES)))
        held, version = json.loads(process.communicate()[0])
    return tuple(held), version


def _start(function: str, directory: str, *arguments: str) -> subprocess.Popen:
    """The judge's `function` in a fresh interpreter in `directory`, without our environment."""
    if os.name != "posix":
        raise RuntimeError("code_runs needs Linux or macOS; --code-sandbox names another way")
    os.chmod(directory, 0o711)  # another user may have to reach its folder in it
    for name in ("tests", "program"):
        Path(directory, name).mkdir(mode=0o700)
    here = str(Path(__file__).parent)
    code = _START.format(directory=here, function=function)
    own = str(Path(directory, "tests"))
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", code, *arguments],
        cwd=own,
        env={"PATH": os.defpath, "HOME": own, "TMPDIR": own, "LANG": "C.UTF-8", **one_thread},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
