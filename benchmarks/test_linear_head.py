"""The fused head on a CPU, one thread, against TRL and Liger (`make bench`).

PPO's clipped loss with an entropy bonus at B = 8, T = 256, H = 896, V = 32000, a quarter of the
tokens masked; ratios of contestants run in turn within one process; the targets are asserted.
"""

from __future__ import annotations

import pytest
import torch
from harness import interleaved, peak_memory
from heads import forward_backward, make_step

import rlcore as rl

pytest.importorskip("trl", reason="pip install -e '.[bench]'")

ROUNDS = 3
# dtype, a quarter masked, contestant, least ratio of its time to ours
CASES = {
    (torch.float32, True): {"trl logits": 1.35, "trl chunked": 2.0, "liger chunked": 1.8},
    (torch.float32, False): {"trl logits": 1.1},
    (torch.bfloat16, True): {"trl logits": 1.0},
}
CHUNK_BYTES = 64 << 20  # the budget that the peak is held to, on a CPU


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype, masked", CASES)
def test_loss_and_gradients_against_peers(dtype, masked, record_property):
    least = CASES[dtype, masked]
    if "liger chunked" in least:
        pytest.importorskip("liger_kernel", reason="pip install --no-deps liger-kernel==0.8.5")
    step = make_step(dtype, masked)
    names = ["rlcore", "rlcore, any loss", *least]
    seconds = interleaved({n: lambda n=n: forward_backward(n, step) for n in names}, ROUNDS)
    ratios = {name: seconds[name] / seconds["rlcore"] for name in names}
    record_property("time over rlcore's", ratios)
    print(f"\n{dtype} masked={masked}: {seconds} over rlcore's: {ratios}")
    for name, ratio in least.items():
        assert ratios[name] >= ratio, (name, ratios)


@pytest.mark.parametrize("name", ["rlcore, any loss", "trl logits", "trl chunked"])
def test_contestants_compute_the_same_gradient(name):
    step = make_step(torch.float32, True, batch=1)
    ours, theirs = forward_backward("rlcore", step), forward_backward(name, step)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rlcore", "trl logits", "trl chunked"])
def test_peak_memory_is_the_budget(name):
    peak = peak_memory("heads.py", name, "float32")
    print(f"\n{name}: peak above inputs and gradients {peak / 2**20:.1f} MiB")
    if name == "rlcore":
        step = make_step(torch.float32, True, batch=1)
        plan = rl.plan_linear(step.hidden.requires_grad_(), step.weight.requires_grad_())
        assert plan.peak_bytes <= CHUNK_BYTES
        assert peak <= 1.1 * CHUNK_BYTES
