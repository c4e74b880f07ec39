"""The module that computes a call: one per backend, all with the same functions and arguments.

`torch_backend` and `triton_backend` list them; tests compare the two lists.
"""

from __future__ import annotations

from types import ModuleType

from . import torch_backend, triton_backend

IMPLEMENTATIONS = {"triton": triton_backend, "torch": torch_backend}


def implementation(backend: str) -> ModuleType:
    """The module of a name that `resolve_backend` has given."""
    return IMPLEMENTATIONS[backend]
