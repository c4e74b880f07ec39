"""Padding-free forward passes: the sequences of a batch behind each other in one row.

Positions that start anew tell transformers where a sequence begins; attention stays within it. With
flash attention that costs what the tokens cost. With other kernels it takes a mask of the whole row
by itself, which is worth it for small batches or much padding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlcore.models.forward import forward_options, position_ids


@dataclass(frozen=True)
class PackedBatch:
    """One row of K tokens out of B, and which of their outputs predict completion tokens."""

    input_ids: torch.Tensor  # (1, K) int64
    positions: torch.Tensor  # (1, K) int64, from 0 in each sequence
    predicting: torch.Tensor  # (M,) int64: places in the row
    place: torch.Tensor  # (B, C) bool: the M completion tokens that they predict

    def unpack(self, outputs: torch.Tensor) -> torch.Tensor:
        """(1, M or K, D) outputs as (B, C, D), 0 where the batch has padding."""
        rows = outputs[0]
        if len(rows) != len(self.predicting):
            rows = rows[self.predicting]
        whole = rows.new_zeros(*self.place.shape, rows.shape[-1])
        return whole.index_put((self.place,), rows)


def pack(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> PackedBatch:
    """(B, T) rows without padding, and without their last tokens, which predict nothing."""
    attended = attention_mask.bool()
    kept = attended[:, :-1] & attended[:, 1:]
    place = attended[:, -completion_length:]
    order = kept.flatten().cumsum(0).sub(1).view(kept.shape)
    return PackedBatch(
        input_ids[:, :-1][kept][None],
        position_ids(attention_mask)[:, :-1][kept][None],
        order[:, -completion_length:][place],
        place,
    )


def packed_outputs(model: torch.nn.Module, batch: PackedBatch) -> Any:
    """The model's outputs for the packed row; its logits for the predicting places where it can."""
    arguments: dict[str, Any] = {"position_ids": batch.positions, "use_cache": False}
    if "logits_to_keep" in forward_options(model):
        arguments["logits_to_keep"] = batch.predicting
    return model(batch.input_ids, **arguments)
