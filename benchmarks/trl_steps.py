"""Ten GRPO optimizer steps of TRL's own trainer, with and without rlcore's patch, on a CPU.

    python benchmarks/trl_steps.py

Backbone of two layers, H = 256, V = 32000, fp32, 8 completions of 256 tokens, one thread;
generation is left out. A step is TRL's loss and metrics, backward, clipping and AdamW. Steps with
and without the patch take turns in one process; each one's memory is the resident peak of a fresh
process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from rlcore.bench.cases import Case
from rlcore.bench.contestants.steps import Step, make_experience, trl_step, write_model
from rlcore.bench.memory import reset_resident_peak, resident_peak
from rlcore.integrations import trl as rl_trl

CASE = Case("grpo_step", "both", "float32", V=32000, H=256, B=8, T=256)
STEPS = 10
WAYS = {"trl": contextlib.nullcontext, "trl, patched": rl_trl.patch}


@contextlib.contextmanager
def made_step(case: Case = CASE) -> Iterator[Step]:
    """A step of TRL's trainer on completions of full length."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder) / "model", case)
        experience = make_experience(case, torch.device("cpu"))
        full = torch.ones_like(experience.mask)
        everywhere = torch.ones_like(experience.attention_mask)
        experience = replace(experience, mask=full, attention_mask=everywhere)
        yield trl_step(directory, experience, case, torch.device("cpu"))


def seconds() -> dict[str, float]:
    """Seconds of STEPS steps each way, in turn."""
    taken = dict.fromkeys(WAYS, 0.0)
    with made_step() as step:
        for turn in range(STEPS + 1):
            for name, way in WAYS.items():
                with way():
                    start = time.perf_counter()
                    step.run()
                    # the first of each pays for what is made once
                    taken[name] += (time.perf_counter() - start) * (turn > 0)
    return taken


def peaks() -> dict[str, dict[str, int]]:
    """{way: {"whole": resident peak, "above": above what lies there between steps}}, bytes."""
    found = {}
    for name in WAYS:
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_of(name: str) -> dict[str, int]:
    with made_step() as step, WAYS[name]():
        step.run()
        reset_resident_peak()
        before = resident_peak()
        for _ in range(STEPS):
            step.run()
        return {"whole": resident_peak(), "above": resident_peak() - before}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(peak_of(sys.argv[1])))
        return
    taken, most = seconds(), peaks()
    for name in WAYS:
        whole, above = (most[name][key] / 2**20 for key in ("whole", "above"))
        print(
            f"{name:14} {taken[name]:7.2f} s   peak {whole:6.0f} MiB, {above:6.0f} above its start"
        )


if __name__ == "__main__":
    main()
