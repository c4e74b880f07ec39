"""A sharded policy's weights, whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rlcore.trainers.shared.run import Run


def whole_weights(run: Run) -> dict[str, torch.Tensor] | None:
    """A sharded model's weights brought together on the main process; None where it has them all.

    Every process calls it, and gives its shards.
    """
    return run.accelerator.get_state_dict(run.model) if run.is_sharded else None
