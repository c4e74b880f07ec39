"""The Triton kernels of log-probabilities, and their launches.

Floors: the forward reads every logit once; the backward reads and writes every logit once.
"""

from __future__ import annotations

import torch

from ..backend import tl, triton
from ..blocks import RowGradients, RowStatistics, empty_statistics, statistics_dtype
from .launch import (
    READ_THREADS,
    WRITE_THREADS,
    number,
    phase,
    row_launch,
    row_strides,
    with_unit_stride,
)
from .sweep import (
    row_offset,
    row_statistics,
    store_row_constant,
    store_row_gradient,
    target_logit,
)

KEEPS_SOFTMAX = True  # a backward takes row_max and log_sum from the forward
UNSPECIALIZED = ["vocabulary", "rows_per_batch", "stride_b", "stride_t", "dstride_b", "dstride_t"]


@triton.jit(do_not_specialize=UNSPECIALIZED[:4])
def token_logprob_forward_kernel(
    Logits,
    Target,
    Mask,
    Logp,
    Entropy,
    Lse,
    RowMax,
    LogSum,
    vocabulary,
    rows_per_batch,
    stride_b,
    stride_t,
    inv_temperature,
    THREADS: tl.constexpr,
):
    """Logits (N, V) or (B, T, V); Target, Mask (or None), the results: (rows,), Entropy or None.

    One program a row writes its statistics; those of a masked row are 0.
    """
    row = tl.program_id(0)
    WITH_ENTROPY: tl.constexpr = Entropy is not None
    counted = True
    if Mask is not None:
        counted = tl.load(Mask + row) != 0
    if counted:
        Row = Logits + row_offset(row, rows_per_batch, stride_b, stride_t)
        target = tl.load(Target + row)
        row_max, log_sum, entropy = row_statistics(
            Row, vocabulary, inv_temperature, WITH_ENTROPY, "", THREADS
        )
        chosen = target_logit(Row, vocabulary, target, row_max.dtype)
        tl.store(Logp + row, (chosen - row_max) * inv_temperature - log_sum)
        tl.store(Lse + row, row_max * inv_temperature + log_sum)
        tl.store(RowMax + row, row_max)
        tl.store(LogSum + row, log_sum)
        if WITH_ENTROPY:
            tl.store(Entropy + row, entropy)
    else:
        tl.store(Logp + row, 0.0)
        tl.store(Lse + row, 0.0)
        tl.store(RowMax + row, 0.0)
        tl.store(LogSum + row, 0.0)
        if WITH_ENTROPY:
            tl.store(Entropy + row, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def token_logprob_backward_kernel(
    Logits,
    Dlogits,
    Target,
    Mask,
    Entropy,
    RowMax,
    LogSum,
    Dlogp,
    Dlse,
    Dentropy,
    vocabulary,
    rows_per_batch,
    stride_b,
    stride_t,
    dstride_b,
    dstride_t,
    inv_temperature,
    SAME_PHASE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Dlogits, like Logits and perhaps the same memory, of the derivatives by each statistic.

    Those (Dlogp, Dlse, Dentropy, each (rows,)) and Mask may be None. One program a row writes it.
    """
    row = tl.program_id(0)
    WITH_ENTROPY: tl.constexpr = Dentropy is not None
    Row = Logits + row_offset(row, rows_per_batch, stride_b, stride_t)
    Drow = Dlogits + row_offset(row, rows_per_batch, dstride_b, dstride_t)
    counted = True
    if Mask is not None:
        counted = tl.load(Mask + row) != 0
    row_max = tl.load(RowMax + row)
    at_target = row_max * 0
    at_softmax = row_max * 0
    at_entropy = row_max * 0
    if Dlogp is not None:
        at_target = tl.load(Dlogp + row)
        at_softmax = -at_target
    if Dlse is not None:
        at_softmax += tl.load(Dlse + row)
    if WITH_ENTROPY:
        at_entropy = tl.load(Dentropy + row)
    flows = (at_target != 0) | (at_softmax != 0) | (at_entropy != 0)
    if counted & flows:
        target = tl.load(Target + row)
        in_range = (target >= 0) & (target < vocabulary)
        at_softmax = tl.where(in_range, at_softmax, float("nan"))
        log_sum = tl.load(LogSum + row)
        entropy = log_sum
        if WITH_ENTROPY:
            entropy = tl.load(Entropy + row)
        chosen = target_logit(Row, vocabulary, target, row_max.dtype)
        store_row_gradient(
            Row, Drow, vocabulary, target, chosen, row_max, log_sum, entropy,
            at_target, at_softmax, at_entropy, inv_temperature, SAME_PHASE, WITH_ENTROPY, "",
            THREADS,
        )  # fmt: skip
    else:
        store_row_constant(Drow, vocabulary, 0.0, THREADS)


def token_logprob_forward(
    logits, target, mask, temperature, with_entropy, with_softmax=KEEPS_SOFTMAX
) -> RowStatistics:
    """Zeros where the mask is false; row_max and log_sum are always made."""
    logits = with_unit_stride(logits)
    dtype = statistics_dtype(logits)
    logp, lse, row_max, log_sum, entropy = empty_statistics(target, dtype, 5)
    entropy = entropy if with_entropy else None
    if target.numel():
        launch = row_launch(logits.shape[-1], logits.element_size(), READ_THREADS)
        token_logprob_forward_kernel[(target.numel(),)](
            logits, target.contiguous(), mask, logp, entropy, lse, row_max, log_sum,
            logits.shape[-1], *row_strides(logits), number(1.0 / temperature, dtype),
            **launch.options(),
        )  # fmt: skip
    return RowStatistics(logp, entropy, lse, row_max, log_sum)


def token_logprob_backward(
    logits, dlogits, target, mask, statistics: RowStatistics, gradients: RowGradients, temperature
):
    """Writes the gradient into dlogits, which may be the logits themselves."""
    logits = with_unit_stride(logits)
    if not target.numel():
        return
    launch = row_launch(logits.shape[-1], logits.element_size(), WRITE_THREADS)
    dlogp, dentropy, dlse = (None if g is None else g.contiguous() for g in gradients)
    _, entropy, _, row_max, log_sum = statistics
    token_logprob_backward_kernel[(target.numel(),)](
        logits, dlogits, target.contiguous(), mask, entropy, row_max, log_sum,
        dlogp, dlse, dentropy, logits.shape[-1], *row_strides(logits), *row_strides(dlogits)[1:],
        number(1.0 / temperature, row_max.dtype), SAME_PHASE=phase(logits) == phase(dlogits),
        **launch.options(),
    )  # fmt: skip


def token_logprob_backward_slice(
    logits, dlogits, row_max, log_sum, entropy, at_softmax, at_entropy, temperature
):
    """p (at_softmax - at_entropy (log p + H)) / T of some columns, from the whole rows' statistics.

    Writes it into dlogits, which may be the logits themselves; at_entropy may be None.
    """
    # the derivative by the log-sum-exp alone, which is the same whatever the target
    anywhere = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    token_logprob_backward(
        logits, dlogits, anywhere, None, RowStatistics(None, entropy, None, row_max, log_sum),
        RowGradients(None, at_entropy, at_softmax), temperature,
    )  # fmt: skip
