"""Reads compiled kernels: registers, spills, and how wide the loads and stores in loops are."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from rlcore.bench.static import limits

# "        /*0150*/                   LDG.E.128 R4, desc[UR4][R2.64] ;"
SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
SASS_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(0x[0-9a-f]+)")
SASS_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
GCN_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12}
GCN_BYTES |= {"b64": 8, "b32": 4, "short": 2, "ushort": 2, "sshort": 2}
GCN_BYTES |= {"byte": 1, "ubyte": 1, "sbyte": 1}


def cuobjdump(*arguments: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction."""
    matches = (SASS_LINE.match(line) for line in sass.splitlines())
    return [(int(m[1], 16), m[2]) for m in matches if m]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the innermost loops: from a backward branch's target to the branch."""
    spans = set()
    for address, text in code:
        branch = SASS_BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            spans.add((int(branch[1], 16), address))
    return [[text for at, text in code if a <= at <= b] for a, b in innermost(spans)]


def innermost(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans that hold no other."""

    def holds_another(span: tuple[int, int]) -> bool:
        return any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)

    return sorted(span for span in spans if not holds_another(span))


def widths(body: list[str], opcode: str) -> list[int]:
    """Bytes that one thread moves by each `opcode` of the body."""
    # LDGDEPBAR waits for copies and moves nothing
    opcodes = (re.search(rf"\b{opcode}(?!DEPBAR)[\w.]*", text) for text in body)
    suffixes = [re.findall(r"\.(128|64|U16|S16|16|U8|S8)\b", m[0]) for m in opcodes if m]
    return sorted(SASS_BYTES[found[-1]] if found else 4 for found in suffixes)


def read_cubin(cubin: bytes) -> dict:
    """Registers, stack, spill instructions, and the widths in each loop that touches memory."""
    usage = cuobjdump("-res-usage", cubin=cubin)
    code = instructions(cuobjdump("-sass", cubin=cubin))
    assert len(code) > 8, "no instruction was read from the SASS"
    # LDG also matches LDGSTS, the copy from global to shared memory
    read = [
        {
            "loads": widths(b, "LDG"),
            "stores": widths(b, "STG"),
            "instructions": len(b),
            "mix": limits.mix_of(b),
            "in_flight": limits.in_flight(b, widths),
        }
        for b in loops(code)
    ]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code),
        "loops": [loop for loop in read if loop["loads"] or loop["stores"]],
        "instructions": len(code),
    }


def read_amdgcn(assembly: str) -> dict:
    """The same from AMD assembly text, in which LLVM's comments mark the headers of loops."""

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])

    lines = assembly.splitlines()
    labels = {
        m[1]: i
        for i, line in enumerate(lines)
        if (m := re.match(r"(\.\w+):", line)) and "Loop Header" in "".join(lines[i : i + 3])
    }
    branches = ((i, re.search(r"s_c?branch\w*\s+(\.\w+)", line)) for i, line in enumerate(lines))
    spans = {(labels[b[1]], i) for i, b in branches if b and labels.get(b[1], i) < i}

    def gcn_widths(body: list[str], kind: str) -> list[int]:
        found = (re.search(rf"(?:global|buffer|flat)_{kind}_([a-z0-9]+)", line) for line in body)
        return sorted(GCN_BYTES[m[1]] for m in found if m)

    bodies = (lines[a:b] for a, b in innermost(spans))
    read = [
        {"loads": gcn_widths(b, "load"), "stores": gcn_widths(b, "store"), "instructions": len(b)}
        for b in bodies
    ]
    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count"),
        "loops": [loop for loop in read if loop["loads"] or loop["stores"]],
        "instructions": len(lines),
    }
