"""The processes below this one: what they take, watched to an end, and ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

_POLL_SECONDS = 0.05
HAS_PROC = os.path.isdir("/proc/self")


def watch(
    worker: int, ended: int, directory: str, *, memory_bytes: int, file_bytes: int, processes: int
) -> None:
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
        if taken > memory_bytes or len(below) > processes:
            return
        if _disk(directory) > file_bytes:
            return


def kill_all(worker: int) -> None:
    """Kill all descendants; orphans among them have been adopted, so none is missed."""
    if not HAS_PROC:
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
    return [name for name in os.listdir("/proc") if name.isdigit()] if HAS_PROC else []


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


def threads_of(user: int) -> int:
    """How many threads the user has: a limit on processes counts them all."""
    count = 0
    for name in _processes():
        with contextlib.suppress(OSError, IndexError):
            status = Path("/proc", name, "status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if int(fields["Uid"].split()[0]) == user:
                count += int(fields["Threads"])
    return count
