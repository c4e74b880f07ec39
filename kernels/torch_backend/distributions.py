"""Full-vocabulary KL and the softmax Fisher product in plain PyTorch, a block of rows at a time.

With log p = log softmax(a / T) and log q = log softmax(b / T):
    KL = sum p (log p - log q),  da = p (log p - log q - KL) / T,  db = (q - p) / T,
    F v = p (v - sum p v) / T^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Matrix, rows_per_block, select_rows, statistics_dtype, without_autocast


@without_autocast
def categorical_kl_forward(p_logits, q_logits, mask, temperature) -> list[Tensor | None]:
    """[KL(p || q), zeros where the mask is false, and four statistics that are not kept]."""
    dtype = statistics_dtype(p_logits, q_logits)
    kl = torch.zeros(p_logits.shape[:-1], dtype=dtype, device=p_logits.device)
    p_matrix, q_matrix, pair = Matrix(p_logits), Matrix(q_logits), Pair(p_logits, dtype)
    for rows in select_rows(mask, kl.numel(), pair.size):
        p, _, difference = pair.read(p_matrix.read(rows), q_matrix.read(rows), temperature)
        kl.view(-1)[rows] = _expected_difference(p, difference)
    return [kl, None, None, None, None]


@without_autocast
def categorical_kl_backward(
    p_logits, q_logits, dp, dq, mask, kl, row_statistics, dkl, temperature
) -> None:
    """Writes the gradients into dp and dq, of which either may be None."""
    kl, dkl = kl.reshape(-1), dkl.reshape(-1)
    flows = dkl != 0 if mask is None else (dkl != 0) & mask.reshape(-1)
    p_matrix, q_matrix = Matrix(p_logits), Matrix(q_logits)
    p_sink, q_sink = (None if d is None else Matrix(d) for d in (dp, dq))
    for sink in (p_sink, q_sink):
        if sink is not None:
            sink.zero(~flows)
    # an infinite KL has no slope in p
    at_p = torch.where(kl == torch.inf, 0.0, dkl / temperature)[:, None]
    kl = torch.where(kl == torch.inf, 0.0, kl)[:, None]
    at_q = (dkl / temperature)[:, None]
    pair = Pair(p_logits, kl.dtype)
    for rows in select_rows(flows, kl.numel(), pair.size):
        p, q, difference = pair.read(p_matrix.read(rows), q_matrix.read(rows), temperature)
        if q_sink is not None:
            q_sink.write(rows, q.sub_(p).mul_(at_q[rows]))
        if p_sink is not None:
            # infinite differences and inf - inf belong to columns that p bans, or to at_p = 0
            difference.nan_to_num_(0.0, 0.0, 0.0)
            p_sink.write(rows, difference.sub_(kl[rows]).mul_(p).mul_(at_p[rows]))


@without_autocast
def fisher_vector_product(logits, tangent, product, temperature, dtype) -> None:
    """Writes F tangent into product."""
    source, direction, sink = Matrix(logits), Matrix(tangent), Matrix(product)
    size = rows_per_block(logits, 2)
    p_memory, v_memory = torch.empty((2, size, logits.shape[-1]), dtype=dtype, device=logits.device)
    for rows in select_rows(None, logits.shape[:-1].numel(), size):
        block = source.read(rows)
        p, v = p_memory[: len(block)].copy_(block), v_memory[: len(block)]
        _softmax(p, p, temperature)
        v.copy_(direction.read(rows)).masked_fill_(block == -torch.inf, 0)
        v.sub_(torch.linalg.vecdot(p, v)[:, None]).mul_(p).mul_(1 / temperature**2)
        sink.write(rows, v)


class Pair:
    """Working memory for a block of rows of two distributions."""

    def __init__(self, logits: Tensor, dtype: torch.dtype):
        self.size = rows_per_block(logits, 4)
        shape = (4, self.size, logits.shape[-1])
        self.memory = torch.empty(shape, dtype=dtype, device=logits.device)

    def read(
        self, p_block: Tensor, q_block: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p, q and log p - log q, each (n, V)."""
        a, p, b, q = self.memory[:, : len(p_block)].unbind()
        p_total = _softmax(a.copy_(p_block), p, temperature)
        q_total = _softmax(b.copy_(q_block), q, temperature)
        return p, q, a.sub_(b).add_(torch.log(q_total / p_total))


def _softmax(x: Tensor, p: Tensor, temperature: float) -> Tensor:
    """Makes x (x - max x) / T and p its softmax; returns sum exp x, (n, 1). p may be x."""
    x.sub_(x.amax(-1, keepdim=True))
    if temperature != 1:
        x.mul_(1 / temperature)
    torch.softmax(x, -1, out=p)
    # torch adds the exponentials up in order; what their sum lacks shows in a sum made pairwise
    total, largest = p.sum(-1, keepdim=True), p.amax(-1, keepdim=True)
    p.div_(total)
    return total / largest


def _expected_difference(p: Tensor, difference: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j), with 0 * log 0 = 0; inf where q bans what p does not."""
    total = torch.linalg.vecdot(p, difference)
    if not total.isfinite().all():
        # nan = banned by both, -inf = banned by p alone, inf = banned by q alone
        undefined = p.isnan().any(-1) | difference.isnan().all(-1)
        infinite = (difference == torch.inf).any(-1)
        total = torch.linalg.vecdot(p, difference.nan_to_num_(0.0, 0.0, 0.0))
        total = torch.where(infinite, torch.inf, total)
        total[undefined] = torch.nan
    return total.clamp_(min=0)
