"""Logits that kernels read and write, counted under Triton's interpreter.

`TRITON_INTERPRET=1 python -m rlcore.bench.static.counted OPERATION ...` prints them as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from rlcore.bench.cases import rows
from rlcore.bench.checking import gradients, with_leaves
from rlcore.bench.contestants.rows import Contestant
from rlcore.bench.operations import OPERATIONS
from rlcore.bench.static.launches import triton_contestants
from rlcore.bench.static.static import Moved
from rlcore.bench.static.traffic import count_memory

ROWS, VOCABULARY = 2, 50257


def count(op: str, name: str, contestant: Contestant) -> Moved:
    """One call of the contestant, float32 logits. What PyTorch itself moves does not count."""
    direction = "forward" if op == "fisher_vector_product" else "forward+backward"
    case = rows(op, "float32", ROWS, VOCABULARY, direction, sequences=1)
    operation = OPERATIONS[op]
    inputs = operation.make(case, torch.device("cpu"))
    inputs = with_leaves(operation, (contestant.prepare or dict)(inputs))
    logits = ROWS * VOCABULARY
    with count_memory() as traffic:
        outputs = list(contestant.run(inputs))
        if operation.leaves:
            gradients(operation, inputs, outputs)
    if not traffic.launches:
        return Moved(op, name, 0.0, 0.0, "launched no kernel here")
    # what is as large as the logits: they, their gradient, and any copy of them
    large = [
        torch.empty(0).set_(storage)
        for storage in traffic.storages.values()
        if storage.nbytes() >= logits * 4
    ]
    reads, writes = (sum(getattr(traffic.of(x), k) for x in large) for k in ("loads", "stores"))
    return Moved(op, name, reads / logits, writes / logits)


def main(*ops: str) -> None:
    found = []
    for op in ops:
        for name, contestant in triton_contestants(op).items():
            try:
                found.append(asdict(count(op, name, contestant)))
            except ModuleNotFoundError:
                continue
            except Exception as error:  # a peer that the interpreter cannot run
                found.append(asdict(Moved(op, name, 0.0, 0.0, type(error).__name__)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
