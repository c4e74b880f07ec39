"""The forward pass that trainers ask of a causal language model, and the proof that it is one.

Logits come for the completion only: position t of a sequence predicts its token t + 1, so a
completion of C tokens takes the C positions that start at the prompt's last token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from rlcore.errors import reason_of


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count attended tokens only, (B, T) -> (B, T) int64; padding sits at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def wrappers(model: Any) -> Iterator[Any]:
    """The model, then what DDP, torch.compile and peft have put themselves around, inwards."""
    yield model
    if hasattr(model, "_orig_mod"):
        yield from wrappers(model._orig_mod)
    elif hasattr(model, "module"):
        yield from wrappers(model.module)
    elif hasattr(model, "get_base_model"):
        yield from wrappers(model.get_base_model())


def unwrapped(model: Any) -> Any:
    """The model without what DDP, torch.compile and peft have put around it."""
    *_, plain = wrappers(model)
    return plain


def sharded(model: Any) -> Any | None:
    """The outermost part of the model that FSDP2 has sharded, which alone can be called."""
    return next((each for each in wrappers(model) if isinstance(each, FSDPModule)), None)


def forward_options(model: torch.nn.Module) -> set[str]:
    """The names that the model's forward takes, whatever it is wrapped in."""
    # The class has the signature; the instance's forward may be wrapped for mixed precision.
    return set(inspect.signature(type(unwrapped(model)).forward).parameters)


def completion_logits(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
) -> torch.Tensor:
    """The logits that predict the last `completion_length` tokens of each row.

    Args:
        input_ids: (B, T) int64, prompt then completion.
        attention_mask: (B, T), 1 where there is a token; prompts are padded on the left.
        completion_length: C, with 1 <= C < T.

    Returns:
        (B, C, V), contiguous where the model takes `logits_to_keep`; entry [:, t] predicts
        `input_ids[:, T - C + t]`. The last token's own logits are never computed.

    Raises:
        ValueError: C is not in [1, T).
    """
    outputs = completion_outputs(model, input_ids, attention_mask, completion_length)
    return outputs.logits[:, -completion_length:]


class CompletionLogits(torch.nn.Module):
    """A causal language model as a function of judged completions: their (B, C, V) logits."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return completion_logits(
            self.model, batch.input_ids, batch.attention_mask, batch.completion_length
        )


def completion_outputs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
) -> Any:
    """The model's outputs for `completion_logits`, as transformers gives them."""
    if not 1 <= completion_length < input_ids.shape[1]:
        raise ValueError(
            f"completion_length {completion_length} must be at least 1 and below the length of "
            f"input_ids {tuple(input_ids.shape)}: the first token has nothing to predict it"
        )
    mask = attention_mask[:, :-1]
    options = forward_options(model)
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in options:
        arguments["position_ids"] = position_ids(mask)
    if "logits_to_keep" in options:
        arguments["logits_to_keep"] = completion_length
    return model(input_ids[:, :-1], **arguments)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while: no dropout, no gradient checkpointing.

    Every submodule gets its own mode back: some may have been in evaluation mode for good.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def reading_fault(model: Any, *, in_batches: bool = True) -> str | None:
    """Why the model is none to train from left to right, or in padded batches; None where it is.

    A row that is padded on the left must give what it gives alone with other tokens at its end.
    """
    kind = type(unwrapped(model)).__name__
    ids, attention_mask = probe_rows(model)
    alone = ids[:1, 2:-1]
    changed = alone.clone()
    changed[0, 4:] = ids[1, :2]
    try:
        with evaluating(model):
            padded = completion_logits(model, ids, attention_mask, 6)[:1, :4]
            whole, other = (model(row, use_cache=False).logits[:, :4] for row in (alone, changed))
    except Exception as error:
        return f"a {kind} cannot read plain rows of tokens: {reason_of(error)}"
    if not same_logits(whole, other):
        return (
            f"it is not causal, as later tokens change the logits of a {kind}: choose a model that "
            "reads from left to right"
        )
    if in_batches and not same_logits(whole, padded):
        return (
            f"padding on the left changes the logits of a {kind}, so it cannot be trained in "
            "batches: choose another architecture"
        )
    return None


def probe_rows(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) (2, 9) on the model's device: a row padded left, one right."""
    layers = (unwrapped(model).get_input_embeddings(), unwrapped(model).get_output_embeddings())
    weights = [layer.weight for layer in layers if layer is not None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(map(len, weights)), (2, 9), generator=generator).to(weights[0].device)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :2] = attention_mask[1, -1] = 0
    return ids, attention_mask


def same_logits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two computations of the same logits differ by no more than rounding."""
    # half precision is rounded at each layer; what another token does is far from that
    tolerance = 0.02 if first.dtype.itemsize == 2 else 1e-3
    return bool((first - second).abs().max() <= tolerance * second.abs().max())
