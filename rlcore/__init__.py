"""Exact fused loss kernels and readable trainers for reinforcement learning of language models.

The functional API: pure functions on tensors, served by Triton kernels on a GPU and by blocked
PyTorch elsewhere. Names are imported when first used, so that `import rlcore` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .advantages import group_advantage, leave_one_out_advantage, whiten
    from .kernels.backend import use_backend
    from .kernels.policy_loss import PolicyLoss, policy_loss
    from .kernels.token_logprob import TokenLogprob, token_logprob

_HOMES = {
    "PolicyLoss": "kernels.policy_loss",
    "TokenLogprob": "kernels.token_logprob",
    "group_advantage": "advantages",
    "leave_one_out_advantage": "advantages",
    "policy_loss": "kernels.policy_loss",
    "token_logprob": "kernels.token_logprob",
    "use_backend": "kernels.backend",
    "whiten": "advantages",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'rlcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
