"""One process at a time in a directory; the kernel lets go when the process ends, however it does.

On NFS the lock is the server's and holds between machines, unless the mount has `nolock` (then on
each machine alone). Where a file system knows no locks there is none, and the caller is told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rlcore.errors import UserError

LOCK_FILE = ".rlcore-lock"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_PATIENCE = 1.0  # seconds: another process that only asks holds it for a moment


def check_unlocked(directory: Path) -> None:
    """Raise UserError where another process holds the lock of `directory`; touches nothing."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(directory) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of `directory`, which must exist; yields False where there are no locks.

    Raises:
        UserError: another process holds it.
    """
    path = directory / LOCK_FILE
    descriptor, works = _acquire(directory, path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield works
    finally:
        # while it is still held: whoever opened it before sees that it is no longer there
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(directory: Path, path: Path) -> tuple[int, bool]:
    """(the lock file's descriptor, whether it is locked)."""
    end = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor, True
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                raise _held(directory) from None
            time.sleep(_PATIENCE / 20)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file that was opened is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held(directory: Path) -> UserError:
    try:
        holder = (directory / LOCK_FILE).read_text(encoding="utf-8") or "unknown"
    except OSError:
        holder = "unknown"
    return UserError(
        f"another run ({holder}) is writing into output directory {directory}: wait for its end, "
        "or choose another"
    )
