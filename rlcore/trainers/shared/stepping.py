"""One optimizer step, and the learning rate and gradient norm that go with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from rlcore.trainers.options.schedules import learning_rate_scale
from rlcore.trainers.shared.divergence import require_finite
from rlcore.trainers.shared.run import Run

Item = TypeVar("Item")


def optimizer_step(
    run: Run, step: int, batches: Sequence[Item], loss_of: Callable[[Item], torch.Tensor]
) -> dict[str, float]:
    """One optimizer step on the summed loss of `batches`: {"loss", "grad_norm", "learning_rate"}.

    `loss_of` divides by the count of the whole batch over the number of processes: gradients are
    then averaged over processes and add up to the whole batch's. The load-balancing loss of
    experts, where it counts, is the mean of the micro-batches': {"aux_loss"}, without its weight.

    Raises:
        TrainingDiverged: the loss or the gradient's norm is not finite; nothing was changed then.
    """
    accelerator = run.accelerator
    run.step = step
    run.phase("updating")
    rate = set_learning_rate(run, step)
    run.optimizer.zero_grad()
    losses, balances = [], []
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.model):
            loss = loss_of(batch)
            if run.router is not None:
                balance = run.router.take() / len(batches)
                balances.append(balance.detach())
                loss = loss + balance
            accelerator.backward(loss)
        losses.append(loss.detach())
    loss = accelerator.reduce(torch.stack(losses).sum(), "mean").item()
    grad_norm = clip_gradients(run)
    require_finite(run, step, {"loss": loss, "grad_norm": grad_norm})
    run.optimizer.step()
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
    if run.router is not None:
        balance = accelerator.reduce(torch.stack(balances).sum(), "mean").item()
        metrics["aux_loss"] = balance / run.router.coef
    return metrics


def set_learning_rate(run: Run, step: int) -> float:
    """Give the optimizer the rate that its schedule has for `step`; returns it."""
    config = run.config
    rate = config.learning_rate * learning_rate_scale(config, step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(run: Run) -> float:
    """Scale the gradients down to the norm max_grad_norm; returns the norm that they had."""
    limit = run.config.max_grad_norm or math.inf
    if isinstance(run.policy, FSDPModule):
        # accelerate looks for the model by comparing its parameters, which fails beside another's
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
        return float(norm.full_tensor())
    return float(run.accelerator.clip_grad_norm_(run.model.parameters(), limit))
