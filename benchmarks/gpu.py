"""Row kernels on a GPU, each beside its floor: the bytes it must move over the copy bandwidth.

Every case is held against float64 on a few of its rows before it is timed. Writes one JSON file
named after the GPU and the date, with machine, versions and quantiles, and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

import rlcore as rl

QUANTILES = [0.5, 0.2, 0.8]


def milliseconds(run: Callable[[], object]) -> list[float]:
    """Median, 20% and 80% quantiles; L2 is flushed before every call."""
    return triton.testing.do_bench(run, warmup=50, rep=300, quantiles=QUANTILES)


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a large device-to-device copy."""
    source = torch.randn(1 << 29, device="cuda")
    sink = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: sink.copy_(source))[0] / 1e3)


def check(logits: Tensor, target: Tensor, logp: Tensor, entropy: Tensor) -> float:
    """Largest error of logp and entropy against float64 on the first rows and the last."""
    rows = torch.tensor([0, 1, len(target) // 2, len(target) - 1], device=logits.device)
    exact = torch.log_softmax(logits[rows].double(), -1)
    chosen = exact.gather(-1, target[rows, None]).squeeze(-1)
    entropies = -(exact.exp() * exact).sum(-1)
    errors = (logp[rows] - chosen).abs().max(), (entropy[rows] - entropies).abs().max()
    worst = max(error.item() for error in errors)
    if not worst < 1e-4:
        raise AssertionError(f"error {worst} at {tuple(logits.shape)} {logits.dtype}")
    return worst


def cases(tokens: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable]]:
    """(name, logit-sized passes of its floor, function to time) at one shape."""
    logits = torch.randn(tokens, vocabulary, device="cuda").to(dtype)
    target = torch.randint(vocabulary, (tokens,), device="cuda")
    advantage = torch.randn(tokens, device="cuda")
    with torch.no_grad():
        statistics = rl.token_logprob(logits, target)
        old_logp = statistics.logp + 0.1 * torch.randn(tokens, device="cuda")
    check(logits, target, statistics.logp, statistics.entropy)
    leaf = logits.requires_grad_()

    def forward(entropy=True):
        with torch.no_grad():
            return rl.token_logprob(logits, target, entropy=entropy)

    yield "token_logprob forward", 1, forward
    yield "token_logprob forward, logp only", 1, lambda: forward(False)
    out = rl.token_logprob(leaf, target)
    total = out.logp.sum() + 0.01 * out.entropy.sum()
    yield (
        "token_logprob backward",
        2,
        lambda: torch.autograd.grad(total, leaf, retain_graph=True),
    )
    yield (
        "policy_loss loss + gradient",
        2,
        lambda: rl.policy_loss(leaf, target, advantage, old_logp=old_logp),
    )

    def eager():
        logp = torch.log_softmax(leaf.float(), -1).gather(-1, target[:, None]).squeeze(-1)
        ratio = (logp - old_logp).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return torch.autograd.grad(loss, leaf)

    if tokens * vocabulary < 1 << 31:
        yield "eager loss + gradient", 2, eager


def machine() -> dict[str, object]:
    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.sm"
    smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": smi.stdout.decode().strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (bytes read + written)")
    rows = []
    for vocabulary in (32000, 50257, 128256, 151936):
        for dtype in (torch.bfloat16, torch.float32):
            for name, passes, run in cases(arguments.tokens, vocabulary, dtype):
                floor = passes * arguments.tokens * vocabulary * dtype.itemsize / bandwidth * 1e3
                median, low, high = milliseconds(run)
                rows.append(
                    {"case": name, "tokens": arguments.tokens, "vocabulary": vocabulary}
                    | {"dtype": str(dtype).removeprefix("torch."), "floor_ms": floor}
                    | {"median_ms": median, "quantile_20_ms": low, "quantile_80_ms": high}
                )
                shape = f"{arguments.tokens} x {vocabulary} {rows[-1]['dtype']}"
                print(f"{name:34} {shape:26} {median:8.3f} ms  {median / floor:5.2f} x floor")
            torch.cuda.empty_cache()
    report = {"machine": machine(), "copy_bandwidth": bandwidth, "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpu = report["machine"]["gpu"].lower().replace(" ", "-")
    path = arguments.output / f"{gpu}-{report['machine']['date']}.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
