"""The contestants of the scan benchmarks: reward, value (B, T) -> advantage, returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rlcore as rl

GAMMA, LAM = 1.0, 0.95


def ours(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return rl.gae(reward, value, gamma=GAMMA, lam=LAM, backend="torch")


def loop(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The usual loop over T, as PPO trainers have it."""
    length = reward.shape[1]
    last, reversed_advantage = 0, []
    for t in reversed(range(length)):
        following = value[:, t + 1] if t < length - 1 else 0.0
        delta = reward[:, t] + GAMMA * following - value[:, t]
        last = delta + GAMMA * LAM * last
        reversed_advantage.append(last)
    advantage = torch.stack(reversed_advantage[::-1], dim=1)
    return advantage, advantage + value


def masked_loop(
    reward: Tensor, value: Tensor, mask: Tensor | None = None, terminated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop where tokens may not count, or end an episode, as trainers of agents have it."""
    length = reward.shape[1]
    following, last, reversed_advantage = 0, 0, []
    for t in reversed(range(length)):
        goes_on = 1.0 if terminated is None else (~terminated[:, t]).float()
        delta = reward[:, t] + GAMMA * following * goes_on - value[:, t]
        advantage = delta + GAMMA * LAM * last * goes_on
        if mask is None:
            following, last = value[:, t], advantage
        else:
            counts = mask[:, t].float()
            following = value[:, t] * counts + following * (1 - counts)
            last = advantage * counts + last * (1 - counts)
            advantage = advantage * counts
        reversed_advantage.append(advantage)
    advantage = torch.stack(reversed_advantage[::-1], dim=1)
    returns = advantage + value
    return advantage, returns if mask is None else returns * mask


def torchrl(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    ends = torch.zeros_like(reward, dtype=torch.bool)
    columns = (x.unsqueeze(-1) for x in (value, following, reward, ends, ends))
    advantage, returns = vec_generalized_advantage_estimate(GAMMA, LAM, *columns)
    return advantage.squeeze(-1), returns.squeeze(-1)


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rlcore": ours,
    "loop": loop,
    "torchrl": torchrl,
}


def make_rows(rows: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, length, generator=generator).unbind()


def masks(rows: int, length: int) -> dict[str, dict[str, Tensor]]:
    """Options of `gae` by the kind of row: its pads, its tool tokens, the ends inside it."""
    generator = torch.Generator().manual_seed(1)
    stop = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    padded = torch.arange(length) < stop
    holes = padded & (torch.rand(rows, length, generator=generator) < 0.9)
    ends = torch.rand(rows, length, generator=generator) < 0.01
    return {
        "no mask": {},
        "right pads": {"mask": padded},
        "tool tokens": {"mask": holes},
        "packed episodes": {"terminated": ends},
    }
