"""Causal language models and their tokenizers, and the one forward pass that the trainers need.

Logits come for the completion only: position t of a sequence predicts its token t + 1, so a
completion of C tokens takes the C positions that start at the prompt's last token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlcore.adapters import has_adapter, merge_adapter
from rlcore.errors import UserError


def load_tokenizer(name_or_path: str, eos_token: str | None = None) -> Any:
    """The tokenizer with left padding; where it has no pad token, eos stands in for it.

    Args:
        eos_token: the token to end text with, of the tokenizer's own; None: the one it has.

    Raises:
        UserError: nothing loadable there, or a tokenizer with neither a pad nor an eos token, or
            without the token asked for.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, "tokenizer", name_or_path)
    tokenizer.padding_side = "left"
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"eos_token {eos_token!r} is no token of {name_or_path!r}: name one that it has"
            )
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name_or_path!r} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    name_or_path: str,
    dtype: torch.dtype | str = torch.float32,
    gradient_checkpointing: bool = False,
    dropout: bool = True,
) -> Any:
    """A causal language model to train; `dropout=False` switches its dropout off for good.

    An adapter's directory gives the model it was trained on, with the adapter merged into it.

    Raises:
        UserError: nothing loadable there.
    """
    from transformers import AutoModelForCausalLM

    model = _load_model(AutoModelForCausalLM, name_or_path, dtype=dtype)
    return _to_train(model, gradient_checkpointing, dropout)


def load_classifier(
    name_or_path: str,
    dtype: torch.dtype | str = torch.float32,
    gradient_checkpointing: bool = False,
    dropout: bool = True,
) -> Any:
    """A model that gives a sequence one score, to train; otherwise like `load_policy`.

    From a causal language model's directory the score's layer comes out random.

    Raises:
        UserError: nothing loadable there.
    """
    from transformers import AutoModelForSequenceClassification

    model = _load_model(AutoModelForSequenceClassification, name_or_path, dtype=dtype, num_labels=1)
    return _to_train(model, gradient_checkpointing, dropout)


def _load_model(auto_class: Any, name_or_path: str, **options: Any) -> Any:
    """The model; of an adapter's directory the model it was trained on, with it merged in."""
    model = _load(auto_class, "model", name_or_path, **options)
    return merge_adapter(model) if has_adapter(model) else model


def _to_train(model: Any, gradient_checkpointing: bool, dropout: bool) -> Any:
    if gradient_checkpointing:
        # transformers 5.2x renames it, 5.0 knows the old name only
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if not dropout:
        disable_dropout(model)
    return model.train()


def load_reference(name_or_path: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """A frozen causal language model in evaluation mode.

    Raises:
        UserError: nothing loadable there.
    """
    return load_policy(name_or_path, dtype, dropout=False).eval().requires_grad_(False)


def _load(auto_class: Any, what: str, name_or_path: str, **options: Any) -> Any:
    path = Path(name_or_path)
    # A path that is not there would be asked for on the hub, with a message about repositories.
    looks_local = path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"no {what} at {name_or_path!r}: there is no such directory")
    try:
        with no_progress_bars():
            return auto_class.from_pretrained(name_or_path, **options)
    except Exception as error:
        # Everything from a missing file to a broken header: transformers knows many error types.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load a {what} from {name_or_path!r}: {reason[0]}") from error


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers without its bars, which would tear a run's own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: a policy ratio means nothing when each pass draws another network."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Llama-type attention keeps its rate as a plain attribute.
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


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
