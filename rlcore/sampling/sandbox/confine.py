"""The processes of one program and what holds them: each fence where this machine has it.

    judge -> keeper -> guard -> worker and whatever the program starts

The keeper makes the namespaces, and stays outside its pid namespace. The guard is the first process
in it, so that all others end with it; without one it adopts the orphans and kills all that is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NoReturn

from . import linux
from .processes import HAS_PROC, kill_all, threads_of, watch

_ETC = ("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may take, all its processes together where a process is not named."""

    seconds: float  # wall time, and processor time of a process
    memory_bytes: int = 1 << 30
    file_bytes: int = 64 << 20
    processes: int = 64  # threads too


def start_worker(
    run: Callable[[], object], fences: Collection[str], limits: Limits, keep: Collection[int]
) -> int:
    """Call `run` in a confined process that has no files open but `keep` and /dev/null.

    Returns a descriptor: all that was started is killed when it is closed, or its holder dies.
    """
    ended, alive = os.pipe()
    if os.fork() == 0:
        os.close(alive)
        _exit_with(lambda: _keep(run, fences, limits, keep, ended))
    os.close(ended)
    return alive


def confine_self(fences: Collection[str], limits: Limits) -> None:
    """Confine the calling process, in its working directory."""
    linux.set_limits(_resource_limits(limits))
    if sys.platform == "linux":
        _fence_off(fences, os.getcwd())


def _exit_with(run: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def _keep(
    run: Callable, fences: Collection[str], limits: Limits, keep: Collection[int], ended: int
) -> None:
    directory = os.path.realpath("../program")
    user = linux.NOBODY if "uid" in fences else os.getuid()
    os.chown(directory, user, -1)
    threads = threads_of(user)
    if {"uid", "user"} <= set(fences):
        linux.leave_root()
    if spaces := {name for name in fences if name in linux.NAMESPACES}:
        linux.hide_memory(False)  # as its own /proc/self/uid_map would be hidden too
        linux.unshare(spaces | ({"mount"} if "pid" in spaces else set()))
    if sys.platform == "linux":
        linux.hide_memory()
        linux.adopt_orphans()
    guard = os.fork()
    if guard == 0:
        _exit_with(lambda: _guard(run, fences, limits, keep, ended, directory, threads))
    # The judge's end of `ended` closes, the guard ends, and so do we.
    os.waitpid(guard, 0)
    kill_all(guard)  # where no namespace does it, a program may have killed the guard


def _guard(
    run: Callable,
    fences: Collection[str],
    limits: Limits,
    keep: Collection[int],
    ended: int,
    directory: str,
    threads: int,
) -> None:
    on_linux = sys.platform == "linux"
    if on_linux:
        linux.die_with_parent()
        linux.adopt_orphans()
    if "pid" in fences:
        linux.mount("proc", "/proc")
    nobody = "uid" in fences and "user" not in fences  # then only root can mount
    if "mount" in fences:
        options = f"size={limits.file_bytes},nr_inodes=10000,mode=0700"
        options += f",uid={linux.NOBODY}" if nobody else ""
        linux.mount("tmpfs", directory, options)
        linux.mount("tmpfs", "/dev/shm", options)
    if nobody:
        linux.leave_root()
        linux.hide_memory()
    worker = os.fork()
    if worker == 0:
        _exit_with(lambda: _work(run, fences, limits, keep, directory, threads))
    try:
        if on_linux:
            linux.drop_capabilities()
        watch(
            worker, ended, directory, memory_bytes=limits.memory_bytes,
            file_bytes=limits.file_bytes, processes=limits.processes,
        )  # fmt: skip
    finally:
        kill_all(worker)


def _work(
    run: Callable,
    fences: Collection[str],
    limits: Limits,
    keep: Collection[int],
    directory: str,
    threads: int,
) -> None:
    for descriptor in range(3, 256):
        if descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    os.setsid()
    os.chdir(directory)
    os.environ.update(HOME=directory, TMPDIR=directory)
    own_count = "user" in fences and _kernel() >= (5, 14)
    count = limits.processes + (0 if own_count else threads)
    processes = {"RLIMIT_NPROC": count} if HAS_PROC else {}
    linux.set_limits(_resource_limits(limits) | processes)
    if sys.platform == "linux":
        linux.hide_memory(False)  # there is nothing in it but the program
        shared = ["/dev/shm"] if "mount" in fences else []
        proc = ["/proc"] if "pid" in fences else ["/proc/self", "/proc/cpuinfo", "/proc/meminfo"]
        _fence_off(fences, directory, proc, shared)
    run()


def _fence_off(
    fences: Collection[str], directory: str, proc: Collection[str] = (), shared: Collection = ()
) -> None:
    linux.drop_capabilities()
    if "landlock" in fences:
        readable = [*_python_files(), *_ETC, *proc, "/dev/urandom", "/dev/random", "/dev/zero"]
        linux.landlock(readable, [directory, *shared, os.devnull])
    if "seccomp" in fences:
        linux.seccomp()


def _python_files() -> list[str]:
    """Where programs, shared libraries and Python's modules lie, and nothing of the user's."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    own = [str(Path(prefix, part)) for prefix in prefixes for part in ("lib", "lib64", "bin")]
    modules = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    configuration = [str(Path(prefix, "pyvenv.cfg")) for prefix in prefixes]
    return ["/usr", "/lib", "/lib64", "/bin", "/sbin", *own, *modules, *configuration]


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": max(1, math.ceil(limits.seconds)),
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 256,
    }


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def probe(fences: Iterable[str]) -> list[str]:
    """Those of `fences` that hold here: a worker is started behind each and those before it."""
    held: list[str] = []
    for fence in fences if sys.platform == "linux" else ():
        if fence == "uid" and os.getuid() != 0:
            continue  # there is no root to leave
        if _starts(*held, fence):
            held.append(fence)
    return held


def _starts(*fences: str) -> bool:
    told, tell = os.pipe()

    def run() -> None:
        with open(os.__file__), open("program.py", "w"):
            pass
        if os.access(sys.executable, os.X_OK):
            os.write(tell, b"here")

    alive = start_worker(run, fences, Limits(seconds=5), keep=[tell])
    os.close(tell)
    with open(told, "rb") as stream:
        answer = stream.read()
    os.close(alive)
    os.wait()
    return answer == b"here"
