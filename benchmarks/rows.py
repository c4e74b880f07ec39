"""The contestants of the row benchmarks, each a few lines: logits, targets -> a scalar to sum.

Run as a script (rows.py CONTESTANT DTYPE N V ENTROPY), it prints how many bytes one forward and
backward adds to the resident peak above the logits and their gradient.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rlcore as rl


def ours(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    out = rl.token_logprob(logits, target, entropy=entropy, backend="torch")
    return out.logp, out.entropy


def trl(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logp = selective_log_softmax(logits, target)
    return logp, entropy_from_logits(logits) if entropy else None


def eager(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logps = torch.log_softmax(logits, -1)
    logp = logps.gather(-1, target[:, None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1) if entropy else None


CONTESTANTS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "rlcore": ours,
    "trl": trl,
    "eager": eager,
}


def make_rows(dtype: torch.dtype, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(tokens, vocabulary, dtype=dtype)
    for block in logits.split(16):
        block.copy_(2 * torch.randn(block.shape, generator=generator))
    return logits, torch.randint(vocabulary, (tokens,), generator=generator)


def forward_backward(name: str, logits: Tensor, target: Tensor, entropy: bool) -> Tensor:
    """One training step's work: 1 logp + 0.01 entropy, differentiated. Returns logp."""
    leaf = logits.detach().requires_grad_()
    logp, entropies = CONTESTANTS[name](leaf, target, entropy)
    loss = logp.sum() if entropies is None else logp.sum() + 0.01 * entropies.sum()
    loss.backward()
    return logp.detach()


def _reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    return int(kilobytes) * 1024


def main(name: str, dtype: str, tokens: str, vocabulary: str, entropy: str) -> None:
    torch.set_num_threads(1)
    shape = (int(tokens), int(vocabulary))
    logits, target = make_rows(getattr(torch, dtype), *shape)
    # imports and first-use costs come off: a tiny call of the same kind goes first
    forward_backward(name, logits[:2].clone(), target[:2], entropy == "True")
    _reset_resident_peak()
    before = _resident_peak()
    forward_backward(name, logits, target, entropy == "True")
    print(json.dumps(_resident_peak() - before - logits.numel() * logits.element_size()))


if __name__ == "__main__":
    main(*sys.argv[1:])
