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
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NoReturn

from . import linux

_POLL_SECONDS = 0.05
_HAS_PROC = os.path.isdir("/proc/self")
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
    threads = _threads_of(user)
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
    _kill_all(guard)  # where no namespace does it, a program may have killed the guard


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
        _watch(worker, ended, limits, directory)
    finally:
        _kill_all(worker)


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
    processes = {"RLIMIT_NPROC": count} if _HAS_PROC else {}
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


def _watch(worker: int, ended: int, limits: Limits, directory: str) -> None:
    """Return when the worker or the judge has ended, or the processes together take too much."""
    while not select.select([ended], [], [], _POLL_SECONDS)[0]:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == worker:
                return
            if pid == 0:
                break
        below = _descendants()
        taken = sum(_memory(pid) for pid in below)
        if taken > limits.memory_bytes or len(below) > limits.processes:
            return
        if _disk(directory) > limits.file_bytes:
            return


def _kill_all(worker: int) -> None:
    """Kill all descendants; orphans among them have been adopted, so none is missed."""
    if not _HAS_PROC:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker, signal.SIGKILL)
        return
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()] if _HAS_PROC else []


def _descendants() -> list[int]:
    parents = {}
    for name in _processes():
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_text()
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _memory(pid: int) -> int:
    try:
        pages = int(Path("/proc", str(pid), "statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _disk(directory: str) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _threads_of(user: int) -> int:
    """How many threads the user has: a limit on processes counts them all."""
    count = 0
    for name in _processes():
        with contextlib.suppress(OSError, IndexError):
            status = Path("/proc", name, "status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if int(fields["Uid"].split()[0]) == user:
                count += int(fields["Threads"])
    return count


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
