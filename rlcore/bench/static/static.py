"""`rlcore bench static`: what can be known of kernels without a GPU, ours and the peers'.

Compiled for each target: registers, spills, shared memory, bytes that a thread moves at once, and
instructions of the longest loop over memory. Counted: bytes moved per logit, under the
interpreter, and compilations over 50 completion lengths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlcore.bench.cases import Case, rows, scan
from rlcore.bench.static import compile_gate, launches, limits
from rlcore.errors import UserError, unknown_name
from rlcore.kernels.backend import HAS_TRITON, INTERPRETED
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count

COUNTED_OPS = ("token_logprob", "policy_loss", "sequence_policy_loss", "cross_entropy")
COUNTED_OPS += ("categorical_kl", "fisher_vector_product")
OPS = (*COUNTED_OPS, "gae")
TWO_OPERANDS = ("categorical_kl", "fisher_vector_product")
ITEMSIZE = 2  # the kernels are compiled for bfloat16 logits
NVIDIA = ("sm_80", "sm_90", "sm_100")


@dataclass
class StaticConfig(Checked):
    """Static"""

    # operations; default: all that have kernels
    ops: list[str] = field(default_factory=list)
    # sm_80, sm_90, sm_100, gfx942
    targets: list[str] = field(default_factory=lambda: ["sm_90"])
    # vocabularies to compile for
    vocabularies: list[Count] = field(default_factory=lambda: [50257, 151936])
    # JSON file for the figures; default: none
    output: str | None = None


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: what the machine code takes.

    Args:
        loads, stores: bytes that a thread moves at once in loops over memory, each width once.
        loop: instructions of the longest such loop, 0 where the kernel has none.
        per_logit: instructions of the main loops a logit, and of them by pipe; see `limits`.
        resident: threads on a multiprocessor; in_flight: bytes that they wait for together.
        allowed: {device: {limit: bytes a second}} computed for the devices of the target.
    """

    op: str
    contestant: str
    kernel: str
    target: str
    vocabulary: int
    registers: int
    spills: int
    shared: int
    loads: list[int]
    stores: list[int]
    loop: int
    instructions: int
    per_logit: dict[str, float]
    threads: int
    resident: int
    in_flight: int
    allowed: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Moved:
    """Logits read and written by one call, over the logits there are; the floor is its least."""

    op: str
    contestant: str
    reads: float
    writes: float
    note: str = ""


def static(config: StaticConfig, console: Console | None = None) -> int:
    """Print the figures; exit status 1 where a kernel of ours spills, moves less than 16 bytes at
    once in a loop over logits, or is compiled for every completion length."""
    console = console or Console(highlight=False)
    _check(config)
    ops = config.ops or OPS
    found = {"compiled": [], "moved": [], "compilations": []}
    for op in ops:
        found["compiled"] += [asdict(entry) for entry in compiled(op, config)]
    found["moved"] = moved([op for op in ops if op in COUNTED_OPS])
    for op in ops:
        found["compilations"] += compilations(op)
    for title, entries in found.items():
        _print(console, title, entries)
    if config.output:
        Path(config.output).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    bad = list(faults(found))
    for fault in bad:
        console.print(f"fault: {fault}", style="red", soft_wrap=True)
    return int(bool(bad))


def _check(config: StaticConfig) -> None:
    if not HAS_TRITON:
        raise UserError("`rlcore bench static` needs the package triton")
    if INTERPRETED:
        raise UserError("`rlcore bench static` compiles: unset TRITON_INTERPRET")
    for op in config.ops:
        if op not in OPS:
            raise unknown_name("operation", op, OPS)
    for target in config.targets:
        if target not in compile_gate.TARGETS:
            raise unknown_name("target", target, compile_gate.TARGETS)


def faults(found: dict[str, list[dict]]) -> Iterator[str]:
    """What ours may not do."""
    for entry in found["compiled"]:
        name = f"{entry['kernel']} for {entry['target']}, V = {entry['vocabulary']}"
        if not entry["contestant"].startswith("rlcore"):
            continue
        if entry["spills"]:
            yield f"{name} spills registers"
        if entry["op"] != "gae" and {*entry["loads"], *entry["stores"]} - {16}:
            yield f"{name} moves {sorted({*entry['loads'], *entry['stores']})} bytes at once"
    for entry in found["compilations"]:
        if entry["contestant"].startswith("rlcore") and entry["compilations"] > FEW:
            yield f"{entry['kernel']} is compiled {entry['compilations']} times"


FEW = 8  # alignments and tile sizes that lengths differ in


def compiled(op: str, config: StaticConfig) -> Iterator[Compiled]:
    """Each Triton contestant's kernels in an operation, compiled as they would be launched."""
    vocabularies = config.vocabularies if op != "gae" else [0]
    for name, contestant in launches.triton_contestants(op).items():
        for vocabulary in vocabularies:
            case = rows(op, "bfloat16", 16, vocabulary) if vocabulary else scan(op, 8, 4096)
            for target in config.targets:
                try:
                    launched = launches.launches_of(contestant, _one_direction(case), target)
                except Exception:  # a peer that is not installed, or asks the GPU something
                    continue
                kernels = {launch.specialization: launch for launch in launched}
                for launch in kernels.values():
                    yield _figures(op, name, launch, target, vocabulary)


def _one_direction(case: Case) -> Case:
    from dataclasses import replace

    forward = ("fisher_vector_product", "gae")
    return replace(case, direction="forward") if case.op in forward else case


def _figures(
    op: str, contestant: str, launch: launches.Launch, target: str, vocabulary: int
) -> Compiled:
    read = compile_gate.read(launch.compiled(target))
    loops = read["loops"]
    model = _model(op, read, target)
    widths = [sorted({w for loop in loops for w in loop[kind]}) for kind in ("loads", "stores")]
    return Compiled(
        op, contestant, launch.kernel, target, vocabulary, read["registers"], read["spills"],
        read["shared"], *widths, max((loop["instructions"] for loop in loops), default=0),
        read["instructions"], *model,
    )  # fmt: skip


def _model(op: str, read: dict, target: str) -> tuple:
    """(per_logit, threads, resident, in_flight, allowed) of a kernel on bfloat16 logits."""
    operands = 2 if op in TWO_OPERANDS else 1
    loops = [loop for loop in read["loops"] if "mix" in loop]
    found = limits.sweeps(loops, ITEMSIZE, operands) if op != "gae" else []
    threads = read["threads"]
    if not found:
        return {}, threads, 0, 0, {}
    per_logit = {pipe: sum(sweep.mix[pipe] for sweep in found) for pipe in found[0].mix}
    devices = {name: d for name, d in limits.DEVICES.items() if d.target == target}
    any_device = next(iter(limits.DEVICES.values()))
    resident = limits.resident_threads(read["registers"], threads, read["shared"], any_device)
    allowed = {
        name: limits.limits(found, ITEMSIZE, operands, resident, device)
        for name, device in devices.items()
    }
    flying = resident * min(sweep.in_flight for sweep in found)
    return per_logit, threads, resident, flying, allowed


def compilations(op: str) -> list[dict]:
    """How often each contestant's kernels are compiled over 50 completion lengths."""
    entries = []
    for name in launches.triton_contestants(op):
        try:
            counts = launches.compilations(name, op)
        except Exception:  # as above
            continue
        for kernel, count in counts.items():
            entry = {"op": op, "contestant": name, "kernel": kernel, "compilations": count}
            entries.append(entry | {"lengths": len(launches.LENGTHS)})
    return entries


def moved(ops: Sequence[str]) -> list[dict]:
    """Logits moved per logit, counted in a process under the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "rlcore.bench.static.counted", *ops]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting bytes failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _print(console: Console, title: str, entries: Sequence[dict]) -> None:
    """A table that 80 columns hold: an operation's name is a line of its own."""
    console.print(title, style="bold")
    if title == "compiled":
        _print_compiled(console, entries)
        return
    rows = {"moved": _MOVED, "compilations": _COMPILATIONS}[title]
    for op in dict.fromkeys(entry["op"] for entry in entries):
        table = Table(box=None, padding=(0, 2, 0, 2))
        table.add_column(op, no_wrap=True, overflow="ellipsis")
        for heading in rows:
            table.add_column(heading.replace("_", " "), justify="right")
        for entry in entries:
            if entry["op"] == op:
                name = entry.get("kernel", entry["contestant"])
                table.add_row(name, *(_cell(entry[heading]) for heading in rows))
        console.print(table)
        for entry in entries:
            if entry["op"] == op and entry.get("note"):
                console.print(f"  {entry['contestant']}: {entry['note']}", style="dim")
    console.print()


_MOVED = ("reads", "writes")
_COMPILATIONS = ("compilations", "lengths")


def _print_compiled(console: Console, entries: Sequence[dict]) -> None:
    """Two lines a kernel: what it takes; what that allows, computed, beside the memory's."""
    console.print(
        "  registers x threads, bytes at once in loads / stores\n"
        "    instructions a logit, bytes in flight on a multiprocessor, and the TB/s\n"
        "    that the smallest limit allows: computed from machine code, not measured",
        style="dim",
    )
    groups = dict.fromkeys((e["op"], e["target"], e["vocabulary"]) for e in entries)
    for op, target, vocabulary in groups:
        console.print(f"{op}, {target}, V = {vocabulary}" if vocabulary else f"{op}, {target}")
        for e in entries:
            if (e["op"], e["target"], e["vocabulary"]) == (op, target, vocabulary):
                name = e["kernel"].removesuffix("_kernel")
                spills = f", {e['spills']} spills" if e["spills"] else ""
                widths = f"{_cell(e['loads'])} / {_cell(e['stores'])}"
                taken = f"{e['registers']} x {e['threads']}{spills}, {widths}"
                console.print(f"  {name}: {taken}", soft_wrap=True)
                if e["per_logit"]:
                    console.print(f"    {_model_line(e)}", style="dim", soft_wrap=True)
    console.print()


def _model_line(entry: dict) -> str:
    words = [f"{entry['per_logit']['issue']:.1f}, {entry['in_flight'] / 1024:.0f} KiB"]
    for device, allowed in entry["allowed"].items():
        limit = min(allowed, key=allowed.get)
        words.append(f"{device} {allowed[limit] / 1e12:.1f} ({limit})")
    return ", ".join(words)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
