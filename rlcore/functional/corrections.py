"""Per-token weights and masks that are computed before a policy loss and handed to it.

importance_weights   w = pi_old / pi_sampling, truncated (TIS) or masked (MIS)
future_kl_weight     more for tokens that come before what the policy has come to favour (FIPO)
clip_cov_weight      0 for a few of the tokens whose logp and advantage vary together, 1 elsewhere
kl_cov_mask          the tokens where they do so most
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.errors import unknown_name
from rlcore.kernels.checks import check_positive, checks_types
from rlcore.kernels.formulas.sequence_ratio import sequence_sum
from rlcore.kernels.limits import log_ratio
from rlcore.kernels.scans.scan import discounted_return

LEVELS = ("token", "sequence")


def _truncate(weight: Tensor, low: float, high: float) -> Tensor:
    return weight.clamp(low, high)


def _mask(weight: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weight < low) | (weight > high), 0.0, weight)


MODES = {"truncate": _truncate, "mask": _mask}


@checks_types
@torch.no_grad()
def importance_weights(
    old_logp: Tensor,
    sampling_logp: Tensor,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    mode: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """pi_old / pi_sampling, bounded: the `importance_sampling_ratio` of a policy loss.

    Corrects for a sampler (an inference server, say) whose probabilities are not quite those of
    the policy that it serves. "truncate" is truncated importance sampling (IMPALA,
    arXiv:1802.01561, eq. 1: min(w, high)); "mask" drops what is out of bounds, and keeps the rest
    unbiased. At "sequence" level the weight is the product over a sequence's counted tokens.

    Args:
        old_logp: (N,) or (B, T), the training engine's log-probabilities of the sampled tokens.
        sampling_logp: likewise the sampler's; NaN = not recorded, and taken for old_logp. Where
            both are -inf the weight is 1.
        mask: bool, true = the token counts; elsewhere the weight is 0. None = every token counts.
        level: "token" or "sequence".
        mode: "truncate" or "mask".
        low, high: the bounds, 0 <= low <= high.
        cu_seqlens: (B + 1,), boundaries of the sequences in packed (N,) tokens, for "sequence".

    Returns:
        The shape of old_logp, float32 (float64 for float64), without gradient.

    Raises:
        ValueError: shapes differ, an unknown level or mode, bounds out of order, cu_seqlens
            missing or of no use.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    if not 0 <= low <= high:
        raise ValueError(f"low and high must satisfy 0 <= low <= high, got {low} and {high}")
    packed_sequences = level == "sequence" and old_logp.dim() == 1
    if packed_sequences != (cu_seqlens is not None):
        raise ValueError("cu_seqlens goes with level 'sequence' on packed (N,) tokens, and only so")
    mask = checked_mask("old_logp", old_logp, mask, sampling_logp=sampling_logp)
    dtype = torch.promote_types(old_logp.dtype, torch.float32)
    log_weight = log_ratio(old_logp.to(dtype), sampling_logp.to(dtype))
    log_weight = torch.where(mask & ~sampling_logp.isnan(), log_weight, 0.0)
    if level == "sequence":
        log_weight = sequence_sum(log_weight, cu_seqlens)
    return torch.where(mask, MODES[mode](log_weight.exp(), low, high), 0.0)


@checks_types
@torch.no_grad()
def future_kl_weight(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    half_life: float = 32.0,
    low: float = 1.0,
    high: float = 1.2,
) -> Tensor:
    """FIPO (arXiv:2603.19835): how much the policy has come to favour what follows each token.

    f_t = clip(exp(sum over k >= t of 2^(-(k - t) / half_life) log(pi / pi_old)_k), low, high).
    Pass it as the `importance_sampling_ratio` of a "ppo_clip" loss: f is positive, so that it then
    multiplies the advantage.

    Args:
        logp, old_logp: (B, T), of the present policy and of the one that sampled.
        mask: bool, true = the token counts; others are passed over. None = every token counts.
        half_life: in tokens, positive.
        low, high: the bounds, 0 <= low <= high. The defaults only ever add weight; low = 0.8 is the
            two-sided form.

    Returns:
        (B, T), float32 (float64 for float64), without gradient; 0 where masked.

    Raises:
        ValueError: shapes differ, not rows (B, T), a half-life or bounds out of range.
    """
    check_positive(half_life=half_life)
    if not 0 <= low <= high:
        raise ValueError(f"low and high must satisfy 0 <= low <= high, got {low} and {high}")
    if logp.dim() != 2:
        raise ValueError(f"logp must be (B, T), not {tuple(logp.shape)}: each row is a sequence")
    mask = checked_mask("logp", logp, mask, old_logp=old_logp)
    dtype = torch.promote_types(logp.dtype, torch.float32)
    x = torch.where(mask, log_ratio(logp.to(dtype), old_logp.to(dtype)), 0.0)
    future = discounted_return(x, gamma=0.5 ** (1 / half_life), mask=mask)
    return torch.where(mask, future.exp().clamp(low, high), 0.0)


@checks_types
@torch.no_grad()
def clip_cov_weight(
    logp: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov (arXiv:2505.22617): 0 for a random few of the tokens with a high covariance.

    Of the tokens whose (logp - mean logp) (A - mean A) lies between low and high, as many as
    fraction x counted tokens (one at least) get no gradient: pass the result as the
    `importance_sampling_ratio` of a "ppo_clip" loss.

    Args:
        logp: (N,) or (B, T) over the whole optimization batch, before it is cut into micro-batches.
        advantage: likewise, or (B,) spread over T.
        mask: bool, true = the token counts.
        fraction: in (0, 1].
        generator: for the random choice; on logp's device.

    Returns:
        The shape of logp, 0 or 1, float32 (float64 for float64).

    Raises:
        ValueError: shapes differ, fraction out of range, or low above high.
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    covariance, count = _covariance(logp, advantage, mask, fraction)
    candidates = (covariance > low) & (covariance < high)
    # a random order of the candidates, all others last
    order = torch.rand(logp.shape, generator=generator, device=logp.device)
    chosen = _largest(torch.where(candidates, order, -torch.inf), count)
    return torch.where(chosen, 0.0, torch.ones_like(covariance))


@checks_types
@torch.no_grad()
def kl_cov_mask(
    logp: Tensor, advantage: Tensor, *, mask: Tensor | None = None, fraction: float = 2e-4
) -> Tensor:
    """KL-Cov (arXiv:2505.22617): the fraction of tokens with the largest covariance.

    They are (logp - mean logp) (A - mean A) at its largest, one token at least. Penalize these and
    leave the others be, in two losses that share num_items:

        chosen = rl.kl_cov_mask(old_logp, advantage, mask=mask)
        others = rl.policy_loss(..., mask=mask & ~chosen, epsilon=math.inf, num_items=n)
        penalized = rl.policy_loss(..., mask=mask & chosen, surrogate="kl_cov", num_items=n)

    Args and errors as in `clip_cov_weight`.

    Returns:
        bool, the shape of logp; false where masked.
    """
    covariance, count = _covariance(logp, advantage, mask, fraction)
    return _largest(covariance, count)


def _covariance(logp, advantage, mask, fraction) -> tuple[Tensor, Tensor]:
    """Each token's part of the covariance, -inf where masked; how many tokens are to be chosen."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    advantage = spread(advantage, logp)
    # a banned token has no covariance, and none of its -inf in the mean of the others
    mask = checked_mask("logp", logp, mask, advantage=advantage) & (logp != -torch.inf)
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp, advantage = (torch.where(mask, x.to(dtype), 0.0) for x in (logp, advantage))
    counted = mask.sum()
    tokens = counted.clamp(min=1)
    product = (logp - logp.sum() / tokens) * (advantage - advantage.sum() / tokens)
    count = (fraction * counted.double()).long().clamp(min=1)
    return torch.where(mask, product, -torch.inf), count


def _largest(score: Tensor, count: Tensor) -> Tensor:
    """The `count` entries of the largest finite scores, ties to the first."""
    order = score.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return (rank.view(score.shape) < count) & (score > -torch.inf)


def spread(advantage: Tensor, logp: Tensor) -> Tensor:
    """(B,) advantages spread over the T of logp (B, T); others as they are."""
    if logp.dim() == 2 and advantage.shape == logp.shape[:1]:
        return advantage[:, None].expand(logp.shape)
    return advantage


def checked_mask(name: str, logp: Tensor, mask: Tensor | None, **others: Tensor) -> Tensor:
    """The mask, all true where it is None; ValueError where a shape is not logp's."""
    if logp.dim() not in (1, 2):
        raise ValueError(f"{name} must be (N,) or (B, T), not {tuple(logp.shape)}")
    if mask is None:
        mask = torch.ones_like(logp, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}: pass mask.bool()")
    for other, tensor in {"mask": mask, **others}.items():
        if tensor.shape != logp.shape:
            raise ValueError(
                f"{other} must have the shape of the log-probabilities, {tuple(logp.shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    return mask
