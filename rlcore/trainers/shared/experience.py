"""A generation batch: sampled completions with what the loss needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from rlcore.sampling.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """N sampled completions: tokens, masks, advantages, and log-probabilities of other policies."""

    input_ids: torch.Tensor  # (N, P + C) int64
    attention_mask: torch.Tensor  # (N, P + C) int64
    mask: torch.Tensor  # (N, C) bool: the completion tokens that the loss counts
    advantage: torch.Tensor | None = None  # (N,) or (N, C)
    old_logp: torch.Tensor | None = None  # (N, C): of the policy before its updates
    sampling_logp: torch.Tensor | None = None  # (N, C): that the tokens were drawn with
    importance_ratio: torch.Tensor | None = None  # (N, C): old over sampling policy, bounded
    ref_logp: torch.Tensor | None = None  # (N, C): of the reference
    value: torch.Tensor | None = None  # (N, C): of the value model at the time of sampling
    returns: torch.Tensor | None = None  # (N, C): what the value model is to predict

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def completion_length(self) -> int:
        return self.mask.shape[1]

    @property
    def target(self) -> torch.Tensor:
        """(N, C) int64: the completion's tokens."""
        return self.input_ids[:, -self.completion_length :]

    def take(self, rows: torch.Tensor) -> Experience:
        """The rows (M,) in that order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Experience(**{k: None if v is None else v[rows] for k, v in values.items()})

    def trimmed(self) -> Experience:
        """The same rows without the columns that are padding in all of them."""
        prompt_length = self.attention_mask.shape[1] - self.completion_length
        used = self.attention_mask.any(0)
        start = int(used[:prompt_length].long().argmax())
        length = max(int(used[prompt_length:].sum()), 1)
        columns = slice(start, prompt_length + length)
        tokens = {name: getattr(self, name)[:, columns] for name in ("input_ids", "attention_mask")}
        per_token = {
            name: value[:, :length]
            for name in (
                "mask",
                "advantage",
                "old_logp",
                "sampling_logp",
                "importance_ratio",
                "ref_logp",
                "value",
                "returns",
            )
            if (value := getattr(self, name)) is not None and value.dim() == 2
        }
        return replace(self, **tokens, **per_token)

    def has_gradient(self) -> torch.Tensor:
        """(N,) bool: rows that the surrogate moves: an advantage other than 0, a counted token."""
        advantage = self.advantage if self.advantage.dim() == 2 else self.advantage[:, None]
        return ((advantage != 0) & self.mask).any(1)

    def lengths(self) -> torch.Tensor:
        """(N,): attended tokens of each row, prompt and completion."""
        return self.attention_mask.sum(1)


def from_rollout(rollout: Rollout, *, mask_truncated_completions: bool) -> Experience:
    """The rollout, without advantages; truncated completions count in no loss if asked for."""
    mask = rollout.completion_mask
    if mask_truncated_completions:
        mask = mask & ~rollout.truncated[:, None]
    return Experience(
        rollout.input_ids, rollout.attention_mask, mask, sampling_logp=rollout.sampling_logp
    )
