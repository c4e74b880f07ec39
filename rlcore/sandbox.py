"""A Python program run in a process of its own, with limits.

This is a fence against accidents (endless loops, runaway memory, full disks), not a jail: the
process has the user's rights. Untrusted models belong into a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20

# Set inside the child, before the program: forking with a preexec_fn is not safe under threads.
_LAUNCHER = """
import resource, runpy
for name, limit in {limits}.items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
runpy.run_path("program.py", run_name="__main__")
"""


def run_python(program: str, *, seconds: float, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether `program` ends by itself with exit status 0 within `seconds` of wall time.

    It runs in an empty directory of its own, without our environment variables and input; its
    output is thrown away, and whatever it started is killed with it.
    """
    limits = {
        "RLIMIT_CPU": max(1, round(seconds) + 1),
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_CORE": 0,
    }
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "program.py").write_text(program, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LAUNCHER.format(limits=limits)],
            cwd=directory,
            env={"PATH": os.defpath, "HOME": directory},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            # The whole group goes, children of the program too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
