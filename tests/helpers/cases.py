"""Inputs of the row kernels' tests: logits in every layout, and the scalars that go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import oracle


def flat(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, v).mul(2).to(dtype)


def batch(b: int, t: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(b, t, v).mul(2).to(dtype)


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "batch_and_time": lambda dtype: batch(2, 3, 127, dtype),
    "shifted_by_one_token": lambda dtype: batch(2, 4, 127, dtype)[:, :-1],
    "every_other_row": lambda dtype: flat(6, 127, dtype)[::2],
    "padded_vocabulary": lambda dtype: flat(3, 131, dtype)[:, 1:-3],
    "transposed": lambda dtype: flat(127, 3, dtype).t(),
    "time_first": lambda dtype: batch(3, 2, 127, dtype).transpose(0, 1),
    "one_row_expanded": lambda dtype: flat(1, 127, dtype).expand(3, 127),
    "one_row": lambda dtype: flat(1, 127, dtype),
    "no_row": lambda dtype: flat(0, 127, dtype),
    "no_time": lambda dtype: batch(2, 0, 127, dtype),
}


@dataclass
class PolicyInputs:
    """Arguments of `policy_loss`; `options` are its keywords, tensors among them."""

    logits: Tensor
    target: Tensor
    advantage: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def random_target(logits: Tensor) -> Tensor:
    return torch.randint(logits.shape[-1], logits.shape[:-1])


# Ratios below, inside and above the clips that the tests use, epsilon_high and delta among them.
RATIOS = torch.tensor([0.3, 0.85, 1.05, 1.15, 1.25, 1.4, 1.8, 4.0], dtype=torch.float64)


def policy_inputs(logits: Tensor, *names: str, masked: float = 0.0, **options) -> PolicyInputs:
    """Inputs for `logits`; `names` are the optional tensors to pass as well.

    From 16 tokens on, each of RATIOS meets a positive and a negative advantage.
    """
    target = random_target(logits)
    temperature = options.get("temperature", 1.0)
    logp = oracle.token_logprob(logits.double(), target, temperature=temperature)[0]
    index = (torch.arange(target.numel()) + int(torch.randint(16, ()))).view(target.shape)
    ratio = RATIOS[index % 8] * torch.empty(target.shape).uniform_(0.98, 1.02)
    sign = torch.where(index % 16 < 8, 1.0, -1.0)
    offered = {
        "old_logp": (logp - ratio.log()).float(),
        "ref_logp": (logp + 0.6 * torch.randn(target.shape)).float(),
        "importance_sampling_ratio": torch.rand(target.shape) + 0.5,
        "mask": torch.rand(target.shape) >= masked,
    }
    options |= {name: offered[name] for name in names}
    advantage = sign * torch.empty(target.shape).uniform_(0.2, 2.0)
    return PolicyInputs(logits, target, advantage, options)
