"""Times of the fused head beside the designs of head_designs.py and beside its bare products.

    python benchmarks/head_design_times.py [OUTPUT.json]

On a GPU: 8192 tokens, bfloat16, as `rlcore bench` measures (OUTPUT is its results file). On a CPU,
one thread: 8 x 256 tokens, H = 896, V = 32000, contestants in turn, and the row kernel's share.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch
from harness import interleaved
from head_designs import DESIGNS, DIRECTIONS, loss_and_gradients, with_old_lse

import rlcore as rl
from rlcore.bench import timing
from rlcore.bench.cases import Case, head
from rlcore.bench.contestants.head import HEAD_CONTESTANTS
from rlcore.bench.operations import EPSILON, OPERATIONS, Inputs
from rlcore.bench.run import BenchConfig, run_bench
from rlcore.kernels import torch_backend
from rlcore.kernels.head.products import Products

NAMES = {"linear_policy_loss": "over old lse", "linear_token_logprob": "statistics in the product"}
SHAPES = [(896, 151936), (2048, 128256), (4096, 151936)]  # H, V


def bare_products(inputs: Inputs, chunk: int) -> None:
    """What no design can leave out: the products of the counted tokens, the weight's summed."""
    weight, hidden = inputs["weight"], inputs["hidden"][inputs["mask"]]
    products = Products(weight, None)
    like = {"device": weight.device, "dtype": products.accumulator}
    z, dweight = torch.empty(chunk, len(weight), **like), torch.zeros(weight.shape, **like)
    ds = torch.zeros(chunk, len(weight), dtype=weight.dtype, device=weight.device)
    for rows in hidden.split(chunk):
        products.logits(rows, z[: len(rows)])
        products.dhidden(ds[: len(rows)])
        products.add_dweight(ds[: len(rows)], rows, dweight)


def shipped(inputs: Inputs) -> None:
    hidden, weight = (inputs[n].detach().requires_grad_() for n in ("hidden", "weight"))
    rl.linear_policy_loss(
        hidden, weight, inputs["target"], inputs["advantage"], old_logp=inputs["old_logp"],
        mask=inputs["mask"], epsilon=EPSILON,
    ).loss.backward()  # fmt: skip


class RowKernel:
    """Seconds spent in the row kernel, while it is patched in."""

    def __init__(self):
        self.seconds, self.original = 0.0, torch_backend.policy_loss_forward_backward

    def __enter__(self) -> RowKernel:
        torch_backend.policy_loss_forward_backward = self
        return self

    def __exit__(self, *_) -> None:
        torch_backend.policy_loss_forward_backward = self.original

    def __call__(self, *arguments):
        started = time.perf_counter()
        result = self.original(*arguments)
        self.seconds += time.perf_counter() - started
        return result


def on_cpu(rounds: int = 3) -> None:
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        for masked in (0.25, 0.0):
            case = head("linear_policy_loss", dtype, 2048, 896, 32000, masked)
            inputs = with_old_lse(OPERATIONS[case.op].make(case, torch.device("cpu")))
            chunk = rl.plan_linear(inputs["hidden"], inputs["weight"]).chunk_tokens
            with RowKernel() as row_kernel:
                started = time.perf_counter()
                shipped(inputs)
                share = row_kernel.seconds / (time.perf_counter() - started)
            calls = {
                "fused head": lambda inputs=inputs: shipped(inputs),
                "over old lse": lambda inputs=inputs: loss_and_gradients(inputs),
                "bare products": lambda inputs=inputs, n=chunk: bare_products(inputs, n),
            }
            seconds = interleaved(calls, rounds)
            ratios = {name: f"{s / seconds['fused head']:.2f}" for name, s in seconds.items()}
            print(f"{case.key}: row kernel {share:.0%}, time over the fused head's {ratios}")


def on_gpu(output: str) -> None:
    cases: list[Case] = []
    for op, contestant in DESIGNS.items():
        HEAD_CONTESTANTS[op][NAMES[op]] = contestant
        for hidden_size, vocabulary in SHAPES:
            case = head(op, "bfloat16", 8192, hidden_size, vocabulary)
            cases.append(replace(case, direction=DIRECTIONS[op]))
            seconds = time_of_products(cases[-1])
            print(f"{cases[-1].key}: bare products {1e3 * seconds:.2f} ms")
    wanted = ["rlcore triton", *NAMES.values()]
    run_bench(BenchConfig([case.key for case in cases], wanted, "cuda", output))


def time_of_products(case: Case) -> float:
    inputs = OPERATIONS[case.op].make(case, torch.device("cuda"))
    directions = 1 if case.direction == "forward" else 3
    weight, hidden = inputs["weight"], inputs["hidden"]
    z = hidden @ weight.T

    def products() -> None:
        torch.mm(hidden, weight.T, out=z)
        if directions == 3:
            torch.mm(z, weight)
            torch.mm(z.T, hidden)

    return timing.on_gpu(products).median


if __name__ == "__main__":
    if torch.cuda.is_available():
        on_gpu(*(sys.argv[1:] or ["benchmarks/results/head-designs.json"]))
    else:
        on_cpu()
