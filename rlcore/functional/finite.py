"""Whether numbers are numbers: looked for without a copy of what is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def first_not_finite(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> tuple[str, float] | None:
    """(name, value) of the first NaN or infinity among floating-point tensors, None without one.

    Of a sharded tensor this process's part is looked at.
    """
    for name, tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not local.is_floating_point() or not local.numel():
            continue
        # one pass and no temporary; a NaN anywhere makes both ends NaN
        for value in torch.stack(local.detach().aminmax()).tolist():
            if not math.isfinite(value):
                return name, value
    return None
