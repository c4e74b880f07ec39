"""Row operations on a CPU, one thread, against TRL (`make bench`).

Ratios come from contestants run in turn within one process; the targets are asserted.
"""

from __future__ import annotations

import pytest
import torch

from rlcore.bench import memory, run
from rlcore.bench.cases import rows
from rlcore.bench.floors import Floors
from rlcore.bench.results import tables

pytest.importorskip("trl", reason="pip install -e '.[bench]'")

V, N, ROUNDS = 151936, 512, 5
# operation (logp and entropy, or logp alone), dtype, least ratio of TRL's time to ours
CASES = [
    ("token_logprob", "bfloat16", 3.5),
    ("token_logprob", "float32", 3.5),
    ("token_logp", "bfloat16", 1.0),
    ("token_logp", "float32", 1.0),
]
CONFIG = run.BenchConfig(
    device="cpu", contestants=["rlcore-torch", "trl"], rounds=ROUNDS, memory=False
)
NOT_MEASURED = Floors(1.0, {"float32": 1.0})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "dtype", "least"), CASES)
def test_forward_and_backward_against_trl(op, dtype, least, record_property):
    case = rows(op, dtype, N, V)
    found = run.measure_case(case, CONFIG, torch.device("cpu"), NOT_MEASURED)
    assert {row.contestant: row.status for row in found} == {"rlcore torch": "ok", "trl": "ok"}
    seconds = {row.contestant: row.seconds for row in found}
    ratio = seconds["trl"] / seconds["rlcore torch"]
    record_property("trl / rlcore", ratio)
    errors = {row.contestant: tables.error_text(row.error) for row in found}
    print(f"\n{case.key}: {seconds} trl / rlcore = {ratio:.2f}, errors {errors}")
    assert ratio >= least


def test_peak_memory_is_at_most_half_of_trl():
    """Above the logits, the gradient included."""
    case = rows("token_logprob", "bfloat16", N, V)
    peak = {name: memory.in_fresh_process(case, name, 1) for name in ("rlcore torch", "trl")}
    print("\npeak above the logits, MiB:", {k: v >> 20 for k, v in peak.items()})
    assert peak["rlcore torch"] <= peak["trl"] / 2
