"""What is known of the kernel of the designs that were tried, without a GPU, as JSON lines.

python head_design_checks.py compiled                       # what it takes on sm_90
TRITON_INTERPRET=1 python head_design_checks.py right       # against float64, bits, bounds
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import epilogue_kernel
import torch
from head_designs import DESIGNS, DIRECTIONS

from rlcore.bench.cases import head
from rlcore.bench.checking import Truth, call, with_leaves
from rlcore.bench.operations import OPERATIONS
from rlcore.bench.static import compile_gate, launches, sass
from rlcore.bench.static.traffic import count_memory


def compiled() -> list[dict]:
    """What the kernel takes for sm_90, with each tile, for statistics and for exponentials."""
    hidden, weight = (torch.empty(n, 896, dtype=torch.bfloat16) for n in (256, 4096))
    target, shift, e = torch.zeros(256, dtype=torch.int64), torch.zeros(256), hidden @ weight.T
    tiles = (epilogue_kernel.STATISTICS_TILE, epilogue_kernel.EXPONENTIALS_TILE)
    found = []
    for tile in tiles:
        for kind, stored in (("statistics", ()), ("exponentials", (shift, e))):
            with launches.recorded("sm_90") as launched:
                epilogue_kernel.tile_sums(hidden, weight, target, *stored, tile=tile)
            kernel = launched[0].compiled("sm_90")
            code = sass.instructions(sass.cuobjdump("-sass", cubin=kernel.asm["cubin"]))
            text, read = [line for _, line in code], compile_gate.read(kernel)
            entry = {"tile": tile, "kind": kind, "chosen": tile == tiles[bool(stored)]}
            entry |= {name: read[name] for name in ("registers", "spills", "shared")}
            for op in ("LDGSTS", "STG"):
                entry[f"{op} bytes"] = sorted({*sass.widths(text, op)})
            entry["tensor-core instructions"] = sum("GMMA" in line for line in text)
            found.append(entry)
    return found


def right() -> list[dict]:
    """Under TRITON_INTERPRET=1, on shapes that fill no tile: errors against float64, and more."""
    epilogue_kernel.STATISTICS_TILE = epilogue_kernel.EXPONENTIALS_TILE = (16, 32, 16, 4, 2)
    found = {"out of bounds": 0, "same bits": True}
    for op, contestant in DESIGNS.items():
        case = head(op, "float32", 40, 24, 150, masked=0.25)
        case = replace(case, direction=DIRECTIONS[op])
        operation, inputs = OPERATIONS[op], OPERATIONS[op].make(case, torch.device("cpu"))
        prepared = with_leaves(operation, (contestant.prepare or dict)(inputs))
        with count_memory() as traffic:
            runs = [call(contestant, operation, prepared, case.direction) for _ in range(2)]
        found[op] = Truth(case, operation, inputs).error(*runs[0])
        found["out of bounds"] += traffic.out_of_bounds
        first, again = ([*outputs, *grads] for outputs, grads in runs)
        found["same bits"] &= all(map(torch.equal, first, again))
    return [found]


if __name__ == "__main__":
    for entry in {"compiled": compiled, "right": right}[sys.argv[1]]():
        print(json.dumps(entry))
