"""The fused DPO loss on a CPU, one thread, against TRL (`make bench`).

8 pairs of 256 + 256 tokens, H = 896, V = 32000, fp32; ratios of contestants run in turn within one
process; the targets are asserted.
"""

from __future__ import annotations

import pytest
import torch
from harness import interleaved, peak_memory
from preferences import forward_backward, make_step

pytest.importorskip("trl", reason="pip install -e '.[bench]'")

ROUNDS = 3
LEAST = {"trl chunked": 1.3}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loss_and_gradients_against_peers(record_property):
    step = make_step()
    names = ["rlcore", "rlcore, composed", "trl chunked", "trl logits"]
    seconds = interleaved({n: lambda n=n: forward_backward(n, step) for n in names}, ROUNDS)
    ratios = {name: seconds[name] / seconds["rlcore"] for name in names}
    record_property("time over rlcore's", ratios)
    print(f"\n{seconds} over rlcore's: {ratios}")
    for name, ratio in LEAST.items():
        assert ratios[name] >= ratio, (name, ratios)


@pytest.mark.parametrize("name", ["rlcore, composed", "trl logits", "trl chunked"])
def test_contestants_compute_the_same_gradient(name):
    step = make_step(1)
    ours, theirs = forward_backward("rlcore", step), forward_backward(name, step)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_peak_memory_is_at_most_half_of_trls():
    peaks = {name: peak_memory("preferences.py", name) for name in ("rlcore", "trl chunked")}
    print(f"\npeak above inputs and gradients: { {n: p / 2**20 for n, p in peaks.items()} } MiB")
    assert peaks["rlcore"] <= 0.5 * peaks["trl chunked"]
