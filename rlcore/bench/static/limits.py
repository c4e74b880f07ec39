"""The bandwidth that a kernel's machine code allows: computed, not measured.

Of each main loop over logits, per logit that one thread takes in it:

    issue      128 thread instructions a clock and multiprocessor (4 warps), of any kind
    special    16 a clock: exponentials, logarithms, reciprocals (MUFU)
    alu        64 a clock: integers, comparisons, minima and maxima, selections, conversions
    fma        128 a clock: fp32 multiply-adds
    latency    bytes in flight on a multiprocessor / 0.65 us: resident threads x the bytes that a
               thread asks for before it uses the first of them

The smallest of them, times the bytes that a logit must move, bounds the bandwidth; the memory's own
is beside it. Assumed: clocks under load as published, every loop body run whole (rare branches
included), a row's second sweep read from the L2 cache, nothing else on the device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LATENCY = 0.65e-6  # seconds from a load's issue to its data, under load
LANES = {"issue": 128, "special": 16, "alu": 64, "fma": 128}
SPECIAL = re.compile(r"\b(MUFU)\b")
FMA = re.compile(r"\b(FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2)\b")
ALU = re.compile(
    r"\b(IADD3|LOP3|ISETP|FSETP|FMNMX3?|IMNMX|VIMNMX|SEL|FSEL|PRMT|SHF|IABS|F2F|F2FP|I2F|F2I|LEA|MOV|"
    r"PLOP3|VIADD)\b"
)


@dataclass(frozen=True)
class Device:
    """What bounds a kernel on a GPU."""

    target: str  # the code that it runs
    multiprocessors: int
    clock: float  # Hz
    memory: float  # bytes a second
    threads: int = 2048  # resident on a multiprocessor at most
    registers: int = 65536


DEVICES = {
    "H100": Device("sm_90", 132, 1.755e9, 3.35e12),
    "H200": Device("sm_90", 132, 1.755e9, 4.8e12),
    "B200": Device("sm_100", 148, 1.85e9, 8e12),
}


@dataclass(frozen=True)
class Sweep:
    """One main loop, per logit: instructions by pipe, and what a thread has in flight.

    Args:
        writes: bytes stored a logit.
        in_flight: bytes that one thread asks for before it uses any of them.
    """

    mix: dict[str, float]  # {"issue": 9.8, "special": 1.0, ...}
    writes: float
    in_flight: int


def mix_of(body: Sequence[str]) -> dict[str, int]:
    """Instructions of a loop body by the pipe that they take."""
    return {
        "issue": len(body),
        "special": sum(bool(SPECIAL.search(text)) for text in body),
        "alu": sum(bool(ALU.search(text)) for text in body),
        "fma": sum(bool(FMA.search(text)) for text in body),
    }


def in_flight(body: Sequence[str], widths: Any) -> int:
    """Bytes loaded before the first of them is used, in the order of the code.

    Args:
        widths: (lines, opcode) -> bytes of each such instruction, as `sass.widths`.
    """
    waiting: set[int] = set()
    total = 0
    for text in body:
        load = re.search(r"\bLDG\S*\s+R(\d+)", text)
        operands = text.partition(",")[2] if not load else ""
        if waiting & {int(number) for number in re.findall(r"\bR(\d+)", operands)}:
            break
        if load:
            (width,) = widths([text], "LDG")
            first = int(load[1])
            waiting |= set(range(first, first + max(width // 4, 1)))
            total += width
    return total


def sweeps(loops: Sequence[dict], itemsize: int, operands: int) -> list[Sweep]:
    """The main loops among those that load: of those that only read and of those that also write
    the one with the fewest instructions a logit, as masked ends of rows have more."""
    found: dict[bool, Sweep] = {}
    for loop in loops:
        logits = sum(loop["loads"]) / (itemsize * operands)
        if not logits:
            continue
        sweep = Sweep(
            {pipe: count / logits for pipe, count in loop["mix"].items()},
            sum(loop["stores"]) / logits,
            loop["in_flight"],
        )
        key = bool(loop["stores"])
        if key not in found or sweep.mix["issue"] < found[key].mix["issue"]:
            found[key] = sweep
    return list(found.values())


def resident_threads(registers: int, threads: int, shared: int, device: Device) -> int:
    """Threads that share a multiprocessor: whole programs, registers given out by eights."""
    each = -(-registers // 8) * 8
    programs = min(device.threads // threads, device.registers // (each * threads), 32)
    if shared:
        programs = min(programs, 227 * 1024 // shared)
    return programs * threads


def limits(
    found: Sequence[Sweep], itemsize: int, operands: int, resident: int, device: Device
) -> dict[str, float]:
    """{pipe: bytes a second that it allows}, and "latency" and "memory".

    A kernel with two sweeps takes both for each logit; memory sees the logit read once.
    """
    moved = itemsize * operands + sum(sweep.writes for sweep in found)
    rate = device.multiprocessors * device.clock
    allowed = {}
    for pipe, lanes in LANES.items():
        count = sum(sweep.mix[pipe] for sweep in found)
        if count:
            allowed[pipe] = rate * lanes / count * moved
    flying = resident * min(sweep.in_flight for sweep in found)
    read = itemsize * operands * len(found)
    allowed["latency"] = device.multiprocessors * flying / LATENCY * moved / read
    return allowed | {"memory": device.memory}
