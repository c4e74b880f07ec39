"""The Triton kernels of policy losses, and their launches.

Floor: one read and one write of the logits.
"""

from __future__ import annotations

import torch

from ..backend import tl, triton
from ..blocks import empty_statistics, scale_, statistics_dtype
from ..formulas.kl import policy_kl
from ..formulas.surrogates import SURROGATES
from ..limits import held_, times_
from .launch import WRITE_THREADS, number, numbers, phase, row_launch, row_strides, with_unit_stride
from .sweep import (
    body_of,
    edge_of,
    row_offset,
    row_statistics,
    store_row_constant,
    store_row_gradient,
    target_logit,
    tile_offsets,
)
from .token_logprob import UNSPECIALIZED


@triton.jit
def joined(parameters):
    """The float64 numbers of what `numbers` has parted."""
    whole = ()
    for k in tl.static_range(0, len(parameters), 2):
        high = tl.full((), parameters[k], tl.float64)
        # Triton knows no starred items
        whole = whole + (high + tl.full((), parameters[k + 1], tl.float64),)  # noqa: RUF005
    return whole


@triton.jit(do_not_specialize=UNSPECIALIZED)
def policy_loss_kernel(
    Logits,
    Dlogits,
    Target,
    Advantage,
    OldLogp,
    RefLogp,
    Ratio,
    Weight,
    Loss,
    Logp,
    Entropy,
    KL,
    Clipped,
    vocabulary,
    rows_per_batch,
    stride_b,
    stride_t,
    dstride_b,
    dstride_t,
    inv_temperature,
    beta,
    entropy_coef,
    parameters,
    SURROGATE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    WITH_BONUS: tl.constexpr,
    SAME_PHASE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Logits (N, V) or (B, T, V) to Dlogits, which is alike and perhaps the same memory.

    Per token, (rows,): Target, Advantage, Weight, and OldLogp, RefLogp, Ratio or None; Loss, Logp,
    Entropy, KL (None without RefLogp) and Clipped are written. One program takes one row, and
    reads it twice: the second time what is in the L2 cache comes from there.
    """
    row = tl.program_id(0)
    Row = Logits + row_offset(row, rows_per_batch, stride_b, stride_t)
    Drow = Dlogits + row_offset(row, rows_per_batch, dstride_b, dstride_t)
    weight = tl.load(Weight + row)
    if weight != 0:
        target = tl.load(Target + row)
        row_max, log_sum, entropy = row_statistics(
            Row, vocabulary, inv_temperature, True, "evict_last", THREADS
        )
        chosen = target_logit(Row, vocabulary, target, row_max.dtype)
        logp = (chosen - row_max) * inv_temperature - log_sum
        advantage = tl.load(Advantage + row)
        old_logp = logp
        if OldLogp is not None:
            old_logp = tl.load(OldLogp + row)
        given = parameters
        if logp.dtype == tl.float64:
            given = joined(parameters)
        loss, dlogp, clipped = SURROGATE(logp, old_logp, advantage, given)
        if Ratio is not None:
            ratio = tl.load(Ratio + row)
            loss = times_(ratio, loss)
            dlogp = times_(ratio, dlogp)
        if RefLogp is not None:
            kl, dkl = policy_kl(logp, old_logp, tl.load(RefLogp + row), KL_ESTIMATOR)
            tl.store(KL + row, kl)
            if beta != 0:
                # the surrogate and the KL may overflow towards either side
                loss = held_(loss) + held_(kl * beta)
                dlogp = held_(dlogp) + held_(dkl * beta)
        if WITH_BONUS:
            loss -= entropy * entropy_coef
        tl.store(Loss + row, held_(loss) * weight)
        tl.store(Logp + row, logp)
        tl.store(Entropy + row, entropy)
        tl.store(Clipped + row, clipped)
        # held, then weighted, as the loss is; and again, for a weight above 1
        dlogp = held_(held_(dlogp) * weight)
        # NaN where the target is out of range, and then so is the whole row
        dlogp = tl.where(logp == logp, dlogp, logp)
        if (dlogp != 0) | WITH_BONUS:
            store_row_gradient(
                Row, Drow, vocabulary, target, chosen, row_max, log_sum, entropy,
                dlogp, -dlogp, -(weight * entropy_coef), inv_temperature, SAME_PHASE, WITH_BONUS,
                "evict_first", THREADS,
            )  # fmt: skip
        else:
            store_row_constant(Drow, vocabulary, 0.0, THREADS)
    else:
        tl.store(Loss + row, 0.0)
        tl.store(Logp + row, 0.0)
        tl.store(Entropy + row, 0.0)
        tl.store(Clipped + row, False)
        if RefLogp is not None:
            tl.store(KL + row, 0.0)
        store_row_constant(Drow, vocabulary, 0.0, THREADS)


@triton.jit(do_not_specialize=["vocabulary", "rows_per_batch", "stride_b", "stride_t"])
def scale_rows_kernel(
    Rows, Scale, vocabulary, rows_per_batch, stride_b, stride_t, THREADS: tl.constexpr
):
    """Multiplies rows by a scalar in device memory; a scale of 1 touches nothing."""
    scale = tl.load(Scale)
    if scale != 1:
        row = tl.program_id(0)
        Row = Rows + row_offset(row, rows_per_batch, stride_b, stride_t)
        first, vectors, head = body_of(Row, vocabulary)
        Body = tl.multiple_of(Row + first, 16)
        offsets = tile_offsets(Row, THREADS)
        TILE: tl.constexpr = offsets.numel
        columns, inside = edge_of(Row, vectors, head, vocabulary)
        edge = tl.load(Row + columns, mask=inside)
        tl.store(Row + columns, (edge * scale).to(edge.dtype), mask=inside)
        for k in range(0, tl.cdiv(vectors, THREADS)):
            whole = (k * THREADS + tl.arange(0, THREADS) < vectors)[:, None]
            x = tl.load(Body + k * TILE + offsets, mask=whole)
            tl.store(Body + k * TILE + offsets, (x * scale).to(x.dtype), mask=whole)


def has_formula(surrogate: str) -> bool:
    """Whether the surrogate has a jitted twin."""
    return SURROGATES[surrogate].triton is not None


def policy_loss_forward_backward(
    logits, dlogits, target, advantage, old_logp, ref_logp, ratio, weight, options, temperature
):
    """Loss and gradient in one launch: (loss, logp, entropy, kl | None, clipped), each per token.

    The losses and the gradient written into dlogits (which may be the logits) carry `weight`.
    """
    logits = with_unit_stride(logits)
    dtype = statistics_dtype(logits)
    loss, logp, entropy, kl = empty_statistics(target, dtype, 4)
    clipped = torch.empty(target.shape, dtype=torch.bool, device=target.device)
    if target.numel():
        launch = row_launch(logits.shape[-1], logits.element_size(), WRITE_THREADS)
        policy_loss_kernel[(target.numel(),)](
            logits, dlogits, target.contiguous(), advantage, old_logp, ref_logp, ratio, weight,
            loss, logp, entropy, None if ref_logp is None else kl, clipped,
            logits.shape[-1], *row_strides(logits), *row_strides(dlogits)[1:],
            *(number(x, dtype) for x in (1.0 / temperature, options.beta, options.entropy_coef)),
            numbers(options.parameters or (0.0,), dtype),
            SURROGATE=SURROGATES[options.surrogate].triton, KL_ESTIMATOR=options.kl_estimator,
            WITH_BONUS=options.entropy_coef != 0, SAME_PHASE=phase(logits) == phase(dlogits),
            **launch.options(),
        )  # fmt: skip
    return loss, logp, entropy, None if ref_logp is None else kl, clipped


def scale_rows(rows, scale):
    """rows (N, V) or (B, T, V) *= scale, a scalar, in place and without a host sync."""
    if rows.stride(-1) != 1:
        scale_(rows, scale)
        return
    *leading, vocabulary = rows.shape
    if rows.numel():
        launch = row_launch(vocabulary, rows.element_size(), WRITE_THREADS)
        scale_rows_kernel[(torch.Size(leading).numel(),)](
            rows, scale, vocabulary, *row_strides(rows), **launch.options()
        )
