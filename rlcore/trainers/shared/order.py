"""Which rows come when, and to which process: functions of seed and step alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from rlcore.trainers.shared.run import Run

Item = TypeVar("Item")


@functools.lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(rows, generator=generator).tolist()


def batch_indices(rows: int, size: int, number: int, seed: int) -> list[int]:
    """The rows of batch `number` (from 0): a cut from one endless row of shuffled epochs."""
    positions = range(number * size, (number + 1) * size)
    return [_epoch_order(rows, seed, place // rows)[place % rows] for place in positions]


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, order and all; neighbours come out far apart."""
    mixed = 0
    for part in parts:
        # Multiply-xorshift with Knuth's 64-bit multiplier.
        mixed = ((mixed ^ part) + 1) * 6364136223846793005 % (1 << 64)
        mixed ^= mixed >> 29
    return mixed % (1 << 63)


def split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive pieces of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def shared_out(run: Run, ordered: Sequence[Item], size: int) -> list[tuple[Sequence[Item], bool]]:
    """This process's part of `ordered` in batches of at most `size`, each with whether it counts.

    Every process gets equally many: one that runs short repeats an item that does not count,
    because a sharded model's forward pass is every process's.
    """
    accelerator = run.accelerator
    mine = ordered[accelerator.process_index :: accelerator.num_processes]
    batches = [(piece, True) for piece in split(mine, size)]
    most = math.ceil(math.ceil(len(ordered) / accelerator.num_processes) / size)
    return batches + [(ordered[:1], False)] * (most - len(batches))


def summed(accelerator: Any, value: float) -> float:
    """The sum of one number over all processes."""
    if accelerator.num_processes == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, "sum").item()
