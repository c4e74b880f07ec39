"""The KL of a few tokens' probabilities to whole rows in plain PyTorch, by blocks of rows.

With q of K tokens and q_r = 1 - sum q of all others, p = softmax(z / T), p_r = 1 - sum p_k:
    KL = sum_k q_k (log q_k - log p_k) + q_r (log q_r - log p_r)
    dz_k = (p_k - q_k) / T,    dz_j = p_j (1 - q_r / p_r) / T elsewhere
Without the tail both are shared out over the K alone, and only dz_k is not 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Matrix, rows_per_block, select_rows, without_autocast


@without_autocast
def topk_forward(logits, ids, logp, mask, temperature, tail, dtype) -> Tensor:
    """The divergence, zeros where the mask is false."""
    result = torch.zeros(logits.shape[:-1], dtype=dtype, device=logits.device)
    matrix, size = Matrix(logits), rows_per_block(logits, 3)
    ids, logp = ids.flatten(0, -2), logp.flatten(0, -2)
    for rows in select_rows(mask, result.numel(), size):
        x, at, q, rest = _read(matrix.read(rows), ids[rows], logp[rows], temperature, dtype)
        own, others = _sums(x, at)
        if tail:
            q_log, p_log = q, x.gather(-1, at) - torch.logaddexp(own, others)
        else:
            q_log, p_log = q - q.logsumexp(-1, keepdim=True), x.gather(-1, at) - own
        given = q > -torch.inf
        terms = q_log.exp() * (q_log - p_log)
        kl = torch.where(given, terms, 0.0).sum(-1)
        if tail:
            over = rest.log() - (others - torch.logaddexp(own, others)).squeeze(-1)
            kl += torch.where(rest > 0, rest * over, 0.0)
        result.view(-1)[rows] = kl.clamp_(min=0)
    return result


@without_autocast
def topk_backward(logits, ids, logp, dlogits, mask, dkl, temperature, tail) -> None:
    """Writes the gradient into dlogits."""
    dkl = dkl.reshape(-1)
    flows = dkl != 0 if mask is None else (dkl != 0) & mask.reshape(-1)
    matrix, sink, size = Matrix(logits), Matrix(dlogits), rows_per_block(logits, 3)
    sink.zero(~flows)
    ids, logp = ids.flatten(0, -2), logp.flatten(0, -2)
    for rows in select_rows(flows, dkl.numel(), size):
        x, at, q, rest = _read(matrix.read(rows), ids[rows], logp[rows], temperature, dkl.dtype)
        own, others = _sums(x, at)
        scale = (dkl[rows] / temperature)[:, None]
        if tail:
            whole = torch.logaddexp(own, others)
            # where no word is left, or none that the student allows, there is no slope
            share = torch.where(others > -torch.inf, rest[:, None] * (whole - others).exp(), 0.0)
            dz = (x - whole).exp_()
            at_ids = dz.gather(-1, at) - q.exp()
            dz.mul_(1 - share)
        else:
            dz = torch.zeros_like(x)
            at_ids = (x.gather(-1, at) - own).exp() - (q - q.logsumexp(-1, keepdim=True)).exp()
        # the places of ids that are not there repeat the first, and have its gradient too
        at_ids = torch.where(q > -torch.inf, at_ids, at_ids[:, :1])
        dz.scatter_(-1, at, at_ids)
        sink.write(rows, dz.mul_(scale))


def _read(block: Tensor, ids: Tensor, logp: Tensor, temperature: float, dtype: torch.dtype):
    """Logits over T less their largest, ids, log-probabilities, and the others' probability.

    Where an id is not given (log-probability -inf) the row's first stands, which must be.
    """
    x = block.to(dtype, copy=True)
    x.sub_(x.amax(-1, keepdim=True)).mul_(1 / temperature)
    q = logp.to(dtype)
    ids = torch.where(q > -torch.inf, ids, ids[:, :1])
    rest = -torch.expm1(q.logsumexp(-1))
    none_left = (q > -torch.inf).sum(-1) == x.shape[-1]
    return x, ids, q, rest.clamp_(min=0).masked_fill_(none_left, 0)


def _sums(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp x over the ids, and over all others, (n, 1) each."""
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, ids, True)
    own = x.masked_fill(~chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return own, x.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True)
