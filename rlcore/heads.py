"""From a model to the losses of its completions: through the logits, or past them.

`LogitsHead` lets the model make its logits. `FusedHead` stops it at the head's input and hands that
and the head's weight to the fused losses, so that no (B, C, V) tensor is ever made. Both have the
same two methods, and give the same numbers to float32 rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import rlcore as rl
from rlcore.models import completion_logits, completion_outputs


class Completions(Protocol):
    """What a loss asks a model about: the last C tokens of each of B rows."""

    input_ids: torch.Tensor  # (B, T) int64, prompt and then completion
    attention_mask: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, C) bool: the completion tokens that count

    @property
    def target(self) -> torch.Tensor:
        """(B, C) int64: the completion's tokens."""
        ...


@dataclass(frozen=True)
class _Probe:
    """A few tokens to compare heads on."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor


class LogitsHead:
    """Losses from the model's own logits."""

    def token_logprob(self, model: Any, batch: Completions, **options: Any) -> rl.TokenLogprob:
        """`rl.token_logprob` of the completions."""
        logits = completion_logits(model, *_place(batch))
        return rl.token_logprob(logits, batch.target, mask=batch.mask, **options)

    def policy_loss(
        self, model: Any, batch: Completions, advantage: torch.Tensor, **options: Any
    ) -> rl.PolicyLoss:
        """`rl.policy_loss` of the completions, whose logits take the gradient."""
        options = {"mask": batch.mask, "inplace_backward": model.training} | options
        logits = completion_logits(model, *_place(batch))
        return rl.policy_loss(logits, batch.target, advantage, **options)


@dataclass(frozen=True)
class FusedHead:
    """Losses from the head's input; weight and bias are read at the call, from `layer`."""

    layer: torch.nn.Linear
    softcap: float | None = None
    logit_scale: float = 1.0

    def token_logprob(self, model: Any, batch: Completions, **options: Any) -> rl.TokenLogprob:
        """`rl.linear_token_logprob` of the completions."""
        hidden = self._hidden(model, batch)
        return rl.linear_token_logprob(
            hidden, self.layer.weight, batch.target, mask=batch.mask, **self._options(), **options
        )

    def policy_loss(
        self, model: Any, batch: Completions, advantage: torch.Tensor, **options: Any
    ) -> rl.PolicyLoss:
        """`rl.linear_policy_loss` of the completions."""
        options = {"mask": batch.mask} | self._options() | options
        hidden = self._hidden(model, batch)
        return rl.linear_policy_loss(hidden, self.layer.weight, batch.target, advantage, **options)

    def _options(self) -> dict[str, Any]:
        return {
            "bias": self.layer.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def _hidden(self, model: Any, batch: Completions) -> torch.Tensor:
        """(B, C, H): what the head would have turned into the completions' logits."""
        with _stopped_at(self.layer) as seen:
            completion_outputs(model, *_place(batch))
        return seen[-1][:, -batch.target.shape[1] :]


Head = LogitsHead | FusedHead


def _place(batch: Completions) -> tuple[torch.Tensor, torch.Tensor, int]:
    return batch.input_ids, batch.attention_mask, batch.target.shape[1]


@contextlib.contextmanager
def _stopped_at(layer: torch.nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Collects the layer's inputs, and lets it make a single column of its output."""
    seen: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    layer.forward = forward
    try:
        yield seen
    finally:
        del layer.forward


def choose_head(policy: Any, fused: bool) -> tuple[Head, str | None]:
    """The head to train an unwrapped `policy` through, and why it is not the fused one.

    A fused head is taken only after it gave the policy's own log-probabilities for a few tokens:
    an architecture may do more to its logits than what is known here.
    """
    if not fused:
        return LogitsHead(), None
    layer = policy.get_output_embeddings()
    # an adapter or a quantised layer is no plain Linear, and its weight is not the whole truth
    if type(layer) is not torch.nn.Linear:
        return LogitsHead(), f"its head is a {type(layer).__name__}, not a plain linear layer"
    head = FusedHead(layer, *_logit_options(policy))
    if not _agrees(head, policy):
        return LogitsHead(), f"{type(policy).__name__} does more to its logits than is known here"
    return head, None


def _logit_options(policy: Any) -> tuple[float | None, float]:
    """(softcap, logit_scale) of Gemma-, Cohere- and Granite-type models; (None, 1.0) elsewhere."""
    config = policy.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return softcap, float(scale / (getattr(config, "logits_scaling", None) or 1.0))


@torch.no_grad()
def _agrees(head: FusedHead, policy: Any) -> bool:
    """Whether both heads give the same log-probabilities of eight tokens."""
    device = head.layer.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.layer.weight.shape[0], (2, 5), generator=generator).to(device)
    target = ids[:, 1:]
    batch = _Probe(ids, torch.ones_like(ids), target, torch.ones_like(target).bool())
    was_training = policy.training
    policy.eval()
    fused = head.token_logprob(policy, batch, entropy=False).logp
    plain = LogitsHead().token_logprob(policy, batch, entropy=False).logp
    policy.train(was_training)
    # logits in half precision are rounded, a forgotten scale or cap is far from that
    tolerance = 1e-3 if head.layer.weight.dtype == torch.float32 else 0.02
    return bool((fused - plain).abs().max() <= tolerance * (1 + plain.abs().max()))
