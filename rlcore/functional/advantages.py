"""Advantages from whole-completion rewards, in plain PyTorch.

group-relative   A_i = (r_i - mean_group r) / (std + 1e-4)
decoupled        the same of each reward function, summed by weight, over the batch's std
leave-one-out    A_i = r_i - mean of the group's other rewards
"""

from __future__ import annotations

import torch

from rlcore.errors import UserError, unknown_name
from rlcore.kernels.checks import checks_types

STD_EPSILON = 1e-4
VARIANCE_EPSILON = 1e-8


def _groups(reward: torch.Tensor, num_generations: int) -> torch.Tensor:
    """`reward` (B,) as (B / G, G) in float32 (float64 stays)."""
    if reward.dim() != 1:
        raise ValueError(f"reward must be one number a completion, (B,), not {tuple(reward.shape)}")
    if num_generations < 1 or reward.numel() % num_generations:
        raise ValueError(
            f"reward {tuple(reward.shape)} does not divide into groups of num_generations="
            f"{num_generations}"
        )
    dtype = torch.float64 if reward.dtype == torch.float64 else torch.float32
    return reward.to(dtype).reshape(-1, num_generations)


def _group_std(centered: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Each group's unbiased std (B / G, 1)."""
    others = (present.sum(1, keepdim=True) - 1).clamp(min=1)
    return (centered.square().sum(1, keepdim=True) / others).sqrt()


def _batch_std(groups: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The unbiased std over all rewards, a scalar."""
    rewards = groups[present]
    return rewards.std() if rewards.numel() > 1 else rewards.new_zeros(())


SCALES = ("group", "batch", "mean", "none")


@checks_types
def group_advantage(
    reward: torch.Tensor, num_generations: int, *, scale_rewards: str = "group"
) -> torch.Tensor:
    """Rewards relative to their group's mean (GRPO: Shao et al. 2024, arXiv:2402.03300, 4.1.2).

    Args:
        reward: (B,), the G = `num_generations` completions of a prompt next to each other; NaN
            stands for a completion that nobody judged.
        scale_rewards: divide by the "group" std, by the "batch" std, by the group's "mean" (MaxRL:
            Tajwar et al. 2026, arXiv:2602.02710: of rewards 0 and 1 the gradient is that of the
            log of the success probability, as far as G samples tell it), or by nothing: "none",
            which is unbiased (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783).

    Returns:
        (B,) float32 (float64 for float64 rewards). Standard deviations are unbiased and get 1e-4
        added; a group whose rewards are all equal gets exactly 0 under every scale. A NaN counts in
        no mean and no std, and gets 0.

    Raises:
        ValueError: `reward` is not (B,) with B a multiple of G, an unknown `scale_rewards`, or a
            reward below 0 that is to be divided by a mean.
    """
    if scale_rewards not in SCALES:
        raise unknown_name("scale_rewards", scale_rewards, SCALES)
    groups = _groups(reward, num_generations)
    present = ~groups.isnan()
    varied = groups.nan_to_num(torch.inf, torch.inf).amin(1) < groups.nan_to_num(-torch.inf).amax(1)
    # Rounding must not make a difference of equal rewards that the std then blows up.
    counted = present & varied[:, None]
    centered = torch.where(counted, groups - groups.nanmean(1, keepdim=True), 0.0)
    if scale_rewards == "group":
        centered = centered / (_group_std(centered, present) + STD_EPSILON)
    elif scale_rewards == "batch":
        centered = centered / (_batch_std(groups, present) + STD_EPSILON)
    elif scale_rewards == "mean":
        if (groups < 0).any():
            raise UserError(
                f"scale_rewards 'mean' needs rewards of at least 0, got {groups.nan_to_num().min()}"
            )
        # a group with a reward above 0 has a mean above 0
        mean = groups.nanmean(1, keepdim=True)
        centered = torch.where(counted, centered / mean, 0.0)
    return centered.reshape(-1)


@checks_types
def decoupled_group_advantage(
    reward: torch.Tensor, num_generations: int, *, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Advantages of several rewards, each relative to its own group (GDPO: arXiv:2601.05242).

    Each reward is centred and scaled in its group before they are summed by weight, so that two
    answers whose rewards differ in kind do not get one advantage because the sums are equal. The
    sums are then whitened over the batch.

    Args:
        reward: (B, F), F rewards of each completion, the G = `num_generations` completions of a
            prompt next to each other; NaN stands for a reward that has no opinion.
        weight: (F,), what each reward counts; None: 1 each.

    Returns:
        (B,) float32 (float64 for float64 rewards). Each std is unbiased and gets 1e-4 added. A NaN
        adds nothing to its completion; a completion without any reward gets 0, and counts in no
        mean.

    Raises:
        ValueError: `reward` is not (B, F) with B a multiple of G, or `weight` not (F,).
    """
    if reward.dim() != 2 or not reward.shape[1]:
        raise ValueError(f"reward must be (B, F), F rewards each, not {tuple(reward.shape)}")
    columns = [group_advantage(column, num_generations) for column in reward.unbind(1)]
    each = torch.stack(columns, 1)
    weight = each.new_ones(len(columns)) if weight is None else weight.to(each)
    if weight.shape != (len(columns),):
        raise ValueError(
            f"weight must hold one number a reward, ({len(columns)},), not {tuple(weight.shape)}"
        )
    # a weight of 0 times no opinion, too, is 0
    total = torch.where(reward.isnan().all(1), torch.nan, (each * weight).sum(1))
    judged = ~total.isnan()
    centered = torch.where(judged, total - total.nanmean(), 0.0)
    return centered / (_batch_std(total, judged) + STD_EPSILON)


@checks_types
def leave_one_out_advantage(reward: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Each reward minus the mean of its group's others (RLOO: Ahmadian et al. 2024,
    arXiv:2402.14740, eq. 8).

    Args:
        reward: (B,), the G = `num_generations` completions of a prompt next to each other; NaN
            stands for a completion that nobody judged.

    Returns:
        (B,) float32 (float64 for float64 rewards). A NaN counts in no mean and gets 0, and so does
        the only reward of its group.

    Raises:
        ValueError: `reward` is not (B,) with B a multiple of G, or G = 1: nobody is left then.
    """
    if num_generations == 1:
        raise ValueError("leave-one-out needs num_generations >= 2: one reward leaves no others")
    groups = _groups(reward, num_generations)
    present = ~groups.isnan()
    count = present.sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (count - 1).clamp(min=1)
    return torch.where(present & (count > 1), groups - others, 0.0).reshape(-1)


@checks_types
def whiten(
    x: torch.Tensor, mask: torch.Tensor | None = None, *, shift_mean: bool = True
) -> torch.Tensor:
    """`x` scaled to unit variance over the masked entries, and to zero mean unless told otherwise.

    Args:
        x: any shape, floating.
        mask: same shape, true where an entry counts; None counts all of them.
        shift_mean: False keeps the mean that `x` had.

    Returns:
        Like `x`. The variance is unbiased and gets 1e-8 added; entries off the mask are 0, and so
        is a single counted entry.

    Raises:
        ValueError: `mask` is not bool or has another shape than `x`.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}: pass mask.bool()")
    if mask.shape != x.shape:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of x {tuple(x.shape)}")
    count = mask.sum()
    values = torch.where(mask, x if x.dtype == torch.float64 else x.float(), 0.0)
    mean = values.sum() / count.clamp(min=1)
    centered = torch.where(mask, values - mean, 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    scaled = centered * (variance + VARIANCE_EPSILON).rsqrt()
    if not shift_mean:
        scaled = torch.where(mask, scaled + mean, 0.0)
    # With one entry there is no variance to speak of, whatever the mean.
    return torch.where(count > 1, scaled, torch.zeros_like(scaled)).to(x.dtype)
