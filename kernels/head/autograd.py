"""The fused head in eager mode: autograd functions around the passes of token_passes.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import RowGradients, RowStatistics, scale_
from .chunks import Run
from .token_passes import logprob_backward, logprob_pass, policy_pass, scale_unit_gradient


class LinearPolicyLoss(torch.autograd.Function):
    """The forward makes the gradients, the backward scales and hands them out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *arguments):
        (loss, *rest), gradients = policy_pass(hidden, weight, bias, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.inputs = 3 + len(arguments)
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        ctx.set_materialize_grads(False)
        return loss.sum(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * ctx.inputs
        return *scaled(ctx.saved_tensors, dloss), *(None,) * (ctx.inputs - 3)


def scaled(gradients: Sequence[Tensor | None], scale: Tensor) -> list[Tensor | None]:
    """Each * scale, which autograd rounds to its input's dtype."""
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    return [None if g is None else _scaled(g, scale, keep) for g in gradients]


def _scaled(gradient: Tensor, scale: Tensor, keep: bool) -> Tensor:
    """gradient * scale, in its own memory unless it must be kept for another backward."""
    if keep:
        gradient = gradient.clone()
    if scale.device.type == "cpu" and scale == 1:
        return gradient
    return scale_(gradient, scale)


class LinearTokenLogprob(torch.autograd.Function):
    """(logp, entropy | None, lse), differentiable by recomputing or by what the plan has kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, mask, with_entropy, run: Run):
        statistics, saved = logprob_pass(hidden, weight, bias, target, mask, with_entropy, run)
        logp, entropy, lse, row_max, log_sum = statistics
        softmax = (logp, entropy, row_max, log_sum)
        ctx.save_for_backward(hidden, weight, bias, target, mask, *softmax, *saved)
        ctx.run = run
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dlse):
        hidden, weight, bias, target, mask, *softmax = ctx.saved_tensors
        logp, entropy, row_max, log_sum, *saved = softmax
        given = RowGradients(dlogp, dentropy, dlse)
        if all(g is None for g in given):
            gradients = [None] * 3
        elif ctx.run.plan.strategy == "unit-gradient":
            dhidden = scale_unit_gradient(weight, target, mask, saved, given, ctx.run.head)
            gradients = [dhidden, None, None]
        else:
            statistics = RowStatistics(logp, entropy, None, row_max, log_sum)
            kept = saved[0] if saved else None
            gradients = logprob_backward(
                hidden, weight, bias, target, mask, statistics, kept, given, ctx.run
            )
        return *gradients, *(None,) * 4
