"""The generalised Jensen-Shannon divergence of whole rows in plain PyTorch, by blocks of rows.

With m = beta q + (1 - beta) p and d = log p - log q:
    JSD = (1 - beta) KL(p || m) + beta KL(q || m)
    da = (1 - beta) p (log p - log m - KL(p || m)) / T
    db = beta q (log q - log m - KL(q || m)) / T
    log p - log m = min(d, 0) - s,  log q - log m = -max(d, 0) - s,
    s = log(1 + w (e^-|d| - 1)),  w = beta where d >= 0, else 1 - beta
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Matrix, select_rows, without_autocast
from .distributions import Pair


@without_autocast
def jsd_forward(p_logits, q_logits, mask, temperature, beta, dtype) -> Tensor:
    """The divergence, zeros where the mask is false."""
    result = torch.zeros(p_logits.shape[:-1], dtype=dtype, device=p_logits.device)
    p_matrix, q_matrix, pair = Matrix(p_logits), Matrix(q_logits), Pair(p_logits, dtype)
    for rows in select_rows(mask, result.numel(), pair.size):
        p, q, difference = pair.read(p_matrix.read(rows), q_matrix.read(rows), temperature)
        p_over, q_over = _over_mixture(p, q, difference, beta)
        p_kl, q_kl = torch.linalg.vecdot(p, p_over), torch.linalg.vecdot(q, q_over)
        result.view(-1)[rows] = p_kl.mul_(1 - beta).add_(q_kl, alpha=beta).clamp_(min=0)
    return result


@without_autocast
def jsd_backward(p_logits, q_logits, dp, dq, mask, djsd, temperature, beta) -> None:
    """Writes the gradients into dp and dq, of which either may be None."""
    djsd = djsd.reshape(-1)
    flows = djsd != 0 if mask is None else (djsd != 0) & mask.reshape(-1)
    sinks = [None if d is None else Matrix(d) for d in (dp, dq)]
    for sink in sinks:
        if sink is not None:
            sink.zero(~flows)
    p_matrix, q_matrix, pair = Matrix(p_logits), Matrix(q_logits), Pair(p_logits, djsd.dtype)
    for rows in select_rows(flows, djsd.numel(), pair.size):
        p, q, difference = pair.read(p_matrix.read(rows), q_matrix.read(rows), temperature)
        overs = _over_mixture(p, q, difference, beta)
        scale = (djsd[rows] / temperature)[:, None]
        for sink, x, over, share in zip(sinks, (p, q), overs, (1 - beta, beta), strict=True):
            if sink is not None:
                over.sub_(torch.linalg.vecdot(x, over)[:, None])
                sink.write(rows, over.mul_(x).mul_(share * scale))


def _over_mixture(p: Tensor, q: Tensor, d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log p - log m and log q - log m of every column, 0 where the first is banned."""
    weight = torch.full_like(d, 1 - beta).masked_fill_(d >= 0, beta)
    s = d.abs().neg_().expm1_().mul_(weight).log1p_()
    p_over, q_over = d.clamp(max=0).sub_(s), d.clamp(min=0).neg_().sub_(s)
    # d is NaN where both ban, and infinite where one does
    return p_over.masked_fill_(p == 0, 0), q_over.masked_fill_(q == 0, 0)
