"""Masks of tokens and sequences that a loss is better off without, in plain PyTorch.

rejection_mask        ratios or divergences from the policy that sampled, within bounds
off_policy_mask       sequences of negative advantage that the policy has moved away from
second_moment_mask    the tokens of largest (log r)^2 left out until its mean is within a bound
high_entropy_mask     the share of the tokens where the policy is least certain

Each gives bool tensors, true = keep: `mask & ...` leaves tokens out of loss and denominator, and
`importance_sampling_ratio=keep.float()` out of the surrogate alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlcore.errors import UserError, unknown_name
from rlcore.functional.corrections import LEVELS, checked_mask, spread
from rlcore.kernels.checks import check_finite, check_positive, checks_types
from rlcore.kernels.formulas.sequence_ratio import sequence_mean, sequence_sum
from rlcore.kernels.formulas.sequences import sequence_ids
from rlcore.kernels.limits import log_ratio

# of x = log(pi / pi_old): what is compared with the bounds, which for k1 are bounds of the ratio
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: 0.5 * x.square(),
    "k3": lambda x: torch.expm1(x) - x,
}


def _sequence_max(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    # scores are not negative, and 0 where masked
    if x.dim() == 2:
        return x.amax(1, keepdim=True).expand(x.shape) if x.shape[1] else x
    offsets = cu_seqlens.to(x.device, torch.long)
    most = torch.segment_reduce(x, "max", offsets=offsets, unsafe=True)
    return most[sequence_ids(offsets, x.shape[0])]


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": lambda x, mask, cu_seqlens: sequence_sum(x, cu_seqlens),
    "mean": sequence_mean,
    "max": _sequence_max,
}


@checks_types
@torch.no_grad()
def rejection_mask(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str,
    lower: float | None = None,
    upper: float | None = None,
    level: str = "token",
    reduction: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The tokens whose policies are near enough, by one of several measures of r = pi / pi_old.

    "k1" keeps lower <= r <= upper, "k2" and "k3" (log r)^2 / 2 and r - 1 - log r at most upper (k3
    is positive, and on average over pi_old's samples KL(pi_old || pi)). At "sequence" level the
    measure of a sequence keeps or drops all of its tokens. "geometric" is "k1" of the geometric
    mean of a sequence's ratios, whose bounds need not grow with the length (arXiv:2507.18071).

    Args:
        logp, old_logp: (N,) or (B, T): of the trainer and of the sampler, say. NaN in old_logp =
            not recorded, and taken for logp.
        mask: bool, true = the token counts. None = every token counts.
        kind: "k1", "k2", "k3" or "geometric".
        lower, upper: bounds, both included; None = none. `lower` is for "k1" and "geometric".
        level: "token" or "sequence"; "geometric" is of sequences.
        reduction: of a sequence's tokens: "sum" (of log r: the product of the ratios), "mean" or
            "max"; None = the sum for "k1", the mean for "k2" and "k3".
        cu_seqlens: (B + 1,), boundaries of the sequences in packed (N,) tokens.

    Returns:
        bool, the shape of logp: true where the token counts and is kept.

    Raises:
        ValueError: shapes differ, an unknown name, no bound or bounds out of order, an option that
            has no use.
    """
    level, kind, reduction = _measure(kind, level, reduction, lower, upper)
    _check_packed(logp, level == "sequence", cu_seqlens)
    mask = checked_mask("logp", logp, mask, old_logp=old_logp)
    x = _log_ratio(logp, old_logp, mask)
    score = DIVERGENCES[kind](x)
    if level == "sequence":
        score = REDUCTIONS[reduction](torch.where(mask, score, 0.0), mask, cu_seqlens)
    if kind == "k1":
        score = score.exp()
    keep = mask.clone()
    if lower is not None:
        keep &= score >= lower
    if upper is not None:
        keep &= score <= upper
    return keep


def _measure(kind, level, reduction, lower, upper):
    """(level, kind, reduction), with what follows from the others filled in."""
    known = (*DIVERGENCES, "geometric")
    if kind not in known:
        raise unknown_name("kind", kind, known)
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    if reduction is not None and reduction not in REDUCTIONS:
        raise unknown_name("reduction", reduction, REDUCTIONS)
    if lower is None and upper is None:
        raise UserError("a bound is needed: give upper, or lower with kind 'k1' or 'geometric'")
    check_positive(lower=lower, upper=upper)
    if lower is not None and kind not in ("k1", "geometric"):
        raise UserError(f"kind {kind!r} is a distance, of which lower bounds nothing: leave it out")
    if lower is not None and upper is not None and lower > upper:
        raise UserError(f"lower must not be above upper, got {lower} and {upper}")
    if kind == "geometric":
        if reduction is not None:
            raise UserError("kind 'geometric' is a mean already: leave reduction out")
        return "sequence", "k1", "mean"
    if level == "token" and reduction is not None:
        raise UserError("reduction is of a sequence's tokens: set level to 'sequence' with it")
    if (kind, reduction) == ("k1", "max"):
        raise UserError("reduction 'max' of kind 'k1' would see one side alone: take kind 'k2'")
    return level, kind, reduction or ("sum" if kind == "k1" else "mean")


@checks_types
@torch.no_grad()
def off_policy_mask(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Off-policy sequence masking (OPSM: DeepSeek-V3.2, arXiv:2512.02556, eq. 9).

    Drops the sequences of negative advantage whose mean of log(pi_old / pi) is above the threshold:
    mistakes that the policy no longer makes teach it little, and their gradients are large.

    Args:
        logp, old_logp: (N,) or (B, T), of the present policy and of the one that sampled. NaN in
            old_logp = not recorded, and taken for logp.
        advantage: (N,), (B, T), or (B,) spread over T.
        mask: bool, true = the token counts. None = every token counts.
        threshold: in nats a token; positive.
        cu_seqlens: (B + 1,), boundaries of the sequences in packed (N,) tokens.

    Returns:
        bool, the shape of logp: true where the token counts and is kept.

    Raises:
        ValueError: shapes differ, a threshold that is not positive, cu_seqlens missing.
    """
    check_positive(threshold=threshold)
    _check_packed(logp, True, cu_seqlens)
    advantage = spread(advantage, logp)
    mask = checked_mask("logp", logp, mask, old_logp=old_logp, advantage=advantage)
    distance = -sequence_mean(_log_ratio(logp, old_logp, mask), mask, cu_seqlens)
    return mask & ((advantage >= 0) | (distance <= threshold))


@checks_types
@torch.no_grad()
def second_moment_mask(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float = 0.04,
) -> Tensor:
    """M2PO (arXiv:2510.01161, algorithm 1): as many tokens as bound the mean of (log r)^2.

    Of the tokens whose update would part the policies further (A > 0 and r > 1, or A < 0 and r < 1)
    those of largest (log r)^2 are dropped, until the mean over the rest is at most the threshold.

    Args:
        logp, old_logp: (N,) or (B, T) over the whole optimization batch, before it is cut into
            micro-batches. NaN in old_logp = not recorded, and taken for logp.
        advantage: likewise, or (B,) spread over T.
        mask: bool, true = the token counts. None = every token counts.
        threshold: positive; the paper's is 0.04.

    Returns:
        bool, the shape of logp: true where the token counts and is kept.

    Raises:
        ValueError: shapes differ, or a threshold that is not positive.
    """
    check_positive(threshold=threshold)
    advantage = spread(advantage, logp)
    mask = checked_mask("logp", logp, mask, old_logp=old_logp, advantage=advantage)
    x = _log_ratio(logp, old_logp, mask)
    parts = mask & (advantage * x > 0)
    square = torch.where(parts, x.double().square(), torch.inf).flatten()
    order = square.argsort(stable=True)
    rank = torch.arange(1, len(order) + 1, device=x.device)
    # the means of the smallest 1, 2, ... rise, so those within the bound come first
    within = square[order].cumsum(0) / rank <= threshold
    keep = torch.zeros_like(within).scatter(0, order, within).view(x.shape)
    return mask & (keep | ~parts)


@checks_types
@torch.no_grad()
def high_entropy_mask(
    entropy: Tensor, mask: Tensor | None = None, *, top_entropy_quantile: float
) -> Tensor:
    """The share of the tokens where the policy's entropy is highest (arXiv:2506.01939, eq. 5).

    Args:
        entropy: (N,) or (B, T) over the whole optimization batch.
        mask: bool, true = the token counts. None = every token counts.
        top_entropy_quantile: the share, in [0, 1]: tokens of at least that quantile (interpolated)
            from above are kept. 0 keeps the highest alone, 1 all; the paper's is 0.2.

    Returns:
        bool, the shape of entropy: true where the token counts and is kept.

    Raises:
        ValueError: shapes differ, or a share outside [0, 1].
    """
    check_finite(top_entropy_quantile=top_entropy_quantile)
    if not 0 <= top_entropy_quantile <= 1:
        raise UserError(f"top_entropy_quantile must be in [0, 1], got {top_entropy_quantile}")
    mask = checked_mask("entropy", entropy, mask)
    ordered = entropy[mask].double().sort().values
    if not len(ordered):
        return mask
    # torch.quantile takes 2^24 entries at most
    place = (1 - top_entropy_quantile) * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    least = torch.lerp(ordered[low], ordered[high], place - low)
    return mask & (entropy.double() >= least)


def _log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old), 0 where masked or not recorded."""
    dtype = torch.promote_types(logp.dtype, torch.float32)
    x = log_ratio(logp.to(dtype), old_logp.to(dtype))
    return torch.where(mask & ~old_logp.isnan(), x, 0.0)


def _check_packed(logp: Tensor, needs_sequences: bool, cu_seqlens: Tensor | None) -> None:
    if (needs_sequences and logp.dim() == 1) != (cu_seqlens is not None):
        raise UserError("cu_seqlens goes with sequences in packed (N,) tokens, and only so")
