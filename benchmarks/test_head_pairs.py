"""The fused exact KL to a frozen reference on a CPU, one thread, against the logits (`make bench`).

2048 tokens, H = 896, V = 32000, fp32; ratios of contestants run in turn within one process. The
fused one makes both heads' logits twice where the policy's head is trained (12 N H V operations
instead of 8) and once where it is frozen (6, as the logits take): memory is what it saves.
"""

from __future__ import annotations

import pytest
import torch
from harness import interleaved, peak_memory
from head_pairs import CONTESTANTS, forward_backward, make_step

ROUNDS = 3
CHUNK_BYTES = 64 << 20  # the CPU's default
# least ratio of the usual logits' time to ours
LEAST = {False: 0.6, True: 1.0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("frozen", LEAST)
def test_kl_and_gradients_against_the_logits(frozen, record_property):
    step = make_step()
    seconds = interleaved(
        {n: lambda n=n: forward_backward(n, step, frozen) for n in CONTESTANTS}, ROUNDS
    )
    ratios = {name: seconds[name] / seconds["rlcore"] for name in CONTESTANTS}
    record_property("time over rlcore's", ratios)
    print(f"\nfrozen head={frozen}: {seconds} over rlcore's: {ratios}")
    assert ratios["torch logits"] >= LEAST[frozen], ratios


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_compute_the_same_gradient(name):
    step = make_step(64)
    ours, theirs = forward_backward("rlcore", step), forward_backward(name, step)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_peak_memory_is_the_budget():
    peaks = {name: peak_memory("head_pairs.py", name) for name in CONTESTANTS}
    print(f"\npeak above inputs and gradients: { {n: p / 2**20 for n, p in peaks.items()} } MiB")
    assert peaks["rlcore"] <= 1.3 * CHUNK_BYTES
    assert peaks["rlcore"] <= 0.2 * peaks["torch logits"]
