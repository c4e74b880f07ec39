"""The seam between trainers and who samples for them: `Sampler`, and the loop in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlcore.sampling.rollout import Rollout, generate


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What to sample; the names and meanings are those of `generate`."""

    num_generations: int = 1
    max_new_tokens: int
    max_prompt_length: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False

    @property
    def is_truncated(self) -> bool:
        """Tokens are drawn from a part of the vocabulary alone."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


class Sampler(Protocol):
    """Completions of a policy, wherever it runs."""

    def sample(
        self,
        prompts: Sequence[str | list[dict] | list[int]],
        options: SamplingOptions,
        seed: int = 0,
    ) -> Rollout:
        """Completions of each prompt, on the trainer's device, with the log-probability that each
        token was drawn with.

        Raises:
            FloatingPointError: the policy's logits are no numbers.
        """
        ...

    def sync(self, policy: Any, step: int, weights: dict[str, Any] | None = None) -> None:
        """Sample from `policy` as it is after `step` steps from here on.

        `weights` are its whole ones, where it holds only shards of them itself.
        """
        ...

    def close(self) -> None:
        """Let go of what the sampler holds."""
        ...


class LocalSampler:
    """The decode loop in this process, on the very policy that is trained."""

    def __init__(self, policy: Any, tokenizer: Any, *, full_length: bool = False):
        self.policy = policy
        self.tokenizer = tokenizer
        self.full_length = full_length

    def sample(
        self,
        prompts: Sequence[str | list[dict] | list[int]],
        options: SamplingOptions,
        seed: int = 0,
    ) -> Rollout:
        return generate(
            self.policy,
            self.tokenizer,
            prompts,
            seed=seed,
            full_length=self.full_length,
            **dataclasses.asdict(options),
        )

    def sync(self, policy: Any, step: int, weights: dict[str, Any] | None = None) -> None:
        self.policy = policy

    def close(self) -> None:
        return None
