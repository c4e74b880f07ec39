"""Value models: from a sequence to V of the state after each of its tokens.

    V_t = w . h_t,  h_t = what the backbone makes of the tokens up to t

The backbone is the value model's own (`ValueModel`: a sequence classifier, so that a reward model's
directory serves as the start and the result is one that transformers loads), or the policy's
(`ValueHead`, fed by `watched`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from rlcore.models.adapters import NEW_HEAD
from rlcore.models.forward import forward_options, position_ids
from rlcore.models.loading import check_tokenizer, load_classifier


class ValueModel(torch.nn.Module):
    """The backbone and the score layer of what `load_classifier` gives, asked after every token."""

    def __init__(self, classifier: Any):
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) float32: the value of the state after each token; padding means nothing."""
        backbone = self.classifier.base_model
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        if "position_ids" in forward_options(backbone):
            arguments["position_ids"] = position_ids(attention_mask)
        hidden = backbone(input_ids, **arguments).last_hidden_state
        return _scores(hidden, getattr(self.classifier, NEW_HEAD))


class ValueHead(torch.nn.Module):
    """One linear score of hidden states that another model made; it starts at 0."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.score = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.score.weight)
        torch.nn.init.zeros_(self.score.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T) float32."""
        return _scores(hidden, self.score)


def _scores(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """(..., H) -> (...): in float32 whatever autocast would do, as returns are told apart by it."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)


@contextlib.contextmanager
def watched(policy: Any) -> Iterator[list[torch.Tensor]]:
    """Collects what goes into an unwrapped policy's output head: its last hidden states."""
    seen: list[torch.Tensor] = []
    hook = policy.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    try:
        yield seen
    finally:
        hook.remove()


def load_value_model(
    name_or_path: str, tokenizer: Any, *, gradient_checkpointing: bool = False, **options: Any
) -> ValueModel:
    """A value model to train; a head that was not trained before starts at 0.

    Args:
        name_or_path: a reward or value model, or a causal language model, whose backbone is taken.
        tokenizer: the policy's.
        options: dtype, attn_implementation, trust_remote_code: see `load_policy`.

    Raises:
        UserError: nothing usable there, or a model that reads other tokens.
    """
    trusted = options.get("trust_remote_code", False)
    check_tokenizer("value_model", name_or_path, tokenizer, trusted)
    classifier = load_classifier(
        name_or_path,
        gradient_checkpointing=gradient_checkpointing,
        dropout=False,
        new_head="zero",
        **options,
    )
    return ValueModel(classifier)
