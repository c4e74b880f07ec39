"""Row operations on a CPU, one thread, against TRL and eager PyTorch (`make bench`).

Ratios come from contestants run in turn within one process; the targets are asserted.
"""

from __future__ import annotations

import pytest
import torch
from harness import interleaved, peak_memory
from rows import CONTESTANTS, forward_backward, make_rows

pytest.importorskip("trl", reason="pip install -e '.[bench]'")

V, N, ROUNDS = 151936, 512, 5
# dtype, with entropy, least ratio of TRL's time to ours
CASES = [
    (torch.bfloat16, True, 3.5),
    (torch.float32, True, 3.5),
    (torch.bfloat16, False, 1.0),
    (torch.float32, False, 1.0),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype, entropy, least", CASES)
def test_forward_and_backward_against_trl(dtype, entropy, least, record_property):
    logits, target = make_rows(dtype, N, V)
    seconds = interleaved(
        {
            name: lambda name=name: forward_backward(name, logits, target, entropy)
            for name in ("rlcore", "trl")
        },
        ROUNDS,
    )
    ratio = seconds["trl"] / seconds["rlcore"]
    record_property("trl / rlcore", ratio)
    print(f"\n{dtype} entropy={entropy}: {seconds} trl / rlcore = {ratio:.2f}")
    assert ratio >= least


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_of_logp_against_float64(dtype, name):
    logits, target = make_rows(dtype, 64, V)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, target[:, None]).squeeze(-1)
    logp = CONTESTANTS[name](logits, target, True)[0]
    error = (logp.double() - exact).abs().max().item()
    print(f"\n{name} {dtype}: max error of logp {error:.2e}")
    if name == "rlcore":
        assert error < 1e-5


def test_peak_memory_is_at_most_half_of_trl():
    arguments = ("bfloat16", N, V, True)
    peak = {name: peak_memory("rows.py", name, *arguments) for name in ("rlcore", "trl")}
    print("\npeak above logits and gradient, MiB:", {k: v >> 20 for k, v in peak.items()})
    gradient = N * V * 2
    assert peak["rlcore"] + gradient <= (peak["trl"] + gradient) / 2


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("vocabulary", [32000, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step(benchmark, dtype, vocabulary, name):
    benchmark.group = f"logp + entropy, forward + backward, {dtype}, 64 x {vocabulary}"
    logits, target = make_rows(dtype, 64, vocabulary)
    benchmark(forward_backward, name, logits, target, True)
