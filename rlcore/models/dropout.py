"""Dropout switched off for good, where policies are compared with their older selves."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from rlcore.errors import UserError
from rlcore.models.forward import probe_rows


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: a policy ratio means nothing when each pass draws another network."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # many architectures keep a rate as a plain number: layerdrop, jitter_noise
        for name in _rates(vars(module)):
            setattr(module, name, 0.0)


def _rates(values: dict[str, Any]) -> list[str]:
    """The names among those of a module or a configuration that make a forward pass random."""
    return [
        name
        for name, value in values.items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    ]


@torch.no_grad()
def check_quiet(model: Any, name_or_path: str) -> None:
    """Raise UserError where two passes in training mode differ though dropout is off."""
    rates = _rates(model.config.get_text_config().to_dict())
    if not rates:
        return
    ids, _ = probe_rows(model)
    first, second = (model(ids, use_cache=False).logits for _ in range(2))
    if not torch.equal(first, second):
        raise UserError(
            f"{name_or_path!r}: the dropout of a {type(model).__name__} cannot be switched off, as "
            f"policy ratios need it: set {', '.join(rates)} to 0 in its config.json"
        )
