"""Peak memory of one call above its inputs: the allocator's on a GPU, a fresh process's on a CPU.

`python -m rlcore.bench.memory CASE CONTESTANT THREADS` prints it in bytes, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from rlcore.bench.cases import Case
from rlcore.bench.checking import call, with_leaves
from rlcore.bench.contestants.rows import contestants
from rlcore.bench.operations import OPERATIONS, Inputs


def on_gpu(run: Callable[[], object]) -> int:
    """Bytes by which `run` raises the allocator's peak, what it returns included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def in_fresh_process(case: Case, name: str, threads: int) -> int:
    """Bytes by which one call raises the resident peak of a process that has just begun.

    Raises RuntimeError with the process's last line where it fails.
    """
    command = [sys.executable, "-m", "rlcore.bench.memory", case.key, name, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no output")
    return json.loads(done.stdout.splitlines()[-1])


def give_back_freed() -> None:
    """What has been freed goes back to the system: a call that took it again would seem smaller."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Bytes; Linux's VmHWM."""
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    return int(kilobytes) * 1024


def smaller(case: Case) -> Case:
    """A tiny case of the same kind, so that imports and first uses are paid before the clock."""
    length = min(case.T, 4)
    tokens = {"N": case.B * length} if case.N else {}
    return replace(case, T=length, V=min(case.V, 64), **tokens)


def main(key: str, name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    case, device = Case.parse(key), torch.device("cpu")
    operation, contestant = OPERATIONS[case.op], contestants(case.op)[name]

    def prepared(case: Case) -> Inputs:
        inputs = operation.make(case, device)
        return with_leaves(operation, (contestant.prepare or dict)(inputs))

    inputs = prepared(case)
    # before the clock: imports, and the scratch memory that a library keeps
    call(contestant, operation, prepared(smaller(case)), case.direction)
    give_back_freed()
    reset_resident_peak()
    before = resident_peak()
    kept = call(contestant, operation, inputs, case.direction)
    print(json.dumps(resident_peak() - before))
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
