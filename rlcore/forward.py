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

from rlcore.errors import UserError, reason_of


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count attended tokens only, (B, T) -> (B, T) int64; padding sits at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def unwrapped(model: Any) -> Any:
    """The model without what DDP, torch.compile and peft have put around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module"):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


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


def check_reading(model: Any, name: str) -> None:
    """Raise UserError where a token's logits depend on later tokens, or on padding.

    Two rows, one of them padded on the left, must give what the padded one gives alone with other
    tokens at its end.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_vocabulary(model), (2, 9), generator=generator).to(model.device)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :2] = 0
    alone = ids[:1, 2:-1]
    changed = alone.clone()
    changed[0, 4:] = ids[1, :2]
    try:
        with torch.no_grad(), evaluating(model):
            padded = completion_logits(model, ids, attention_mask, 6)[:1, :4]
            whole, other = (model(row, use_cache=False).logits[:, :4] for row in (alone, changed))
    except Exception as error:
        kind = type(model).__name__
        raise UserError(f"{name!r}: a {kind} cannot read plain rows: {reason_of(error)}") from error
    if not same_logits(whole, other):
        raise UserError(
            f"{name!r} is not causal: a {type(model).__name__} changes the logits of its tokens "
            "with later tokens; choose a model that reads from left to right"
        )
    if not same_logits(whole, padded):
        raise UserError(
            f"{name!r} cannot be trained in batches: padding on the left changes the logits of a "
            f"{type(model).__name__}; choose another architecture"
        )


def _vocabulary(model: Any) -> int:
    """How many tokens the model both reads and predicts."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if layer is not None)


def same_logits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two computations of the same logits differ by no more than rounding."""
    # half precision is rounded at each layer; another token or a forgotten step is far from that
    tolerance = 1e-3 if first.dtype == torch.float32 else 0.02
    return bool((first - second).abs().max() <= tolerance * second.abs().max())
