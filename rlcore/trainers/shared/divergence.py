"""Where a run stops because something of it is NaN or infinite, on all processes at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlcore.errors import TrainingDiverged
from rlcore.functional.finite import first_not_finite
from rlcore.models.forward import completion_outputs, evaluating
from rlcore.runs.checkpoint import last_checkpoint

if TYPE_CHECKING:
    from rlcore.trainers.shared.run import Run


def require_finite(run: Run, step: int, quantities: Mapping[str, float]) -> None:
    """Raise TrainingDiverged for the first of `quantities`, which all processes know alike."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            raise _diverged(run, step, run.prefix + name, value)


def stop_together(run: Run, step: int, found: tuple[str, float] | None) -> None:
    """Raise TrainingDiverged on all processes where any of them `found` (quantity, value)."""
    count = torch.tensor(float(found is not None), device=run.accelerator.device)
    if run.accelerator.reduce(count, "sum").item():
        raise _diverged(run, step, *(found or ("a quantity of another process", math.nan)))


def check_sound(run: Run, step: int) -> None:
    """Raise TrainingDiverged unless all that a save after `step` keeps is worth it.

    That is: the trained weights and the optimizers' states are finite, and so is what the model
    makes of a few tokens, which finite weights may be too large for. Every process calls it.
    """
    logits = _probe_logits(run)
    found = first_not_finite(_kept(run.accelerator))
    if found is None and bool((logits.isnan() | logits.isposinf()).any()):
        found = ("a logit", math.nan)
    stop_together(run, step, found)


def _kept(accelerator: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for model in accelerator._models:
        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            if parameter.requires_grad:
                yield f"weight {name}", parameter
    for optimizer in accelerator._optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"the optimizer's {name}", value


@torch.no_grad()
def _probe_logits(run: Run) -> torch.Tensor:
    """Logits, or scores, for four tokens."""
    count = len(run.policy.get_input_embeddings().weight)
    ids = torch.arange(4, device=run.accelerator.device)[None] % count
    with evaluating(run.model), run.accelerator.autocast():
        return completion_outputs(run.model, ids, torch.ones_like(ids), 3).logits


def _diverged(run: Run, step: int, quantity: str, value: float) -> TrainingDiverged:
    return TrainingDiverged(step, quantity, value, last_checkpoint(run.config.output_dir))
