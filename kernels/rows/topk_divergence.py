"""The KL to a teacher of whom the likeliest tokens are known alone: one behind a server.

    KL = sum_k q_k (log q_k - log p_k) + q_r (log q_r - log p_r)

q_r and p_r are what either gives to all other tokens together. PyTorch's on either backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import takes_short_way
from ..blocks import statistics_dtype
from ..checks import FLOATS, check_finite, check_positive, checks_types
from ..torch_backend.topk import topk_backward, topk_forward
from .categorical_kl import check_logits, check_mask


class _TopK(torch.autograd.Function):
    """The short way of eager mode."""

    @staticmethod
    def forward(ctx, logits, ids, logp, mask, temperature, tail):
        ctx.save_for_backward(logits, ids, logp, mask)
        ctx.options = temperature, tail
        return topk_forward(logits, ids, logp, mask, temperature, tail, statistics_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        return _gradient(*ctx.saved_tensors, dkl, *ctx.options), *(None,) * 5


def _gradient(logits, ids, logp, mask, dkl, temperature, tail) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    topk_backward(logits, ids, logp, dlogits, mask, dkl, temperature, tail)
    return dlogits


@torch.library.custom_op("rlcore::topk_divergence", mutates_args=())
def topk_divergence_op(
    logits: Tensor, ids: Tensor, logp: Tensor, mask: Tensor | None, temperature: float, tail: bool
) -> Tensor:
    return topk_forward(logits, ids, logp, mask, temperature, tail, statistics_dtype(logits))


@topk_divergence_op.register_fake
def _(logits, ids, logp, mask, temperature, tail):
    return logits.new_empty(logits.shape[:-1], dtype=statistics_dtype(logits))


@torch.library.custom_op("rlcore::topk_divergence_backward", mutates_args=())
def topk_divergence_backward_op(
    logits: Tensor,
    ids: Tensor,
    logp: Tensor,
    mask: Tensor | None,
    dkl: Tensor,
    temperature: float,
    tail: bool,
) -> Tensor:
    return _gradient(logits, ids, logp, mask, dkl, temperature, tail)


@topk_divergence_backward_op.register_fake
def _(logits, ids, logp, mask, dkl, temperature, tail):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    *tensors, temperature, tail = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = temperature, tail


def _op_backward(ctx, dkl):
    return topk_divergence_backward_op(*ctx.saved_tensors, dkl, *ctx.options), *(None,) * 5


topk_divergence_op.register_autograd(_op_backward, setup_context=_setup_context)


@checks_types
def topk_divergence(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    *,
    tail: bool = True,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) where of the teacher K tokens' log-probabilities are known alone.

    All other tokens count as one, whose probability is what is left: a KL of K + 1 outcomes, so
    never negative, at most the KL of the whole vocabulary, and that one for K = V. It grows with
    K (data processing: Cover and Thomas, Elements of Information Theory, 2.8).

    Args:
        logits: (N, V) or (B, T, V), the student's, float32, bfloat16, float16 or float64, any
            strides; -inf bans a token.
        teacher_ids: (N, K) or (B, T, K) int64, each at most once in its row.
        teacher_logp: like teacher_ids, float, from the teacher's distribution over the whole
            vocabulary at this temperature; -inf where there is no id, which is not the first.
            Takes no gradient.
        tail: False shares both distributions out over the K tokens instead, and asks nothing of the
            others.
        temperature: positive; divides the student's logits.
        mask: bool (N,) or (B, T), true = the token counts. Elsewhere the result and the gradient
            are 0, whatever stands there. None = every token counts.

    Returns:
        (N,) or (B, T), in nats, float32 (float64 of float64 logits), differentiable once in
        logits. Where the student bans what the teacher says it is inf.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device or temperature, an id
            outside of the vocabulary.
    """
    check_logits("logits", logits)
    mask = check_mask(mask, logits, "logits")
    _check_teacher(logits, teacher_ids, teacher_logp, mask)
    check_positive(temperature=temperature)
    check_finite(temperature=temperature)
    teacher_logp = teacher_logp.detach()
    call = topk_divergence_op
    if takes_short_way(logits, teacher_ids, teacher_logp, mask):
        call = _TopK.apply
    return call(logits, teacher_ids, teacher_logp, mask, temperature, tail)


def _check_teacher(logits: Tensor, ids: Tensor, logp: Tensor, mask: Tensor | None) -> None:
    if ids.shape[:-1] != logits.shape[:-1] or ids.dim() != logits.dim() or not ids.shape[-1]:
        raise ValueError(
            f"teacher_ids must have shape {(*logits.shape[:-1], 'K')}, K ids for each row of "
            f"logits, got {tuple(ids.shape)}"
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"teacher_ids must be int64, got {ids.dtype}")
    if logp.shape != ids.shape:
        raise ValueError(
            f"teacher_logp must have the shape of teacher_ids, {tuple(ids.shape)}, got "
            f"{tuple(logp.shape)}"
        )
    if logp.dtype not in FLOATS:
        raise ValueError(
            f"teacher_logp must be float32, bfloat16, float16 or float64, got {logp.dtype}"
        )
    for name, tensor in {"teacher_ids": ids, "teacher_logp": logp}.items():
        if tensor.device != logits.device:
            raise ValueError(
                f"{name} must be on the device of logits, '{logits.device}', got '{tensor.device}'"
            )
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    counted = logp > -torch.inf
    if mask is not None:
        counted &= mask.unsqueeze(-1)
    outside = counted & ((ids < 0) | (ids >= logits.shape[-1]))
    if outside.any():
        raise ValueError(
            f"teacher_ids must be in [0, {logits.shape[-1]}), the columns of logits, got "
            f"{ids[outside][0].item()}"
        )
    first = logp[..., 0] == -torch.inf
    if (first if mask is None else first & mask).any():
        raise ValueError(
            "teacher_logp must not be -inf in its first column: of every row that counts one id "
            "is needed"
        )
