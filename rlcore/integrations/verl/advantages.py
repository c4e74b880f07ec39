"""rlcore's advantages in the form that verl's registry calls them in.

verl hands every estimator all that it has, by keyword; each takes what it needs and returns
(advantages, returns), both (B, T) and 0 where the mask is false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rlcore.functional.advantages import group_advantage, leave_one_out_advantage, whiten
from rlcore.kernels.scans.scan import discounted_return
from rlcore.kernels.scans.scan import gae as gae_advantage

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> Pair:
    """ "gae": whitened advantages, and returns; the parameters are those of verl's own function."""
    mask = response_mask.bool()
    advantage, returns = gae_advantage(
        token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=mask
    )
    return whiten(advantage, mask), returns


def registered_gae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    config: Any = None,
    **_: Any,
) -> Pair:
    """`gae` under a name of its own; gamma and lam come from the config where they are not given.

    Raises:
        ValueError: no values: verl's trainer hands them to its own "gae" alone.
    """
    if values is None:
        raise ValueError(
            "rlcore_gae needs values, and verl's trainer hands the critic's to adv_estimator=gae "
            "alone: leave it at gae and call rlcore.integrations.verl.patch(), which serves it"
        )
    gamma = config.gamma if gamma is None else gamma
    lam = config.lam if lam is None else lam
    return gae(token_level_rewards, values, response_mask, gamma, lam)


@torch.no_grad()
def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **_: Any,
) -> Pair:
    """ "grpo": scores relative to their group's mean, over its std where the config asks for it."""
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = config is None or config.get("norm_adv_by_std_in_grpo", True)

    def relative(scores: Tensor, size: int) -> Tensor:
        centered = group_advantage(scores, size, scale_rewards="none")
        if not norm_adv_by_std_in_grpo:
            return centered
        others = (~scores.isnan()).view(-1, size).sum(1, keepdim=True) - 1
        squares = centered.view(-1, size).square().sum(1, keepdim=True)
        std = (squares / others.clamp(min=1)).sqrt().expand(-1, size).flatten()
        return centered / (std + epsilon)

    alone = 1 / (1 + epsilon) if norm_adv_by_std_in_grpo else 1.0
    return _spread(_by_group(token_level_rewards, index, relative, alone), response_mask)


@torch.no_grad()
def rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Iterable, **_: Any) -> Pair:
    """ "rloo": scores minus the mean of the group's others."""
    scores = _by_group(token_level_rewards, index, leave_one_out_advantage)
    return _spread(scores, response_mask)


@torch.no_grad()
def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any, **_: Any
) -> Pair:
    """ "reinforce_plus_plus": discounted rewards to go, whitened over the batch."""
    mask = response_mask.bool()
    returns = discounted_return(token_level_rewards, gamma=float(config.gamma), mask=mask)
    return whiten(returns, mask), returns


@torch.no_grad()
def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable, **_: Any
) -> Pair:
    """ "reinforce_plus_plus_baseline": scores minus their group's mean, whitened over the batch."""

    def centered(scores: Tensor, size: int) -> Tensor:
        return group_advantage(scores, size, scale_rewards="none")

    advantage, _ = _spread(_by_group(token_level_rewards, index, centered), response_mask)
    advantage = whiten(advantage, response_mask.bool())
    return advantage, advantage


@torch.no_grad()
def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, **_: Any
) -> Pair:
    """ "remax": rewards to go minus the greedy completion's score."""
    mask = response_mask.bool()
    returns = discounted_return(token_level_rewards, mask=mask)
    return torch.where(mask, returns - reward_baselines.unsqueeze(-1), 0.0), returns


def _by_group(
    token_level_rewards: Tensor,
    index: Iterable,
    advantage: Callable[[Tensor, int], Tensor],
    alone: float = 1.0,
) -> Tensor:
    """Each row's score relative to the rows of its group, (B,).

    Groups are equal entries of `index`, of any size and order. A score alone in its group has
    nothing to be compared with: as in verl it stays what it is, times `alone`.
    """
    scores = token_level_rewards.sum(-1)
    numbers: dict[Any, int] = {}
    sizes: list[int] = []
    places = []
    for key in index.tolist() if hasattr(index, "tolist") else index:
        number = numbers.setdefault(key, len(numbers))
        if number == len(sizes):
            sizes.append(0)
        places.append((number, sizes[number]))
        sizes[number] += 1
    row, column = torch.tensor(places, device=scores.device).T
    table = scores.new_full((len(sizes), max(2, *sizes)), torch.nan)
    table[row, column] = scores
    relative = advantage(table.flatten(), table.shape[1]).view(table.shape)[row, column]
    size = torch.tensor(sizes, device=scores.device)[row]
    return torch.where(size == 1, alone * scores, relative)


def _spread(scores: Tensor, response_mask: Tensor) -> Pair:
    advantage = torch.where(response_mask.bool(), scores.unsqueeze(-1), 0.0)
    return advantage, advantage


ESTIMATORS: dict[str, Callable[..., Pair]] = {
    "rlcore_gae": registered_gae,
    "rlcore_grpo": grpo,
    "rlcore_rloo": rloo,
    "rlcore_reinforce_plus_plus": reinforce_plus_plus,
    "rlcore_reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "rlcore_remax": remax,
}
