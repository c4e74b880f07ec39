"""The losses as their definitions read, over the whole (..., V) array, differentiated by autograd.

In float64 this is the truth that kernels are held against; in float32 it is `eager`, what a user
would have written. Nothing here comes from kernels/.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers.surrogates import FORMULAS, PRODUCTS, gmpo_clip


def k3(d: Tensor) -> Tensor:
    """e^d - 1 - d, and the tangent at 10 from there on."""
    near = d.clamp(max=10)
    tangent = math.exp(10) - 11 + (math.exp(10) - 1) * (d - 10)
    return torch.where(d > 10, tangent, torch.exp(near) - 1 - near)


KL = {
    "k1": lambda logp, ref_logp: logp - ref_logp,
    "k2": lambda logp, ref_logp: (logp - ref_logp).square() / 2,
    "k3": lambda logp, ref_logp: k3(ref_logp - logp),
}


def token_logprob(logits: Tensor, target: Tensor, *, temperature=1.0, mask=None):
    """logp, entropy, lse, each (...), of logits (..., V), computed in the logits' dtype."""
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
    logits = torch.where(mask.unsqueeze(-1), logits, torch.zeros_like(logits)) / temperature
    target = torch.where(mask, target, torch.zeros_like(target))
    log_p = torch.log_softmax(logits, dim=-1)
    logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    finite = torch.where(log_p.isinf(), torch.zeros_like(log_p), log_p)
    p = torch.where(log_p.isinf(), torch.zeros_like(log_p), finite.exp())
    entropy = -(p * finite).sum(-1)
    lse = torch.logsumexp(logits, dim=-1)
    return tuple(torch.where(mask, x, torch.zeros_like(x)) for x in (logp, entropy, lse))


def reinforce(ratio: Tensor, logp: Tensor, advantage: Tensor, **_) -> tuple[Tensor, Tensor]:
    """-advantage * logp, which clips nothing."""
    return -advantage * logp, torch.zeros_like(logp, dtype=torch.bool)


def ppo_clip(
    ratio: Tensor, logp: Tensor, advantage: Tensor, *, epsilon=0.2, epsilon_high=None, delta=None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate; `delta` bounds the loss where the advantage is negative."""
    high = epsilon if epsilon_high is None else epsilon_high
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
    clipped = torch.where(advantage > 0, ratio > 1 + high, (advantage < 0) & (ratio < 1 - epsilon))
    if delta is not None:
        bounded = torch.maximum(objective, delta * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
        clipped = clipped | ((advantage < 0) & (ratio > delta))
    return -objective, clipped


SURROGATES = {"reinforce": reinforce, "ppo_clip": ppo_clip, **FORMULAS}


def sequence_ids(shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the number of its sequence: its row of (B, T), or its segment of (N,)."""
    if len(shape) == 2:
        return torch.arange(shape[0]).unsqueeze(1).expand(shape)
    lengths = torch.diff(cu_seqlens.cpu().long())
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the mean of x over the counted tokens of its sequence."""
    ids = sequence_ids(x.shape, cu_seqlens).to(x.device)
    means = torch.zeros_like(x)
    for i in ids[mask].unique():
        means = torch.where(ids == i, x[mask & (ids == i)].mean(), means)
    return means


def sequence_sum(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the sum of x over the counted tokens of its sequence."""
    ids = sequence_ids(x.shape, cu_seqlens).to(x.device)
    sums = torch.zeros_like(x)
    for i in ids[mask].unique():
        sums = torch.where(ids == i, x[mask & (ids == i)].sum(), sums)
    return sums


def aggregate(
    loss: Tensor, mask: Tensor, mode: str, num_items=None, norm_length=None, cu_seqlens=None
) -> Tensor:
    """One scalar from the per-token loss, sequence by sequence as the modes are defined."""
    if mode == "token-mean":
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        return loss[mask].sum() / count
    ids = sequence_ids(loss.shape, cu_seqlens).to(loss.device)
    sums = [(loss[mask & (ids == i)], (ids == i).sum()) for i in ids.unique()]
    sums = [(tokens, length) for tokens, length in sums if tokens.numel()]
    count = max(len(sums), 1) if num_items is None else num_items
    per_sequence = {
        "seq-mean-token-mean": lambda tokens: tokens.mean(),
        "seq-mean-token-sum": lambda tokens: tokens.sum(),
        "seq-mean-token-sum-norm": lambda tokens: (
            tokens.sum() / (loss.shape[-1] if norm_length is None else norm_length)
        ),
    }[mode]
    return sum((per_sequence(tokens) for tokens, _ in sums), loss[mask].sum() * 0) / count


def policy_loss(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    old_logp=None,
    ref_logp=None,
    mask=None,
    surrogate="ppo_clip",
    beta=0.0,
    kl_estimator="k3",
    entropy_coef=0.0,
    temperature=1.0,
    importance_sampling_level="token",
    importance_sampling_ratio=None,
    loss_agg_mode="token-mean",
    num_items=None,
    norm_length=None,
    cu_seqlens=None,
    **clip,
):
    """loss, logp, entropy, kl, clipped: the first with a gradient, the rest as they come."""
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
    logp, entropy, _ = token_logprob(logits, target, temperature=temperature, mask=mask)

    def counted(x: Tensor) -> Tensor:
        x = x.unsqueeze(-1) if x.dim() < mask.dim() else x
        x = x.expand_as(mask).to(logp.dtype)
        return torch.where(mask, x, torch.zeros_like(x))

    advantage = counted(advantage)
    old_logp = logp.detach() if old_logp is None else counted(old_logp)
    log_ratio, held = logp - old_logp, torch.zeros_like(mask)
    if surrogate == "gmpo":
        log_ratio, held = gmpo_clip(log_ratio, advantage, **clip)
    if importance_sampling_level == "sequence":
        of_sequence = sequence_sum if surrogate in PRODUCTS else sequence_mean
        log_ratio = of_sequence(log_ratio, mask, cu_seqlens)
    loss, clipped = SURROGATES[surrogate](torch.exp(log_ratio), logp, advantage, **clip)
    if importance_sampling_ratio is not None:
        loss = loss * counted(importance_sampling_ratio)
    kl = None
    if ref_logp is not None:
        d = counted(ref_logp) - logp
        if kl_estimator == "k3_ratio":
            kl = (torch.exp(d) - 1 - d) * torch.exp(log_ratio)
        else:
            kl = KL[kl_estimator](logp, counted(ref_logp))
        loss = loss + beta * kl
    loss = loss - entropy_coef * entropy
    scalar = aggregate(loss, mask, loss_agg_mode, num_items, norm_length, cu_seqlens)
    return scalar, logp, entropy, kl, (clipped | held) & mask
