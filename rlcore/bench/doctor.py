"""`rlcore doctor`: what serves here, whether versions go together, whether the kernels are right.

Exit status 0 where nothing is broken (warnings allowed), 1 where something is.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text

from rlcore.bench import machine
from rlcore.bench.cases import Case, check
from rlcore.bench.checking import TOLERANCES, Truth, call, with_leaves
from rlcore.bench.contestants.rows import contestants
from rlcore.bench.operations import OPERATIONS
from rlcore.kernels import backend
from rlcore.runs.checked import Checked

# The Triton that each torch release is built and tested with.
SHIPPED_TOGETHER = {
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}
OLDEST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 0)}
PEERS = ("trl", "verl", "openrlhf", "liger-kernel", "torchrl", "vllm")
OLDEST_CAPABILITY = (8, 0)
SIGNS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "broken": ("broken", "bold red")}


@dataclass
class DoctorConfig(Checked):
    """Doctor"""

    # look at versions and hardware alone
    skip_kernels: bool = False


@dataclass(frozen=True)
class Finding:
    """One line of the report: `level` is a key of SIGNS, `fix` what to do where it is not ok."""

    level: str
    what: str
    fix: str = ""


def doctor(config: DoctorConfig, console: Console | None = None) -> int:
    """Print the findings; returns the exit status."""
    console = console or Console(highlight=False)
    findings = []
    parts: list[Callable[[], Iterator[Finding]]] = [hardware, versions, serving]
    parts += [] if config.skip_kernels else [kernels]
    for part in parts:
        console.print(Text(part.__name__, style="bold"))
        for finding in part():
            findings.append(finding)
            sign, style = SIGNS[finding.level]
            line = Text.assemble("  ", (f"{sign:8}", style), finding.what)
            console.print(line, soft_wrap=True)
    to_fix = [finding for finding in findings if finding.fix]
    console.print()
    for finding in to_fix:
        console.print(Text.assemble(("to fix: ", "bold"), finding.fix), soft_wrap=True)
    if not to_fix:
        console.print("nothing to fix")
    return int(any(finding.level == "broken" for finding in findings))


def hardware() -> Iterator[Finding]:
    """The processor and each GPU."""
    yield Finding("ok", f"{machine.cpu_name()}, {os.cpu_count()} cores, {platform.system()}")
    if not torch.cuda.is_available():
        found = shutil.which("nvidia-smi") is not None
        yield Finding(
            "broken" if found else "ok",
            "torch sees no GPU" + ", but nvidia-smi is here" * found,
            "install a CUDA build of torch, or check the driver with nvidia-smi" if found else "",
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"  # noqa: E501
        old = torch.version.hip is None and capability < OLDEST_CAPABILITY
        fix = "set RLCORE_BACKEND=torch: the kernels are built for sm_80 and later" if old else ""
        yield Finding("warning" if old else "ok", name, fix)


def versions() -> Iterator[Finding]:
    """Each package beside the oldest that works, and torch beside triton."""
    for name, oldest in OLDEST.items():
        found = machine.version(name)
        needed = name != "triton" or platform.system() == "Linux"
        least = ".".join(map(str, oldest))
        if found is None:
            level = "broken" if needed else "ok"
            yield Finding(level, f"{name} is not installed", f"pip install '{name}>={least}'")
        elif release(found) < oldest:
            fix = f"pip install '{name}>={least}'"
            yield Finding("broken", f"{name} {found} is older than {least}", fix)
        else:
            yield Finding("ok", f"{name} {found}")
    yield from pair(machine.version("torch"), machine.version("triton"))
    found = {name: machine.version(name) for name in PEERS}
    here = [f"{name} {version}" for name, version in found.items() if version]
    yield Finding("ok", f"peers: {', '.join(here) or 'none is installed'}")


def pair(torch_version: str | None, triton_version: str | None) -> Iterator[Finding]:
    """Whether the two ship together. A pair that does not may compile wrongly or not at all."""
    if torch_version is None or triton_version is None:
        return
    wanted = SHIPPED_TOGETHER.get(release(torch_version))
    if wanted is None:
        yield Finding("ok", f"torch {torch_version}: no Triton on record goes with it")
    elif wanted != release(triton_version):
        text = ".".join(map(str, wanted))
        yield Finding(
            "warning",
            f"torch {torch_version} ships with triton {text}, not {triton_version}",
            f"pip install 'triton=={text}.*'",
        )
    else:
        yield Finding("ok", "torch and triton are a pair that ships together")


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version text."""
    major, minor, *_ = version.split("+")[0].split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def serving() -> Iterator[Finding]:
    """The backend that calls get here, and what the environment does to it."""
    device = _device()
    try:
        chosen = backend.resolve_backend(None, torch.empty(0, device=device))
    except ValueError as error:
        yield Finding("broken", str(error), "unset RLCORE_BACKEND, or set it to torch")
        return
    asked = os.environ.get("RLCORE_BACKEND")
    reason = "RLCORE_BACKEND" if asked else f"tensors on {device}"
    yield Finding("ok", f"backend {chosen!r} serves ({reason})")
    if device == "cuda" and chosen == "torch":
        fix = "unset RLCORE_BACKEND" if asked else "pip install triton"
        yield Finding("warning", "a GPU is here, but Triton does not serve it", fix)
    if backend.INTERPRETED:
        fix = "unset TRITON_INTERPRET"
        yield Finding("warning", "TRITON_INTERPRET=1: kernels run thousands of times slower", fix)
    if chosen == "triton" and not backend.INTERPRETED and not any(map(shutil.which, _COMPILERS)):
        fix = "install gcc or clang, or set CC"
        yield Finding("broken", "Triton finds no C compiler to build its launchers", fix)
    if os.environ.get("RLCORE_CHECK") == "1" and device == "cuda":
        fix = "unset RLCORE_CHECK once the run is debugged"
        yield Finding("warning", "RLCORE_CHECK=1: every call waits for the GPU", fix)


_COMPILERS = (os.environ.get("CC") or "cc", "gcc", "clang")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def kernels() -> Iterator[Finding]:
    """Every operation on small inputs, values and gradients, against float64."""
    device = _device()
    try:
        name = f"rlcore {backend.resolve_backend(None, torch.empty(0, device=device))}"
    except ValueError:  # said above
        return
    begun = time.perf_counter()
    worst: dict[str, list[tuple[Case, float | str]]] = {}
    for case in check():
        worst.setdefault(case.op, []).append((case, self_check(case, name, device)))
    for op, found in worst.items():
        bad = [f"{c.dtype}: {e if isinstance(e, str) else f'error {e:.1e}'}" for c, e in found
               if isinstance(e, str) or not e <= TOLERANCES[c.dtype]]  # fmt: skip
        errors = ", ".join(f"{c.dtype} {e:.0e}" for c, e in found if not isinstance(e, str))
        if bad:
            fix = f"report {op} with the lines above; meanwhile RLCORE_BACKEND=torch"
            yield Finding("broken", f"{op}: {'; '.join(bad)}", fix)
        else:
            yield Finding("ok", f"{op}: error against float64: {errors}")
    yield Finding("ok", f"checked in {time.perf_counter() - begun:.1f} s")


def self_check(case: Case, name: str, device: str) -> float | str:
    """The contestant's largest error in the case, or what it raised."""
    operation = OPERATIONS[case.op]
    inputs = operation.make(case, torch.device(device))
    try:
        outputs, grads = call(
            contestants(case.op)[name], operation, with_leaves(operation, inputs), case.direction
        )
        return Truth(case, operation, inputs).error(outputs, grads)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
