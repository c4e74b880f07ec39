"""The fused head as registered operators, for torch.compile and other tracers.

Functional twins of the autograd functions in autograd.py, over the same passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import RowGradients, RowStatistics, statistics_dtype
from ..checks import check_targets_in_range
from ..formulas.surrogates import PerToken, PolicyOptions
from .chunks import Run
from .plan import make_plan
from .products import Head, gradient_dtype
from .token_passes import logprob_backward, logprob_pass, policy_pass


def _run(hidden, weight, temperature, softcap, logit_scale, chunk_bytes, needs, backend, coupled):
    """How an operator goes through its tokens: it keeps nothing but what it returns."""
    needs = tuple(needs)
    plan = make_plan(
        hidden, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=coupled,
        separate_gradient=softcap is not None, keeps=False,
    )  # fmt: skip
    return Run(Head(temperature, softcap, logit_scale), plan, needs, backend)


def _present(parts: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: an empty one stands for None."""
    return tuple(like.new_empty(0) if part is None else part for part in parts)


def _empty_gradients(hidden, weight, needs, dtype, otherwise) -> list[Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (dtype, dtype, statistics_dtype(hidden))
    return [
        torch.empty(shape if need else (0,), dtype=own if need else otherwise, device=hidden.device)
        for shape, own, need in zip(shapes, dtypes, needs, strict=True)
    ]


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
    kl_estimator: str,
    numbers: list[float],
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, entropy, kl, clipped, dhidden, dweight, dbias), empty where there is none."""
    check_targets_in_range(target, token_weight != 0, weight.shape[0], backend)
    options = PolicyOptions.of(surrogate, kl_estimator, numbers)
    run = _run(
        hidden, weight, temperature, softcap, logit_scale, chunk_bytes, needs, backend, False
    )
    (loss, *rest), gradients = policy_pass(
        hidden, weight, bias, target, PerToken(advantage, old_logp, ref_logp, ratio), token_weight,
        options, run,
    )  # fmt: skip
    return _present([loss.sum(), *rest, *gradients], loss)


@linear_policy_loss_op.register_fake
def _(hidden, weight, bias, target, advantage, old_logp, ref_logp, ratio, token_weight, *options):
    dtype = statistics_dtype(hidden)
    per_token = [torch.empty(target.shape, dtype=dtype, device=target.device) for _ in range(3)]
    logp, entropy, kl = per_token
    kl = kl if ref_logp is not None else logp.new_empty(0)
    clipped = torch.empty(target.shape, dtype=torch.bool, device=target.device)
    gradients = _empty_gradients(hidden, weight, options[-2], gradient_dtype(weight.dtype), dtype)
    return logp.new_empty(()), logp, entropy, kl, clipped, *gradients


def _policy_context(ctx, inputs, output):
    ctx.save_for_backward(*output[-3:])
    ctx.needs, ctx.inputs = inputs[-2], len(inputs)
    ctx.set_materialize_grads(False)


def _policy_backward(ctx, dloss, *_):
    gradients = [
        (g * dloss.reshape(1)).to(g.dtype) if need and dloss is not None else None
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
    run = _run(hidden, weight, temperature, softcap, logit_scale, chunk_bytes, needs, backend, True)
    statistics, _ = logprob_pass(hidden, weight, bias, target, mask, with_entropy, run)
    return _present(statistics, statistics[0])


@linear_token_logprob_op.register_fake
def _(hidden, weight, bias, target, mask, with_entropy, *options):
    present = RowStatistics(True, with_entropy, True, True, True)
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
    """(dhidden, dweight, dbias), empty where unneeded.

    The statistics are (logp, entropy, row_max, log_sum).
    """
    run = _run(hidden, weight, temperature, softcap, logit_scale, chunk_bytes, needs, backend, True)
    logp, entropy, row_max, log_sum = (
        s if s.numel() == target.numel() else None for s in statistics
    )
    statistics = RowStatistics(logp, entropy, None, row_max, log_sum)
    given = RowGradients(dlogp, dentropy, dlse)
    gradients = logprob_backward(hidden, weight, bias, target, mask, statistics, None, given, run)
    return _present(gradients, weight)


@linear_token_logprob_backward_op.register_fake
def _(hidden, weight, *rest):
    return tuple(_empty_gradients(hidden, weight, rest[-2], weight.dtype, weight.dtype))


def _logprob_context(ctx, inputs, output):
    hidden, weight, bias, target, mask, ctx.with_entropy, *ctx.options = inputs
    logp, entropy, _, row_max, log_sum = output
    ctx.save_for_backward(hidden, weight, bias, target, mask, logp, entropy, row_max, log_sum)
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
