"""Every operation and contestant under pytest-benchmark, whose save and compare then work.

pytest benchmarks/test_suite.py --benchmark-autosave, and --benchmark-compare after a change.
"""

from __future__ import annotations

import pytest
import torch

from rlcore.bench.cases import check, head, rows
from rlcore.bench.checking import TOLERANCES, Truth, call, with_leaves
from rlcore.bench.contestants.rows import contestants
from rlcore.bench.operations import OPERATIONS

CPU = torch.device("cpu")
CASES = [case for case in check() if case.op == "gae"]
for dtype in ("float32", "bfloat16"):
    for op in ("token_logprob", "token_logp", "policy_loss", "categorical_kl"):
        CASES.append(rows(op, dtype, 32, 32000))
CASES += [head(op, "float32", 128, 256, 8000, masked=0.25)
          for op in ("linear_policy_loss", "linear_dpo")]  # fmt: skip
ENTRIES = [
    pytest.param(case, name, id=f"{case.key}-{name}")
    for case in CASES
    for name, contestant in contestants(case.op).items()
    if not contestant.needs_gpu and name != "torch.compile"
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "name"), ENTRIES)
def test_call(benchmark, case, name):
    operation, contestant = OPERATIONS[case.op], contestants(case.op)[name]
    inputs = operation.make(case, CPU)
    prepared = with_leaves(operation, (contestant.prepare or dict)(inputs))
    try:
        outputs, grads = call(contestant, operation, prepared, case.direction)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}")
    error = Truth(case, operation, inputs).error(outputs, grads)
    assert error <= TOLERANCES[case.dtype]
    benchmark.group = case.key
    benchmark.extra_info["error"] = error
    benchmark(call, contestant, operation, prepared, case.direction)
