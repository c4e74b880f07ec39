"""The row operations in plain PyTorch, for CPUs and every device that Triton does not serve.

They go through blocks of rows in float32 (float64 for float64 logits): a block is brought to
cache, shifted by its maximum and exponentiated once, so no second (N, V) tensor is ever made.
The gradient is written by hand:
    dz = (at_target 1[target] + p (at_softmax - at_entropy (log p + H))) / T.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import (
    Matrix,
    RowGradients,
    RowStatistics,
    empty_statistics,
    rows_per_block,
    scale_,
    select_rows,
    statistics_dtype,
    without_autocast,
)
from ..formulas.surrogates import policy_terms
from ..limits import held

SUMMED = 1024  # terms of a sum that one thread takes
KEEPS_SOFTMAX = False  # a backward starts from the logits again
FLOOR = -1e30  # stands for -inf where 0 * -inf would make NaN


def gradient_memory(logits: Tensor, inplace: bool) -> Tensor:
    """Where a gradient goes: the logits' own storage where permitted and possible, else new memory.

    Autograd then refuses any later use of logits that it had saved.
    """
    if not inplace or not Matrix(logits).is_view:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def row_width(vocabulary: int) -> int:
    """Columns in memory of a row: here rows follow each other."""
    return vocabulary


def has_formula(surrogate: str) -> bool:
    """Whether a token's derivative has a formula here: every surrogate's has."""
    return True


@without_autocast
def token_logprob_forward(
    logits, target, mask, temperature, with_entropy, with_softmax=KEEPS_SOFTMAX
) -> RowStatistics:
    """Zeros where the mask is false; row_max and log_sum are made with `with_softmax` alone."""
    results = [t.zero_() for t in empty_statistics(target, statistics_dtype(logits), 5)]
    logp, lse, entropy, maxima, log_sums = (result.view(-1) for result in results)
    matrix, target = Matrix(logits), target.reshape(-1)
    blocks = _Blocks(logits, with_entropy)
    for rows in blocks.select(mask, target):
        block = matrix.read(rows)
        if with_entropy:
            x, p, row_max, log_sum = blocks.softmax(block, temperature)
            logp[rows] = _at(x, target[rows]) - log_sum
            lse[rows] = row_max / temperature + log_sum
            entropy[rows] = log_sum - _expectation(p, x)
            maxima[rows], log_sums[rows] = row_max, log_sum
        else:
            logp[rows], maxima[rows], log_sums[rows] = blocks.log_softmax_at(
                block, target[rows], temperature
            )
            lse[rows] = maxima[rows] / temperature + log_sums[rows]
    logp, lse, entropy, *softmax = results
    softmax = softmax if with_softmax else (None, None)
    return RowStatistics(logp, entropy if with_entropy else None, lse, *softmax)


@without_autocast
def token_logprob_backward(
    logits, dlogits, target, mask, statistics: RowStatistics, gradients: RowGradients, temperature
):
    """Writes the gradient into dlogits, which may be the logits themselves.

    Of the statistics it needs the entropy, where that has a derivative.
    """
    dlogp, dentropy, dlse = gradients
    entropy, target = statistics.entropy, target.reshape(-1)
    zero = torch.zeros(target.shape, dtype=statistics_dtype(logits), device=target.device)
    at_target = zero if dlogp is None else dlogp.reshape(-1)
    at_softmax = (zero if dlse is None else dlse.reshape(-1)) - at_target
    flows = (at_target != 0) | (at_softmax != 0)
    if dentropy is not None:
        at_entropy, entropy = dentropy.reshape(-1), entropy.reshape(-1)
        flows |= at_entropy != 0
    if mask is not None:
        flows &= mask.reshape(-1)
    source, sink = Matrix(logits), Matrix(dlogits)
    sink.zero(~flows)
    blocks = _Blocks(logits, dentropy is not None)
    for rows in blocks.select(flows, target):
        block = source.read(rows)
        if dentropy is None:
            p = blocks.probabilities(block, temperature)
            entropy_part = None
        else:
            x, p, _, log_sum = blocks.softmax(block, temperature)
            entropy_part = (x, at_entropy[rows], entropy[rows] - log_sum)
        dz = _gradient(
            p, target[rows], at_target[rows], at_softmax[rows], entropy_part, temperature
        )
        sink.write(rows, dz)


@without_autocast
def token_logprob_backward_slice(
    logits, dlogits, row_max, log_sum, entropy, at_softmax, at_entropy, temperature
):
    """p (at_softmax - at_entropy (log p + H)) / T of some columns, from the whole rows' statistics.

    Writes it into dlogits, which may be the logits themselves; at_entropy may be None.
    """
    replaces = dlogits.data_ptr() == logits.data_ptr() and dlogits.dtype == logits.dtype
    size = rows_per_block(logits, 1 if at_entropy is None else 2)
    memory = None if replaces else row_max.new_empty((size, logits.shape[1]))
    for rows in select_rows(None, len(logits), size):
        block = logits[rows]
        log_p = block if replaces else memory[: len(block)]
        torch.sub(block, row_max[rows, None], out=log_p)
        log_p.mul_(1 / temperature).sub_(log_sum[rows, None])
        factor = at_softmax[rows, None] / temperature
        if at_entropy is None:
            dz = log_p.exp_().mul_(factor)
        else:
            slope = at_entropy[rows, None] / temperature
            dz = log_p.exp()
            log_p.clamp_(min=FLOOR).add_(entropy[rows, None]).mul_(-slope).add_(factor)
            dz.mul_(log_p)
        dlogits[rows] = dz


@without_autocast
def policy_loss_forward_backward(
    logits, dlogits, target, advantage, old_logp, ref_logp, ratio, weight, options, temperature
):
    """Loss and gradient in one pass: (loss, logp, entropy, kl | None, clipped), each per token.

    The losses and the gradient written into dlogits (which may be the logits) carry `weight`.
    """
    results = [t.zero_() for t in empty_statistics(target, statistics_dtype(logits), 4)]
    loss, logp, entropy, kl = (result.view(-1) for result in results)
    clipped = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
    target, weight, advantage = target.reshape(-1), weight.view(-1), advantage.view(-1)
    given = [None if t is None else t.view(-1) for t in (old_logp, ref_logp, ratio)]
    source, sink = Matrix(logits), Matrix(dlogits)
    sink.zero(weight == 0)
    # a gradient that replaces its logits may be made on the spot
    replaces = dlogits.data_ptr() == logits.data_ptr() and dlogits.dtype == loss.dtype
    blocks = _Blocks(logits, True, on_the_spot=replaces)
    for rows in blocks.select(weight != 0, target):
        x, p, _, log_sum = blocks.softmax(source.read(rows), temperature)
        logp[rows] = _at(x, target[rows]) - log_sum
        entropy[rows] = log_sum - _expectation(p, x)
        terms = policy_terms(
            logp[rows], entropy[rows], advantage[rows],
            *(None if t is None else t[rows] for t in given), options,
        )  # fmt: skip
        share = weight[rows]
        loss[rows] = terms.loss * share
        clipped.view(-1)[rows] = terms.clipped
        if terms.kl is not None:
            kl[rows] = terms.kl
        dlogp = terms.dlogp * share
        entropy_part = None
        if options.entropy_coef:
            entropy_part = (x, -options.entropy_coef * share, entropy[rows] - log_sum)
        sink.write(rows, _gradient(p, target[rows], dlogp, -dlogp, entropy_part, temperature))
    loss, logp, entropy, kl = results
    return loss, logp, entropy, None if ref_logp is None else kl, clipped


def scale_rows(rows: Tensor, scale: Tensor) -> None:
    """rows *= scale, a scalar, in place and without a host sync on other devices than a CPU."""
    if scale.device.type != "cpu" or scale != 1:
        scale_(rows, scale)


class _Blocks:
    """Working memory for a block of rows, and the blocks that make up a batch.

    Working on the spot, `softmax` uses the block's own memory for its x.
    """

    def __init__(self, logits: Tensor, with_entropy: bool, on_the_spot: bool = False):
        vocabulary, dtype = logits.shape[-1], statistics_dtype(logits)
        # p and a passing product share the cache with a block that is worked on in place
        self.size = rows_per_block(logits, 2 if on_the_spot else 1)
        shape = (self.size, vocabulary)
        like = {"dtype": dtype, "device": logits.device}
        self.x = None if on_the_spot else torch.empty(shape, **like)
        self.p = torch.empty(shape, **like) if with_entropy else None

    def select(self, keep: Tensor | None, target: Tensor) -> Iterator[slice | Tensor]:
        """Row selectors, a block's each: slices where rows are neighbours, else indices."""
        return select_rows(keep, target.numel(), self.size)

    def probabilities(self, block: Tensor, temperature: float) -> Tensor:
        """p = softmax z, (n, V)."""
        x, _ = self._shifted(block, temperature)
        total = _row_sum(x.exp_())
        return x.mul_(total.reciprocal_()[:, None])

    def log_softmax_at(
        self, block: Tensor, target: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp of the target, the logits' max, log sum exp x), each (n,)."""
        x, row_max = self._shifted(block, temperature)
        chosen = _at(x, target)
        log_sum = _row_sum(x.exp_()).log_()
        return chosen - log_sum, row_max, log_sum

    def _shifted(self, block: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """x = z - max z in working memory and precision, (n, V), and the logits' max, (n,)."""
        x = block if self.x is None else self.x[: block.shape[0]].copy_(block)
        row_max = x.amax(-1, keepdim=True)
        x.sub_(row_max)
        if temperature != 1:
            x.mul_(1 / temperature)
        return x, row_max.squeeze(-1)

    def softmax(self, block: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x = z - max z and p = softmax z, (n, V); the logits' max and log sum exp x, (n,)."""
        x, row_max = self._shifted(block, temperature)
        p = torch.exp(x, out=self.p[: block.shape[0]])
        total = _row_sum(p)
        return x, p.mul_(total.reciprocal()[:, None]), row_max, total.log_()


def _at(x: Tensor, target: Tensor) -> Tensor:
    """x at each row's target, NaN where the target is no column."""
    target = target.long()
    inside = (target >= 0) & (target < x.shape[-1])
    chosen = x.gather(-1, torch.where(inside, target, 0)[:, None]).squeeze(-1)
    return torch.where(inside, chosen, torch.nan)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum_j p_j x_j, with 0 * -inf = 0. May floor x in place."""
    total = _row_dot(p, x)
    if total.isnan().any():
        total = _row_dot(p, x.clamp_(min=FLOOR))
    return total


def _row_sum(e: Tensor) -> Tensor:
    """sum_j e_j, in pieces: in float32 one running sum of a long row loses its last digits.

    PyTorch's own softmax keeps one, a few lanes wide where a CPU has no AVX-512.
    """
    whole = e.shape[-1] // SUMMED * SUMMED
    head = e[:, :whole].unflatten(-1, (-1, SUMMED)).sum(-1).sum(-1)
    return head + e[:, whole:].sum(-1)


def _row_dot(p: Tensor, x: Tensor) -> Tensor:
    """sum_j p_j x_j in an order that does not depend on the number of rows or threads.

    A long sum of few rows would be split over the threads, and short sums are not.
    """
    whole = p.shape[-1] // SUMMED * SUMMED
    head = (t[:, :whole].unflatten(-1, (-1, SUMMED)) for t in (p, x))
    return torch.linalg.vecdot(*head).sum(-1) + torch.linalg.vecdot(p[:, whole:], x[:, whole:])


def _gradient(p, target, at_target, at_softmax, entropy_part, temperature):
    """The block's gradient, in the memory of p.

    entropy_part is None or (x, at_entropy, H - log sum exp x); x is used up.
    """
    target = target.long()
    inside = (target >= 0) & (target < p.shape[-1])
    # held, so that the probability 0 of another token times it is 0
    at_target, at_softmax = held(at_target / temperature), held(at_softmax / temperature)
    at_softmax = torch.where(inside, at_softmax, torch.nan)
    if entropy_part is None:
        p.mul_(at_softmax[:, None])
    else:
        x, at_entropy, offset = entropy_part
        at_entropy = at_entropy / temperature
        x.clamp_(min=FLOOR).mul_(-at_entropy[:, None])
        p.mul_(x.add_((at_softmax - at_entropy * offset)[:, None]))
    column = torch.where(inside, target, 0)[:, None]
    return p.scatter_add_(-1, column, at_target[:, None])
