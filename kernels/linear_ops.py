"""The fused head as registered operators, for torch.compile and other tracers.

Functional twins of the autograd functions in linear_head.py, over the same passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear_head
from .blocks import statistics_dtype
from .checks import check_targets_in_range
from .linear_plan import LinearPlan, make_plan
from .linear_products import Head
from .surrogates import PolicyOptions


def _plan(hidden, weight, head: Head, chunk_bytes, needs, coupled: bool) -> LinearPlan:
    return make_plan(
        hidden, weight, chunk_bytes=chunk_bytes, needs=tuple(needs), coupled=coupled,
        separate_gradient=head.softcap is not None, keeps=False,
    )  # fmt: skip


def _present(parts: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: an empty one stands for None."""
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def _empty_gradients(hidden, weight, needs) -> list[Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [weight.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)]


@torch.library.custom_op("rlcore::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    ratio: Tensor | None,
    token_weight: Tensor,
    surrogate: str,
    parameters: list[float],
    kl_estimator: str,
    beta: float,
    entropy_coef: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, entropy, kl, clipped, dhidden, dweight, dbias), empty where there is none."""
    check_targets_in_range(target, token_weight != 0, weight.shape[0], backend)
    head = Head(temperature, softcap, logit_scale)
    plan = _plan(hidden, weight, head, chunk_bytes, needs, coupled=False)
    options = PolicyOptions(surrogate, tuple(parameters), kl_estimator, beta, entropy_coef)
    (loss, *rest), gradients = linear_head._policy_pass(
        hidden, weight, bias, target, [advantage, old_logp, ref_logp, ratio], token_weight,
        options, head, plan, tuple(needs), backend,
    )  # fmt: skip
    return _present([loss.sum(), *rest, *gradients], loss)


@linear_policy_loss_op.register_fake
def _(hidden, weight, bias, target, advantage, old_logp, ref_logp, ratio, token_weight, *options):
    dtype = statistics_dtype(hidden)
    per_token = [torch.empty(target.shape, dtype=dtype, device=target.device) for _ in range(3)]
    logp, entropy, kl = per_token
    kl = kl if ref_logp is not None else logp.new_empty(0)
    clipped = torch.empty(target.shape, dtype=torch.bool, device=target.device)
    gradients = _empty_gradients(hidden, weight, options[-2])
    gradients = [g if g.numel() else logp.new_empty(0) for g in gradients]
    return logp.new_empty(()), logp, entropy, kl, clipped, *gradients


def _policy_context(ctx, inputs, output):
    ctx.save_for_backward(*output[-3:])
    ctx.needs, ctx.inputs = inputs[-2], len(inputs)
    ctx.set_materialize_grads(False)


def _policy_backward(ctx, dloss, *_):
    gradients = [
        (g * dloss).to(g.dtype) if need and dloss is not None else None
        for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *gradients, *(None,) * (ctx.inputs - 3)


linear_policy_loss_op.register_autograd(_policy_backward, setup_context=_policy_context)


@torch.library.custom_op("rlcore::linear_token_logprob", mutates_args=())
def linear_token_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    with_entropy: bool,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, row_max, log_sum), empty where the call does without."""
    head = Head(temperature, softcap, logit_scale)
    plan = _plan(hidden, weight, head, chunk_bytes, needs, coupled=True)
    statistics, _ = linear_head._logprob_pass(
        hidden, weight, bias, target, mask, with_entropy, head, plan, backend
    )
    return _present(statistics, statistics[0])


@linear_token_logprob_op.register_fake
def _(hidden, weight, bias, target, mask, with_entropy, *options):
    on_triton = options[-1] == "triton"
    present = (True, with_entropy, True, on_triton, on_triton)
    like = {"dtype": statistics_dtype(hidden), "device": target.device}
    return tuple(torch.empty(target.shape if p else (0,), **like) for p in present)


@torch.library.custom_op("rlcore::linear_token_logprob_backward", mutates_args=())
def linear_token_logprob_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    statistics: list[Tensor],
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), empty where unneeded; statistics = (entropy, row_max, log_sum)."""
    head = Head(temperature, softcap, logit_scale)
    plan = _plan(hidden, weight, head, chunk_bytes, needs, coupled=True)
    saved = [s if s.numel() == target.numel() else None for s in statistics]
    gradients = linear_head._logprob_backward(
        hidden, weight, bias, target, mask, *saved, None, dlogp, dentropy, dlse,
        head, plan, tuple(needs), backend,
    )  # fmt: skip
    return _present(gradients, weight)


@linear_token_logprob_backward_op.register_fake
def _(hidden, weight, *rest):
    return tuple(_empty_gradients(hidden, weight, rest[-2]))


def _logprob_context(ctx, inputs, output):
    hidden, weight, bias, target, mask, ctx.with_entropy, *ctx.options = inputs
    _, entropy, _, row_max, log_sum = output
    ctx.save_for_backward(hidden, weight, bias, target, mask, entropy, row_max, log_sum)
    ctx.set_materialize_grads(False)


def _logprob_op_backward(ctx, dlogp, dentropy, dlse, *_):
    hidden, weight, bias, target, mask, *statistics = ctx.saved_tensors
    if not ctx.with_entropy:
        dentropy = None
    gradients = linear_token_logprob_backward_op(
        hidden, weight, bias, target, mask, statistics, dlogp, dentropy, dlse, *ctx.options
    )
    needs = ctx.options[-2]
    return *(g if n else None for g, n in zip(gradients, needs, strict=True)), *(None,) * 9


linear_token_logprob_op.register_autograd(_logprob_op_backward, setup_context=_logprob_context)
