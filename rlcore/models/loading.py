"""Models and tokenizers, loaded whole or not at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from rlcore.data.chat import set_template_variables
from rlcore.errors import UserError
from rlcore.models.adapters import (
    NEW_HEAD,
    base_of_adapter,
    has_adapter,
    is_brought,
    load_adapter,
    merge_adapter,
)
from rlcore.models.dropout import check_quiet, disable_dropout
from rlcore.models.forward import reading_fault
from rlcore.models.pretrained import from_pretrained, without_load_report
from rlcore.models.quantized import check_given, loading_in_4bit, made_trainable
from rlcore.models.whole import Fit, check_finite, check_whole, fit_of, is_new_head


def load_tokenizer(
    name_or_path: str,
    eos_token: str | None = None,
    *,
    trust_remote_code: bool = False,
    **ready: Any,
) -> Any:
    """The tokenizer with left padding; where it has no pad token, eos stands in for it.

    Args:
        eos_token: the token to end text with, of the tokenizer's own; None: the one it has.
        trust_remote_code: run Python that comes with it.
        ready: see `made_ready`.

    Raises:
        UserError: nothing loadable there, or a tokenizer with neither a pad nor an eos token, or
            without the token asked for.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(
        AutoTokenizer, "tokenizer", name_or_path, trust_remote_code=trust_remote_code
    )
    return made_ready(tokenizer, name_or_path, eos_token, **ready)


def made_ready(
    tokenizer: Any,
    name: str,
    eos_token: str | None = None,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer itself, as `load_tokenizer` gives it; `name` is what messages call it.

    Args:
        chat_template: in place of its own; it is saved with it.
        chat_template_kwargs: the template's variables, wherever it is used here; not saved.

    Raises:
        UserError: it has neither a pad nor an eos token, or not the token asked for.
    """
    tokenizer.padding_side = "left"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if chat_template_kwargs:
        set_template_variables(tokenizer, chat_template_kwargs)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"eos_token {eos_token!r} is no token of {name!r}: name one that it has"
            )
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name!r} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(
    option: str, name_or_path: str, tokenizer: Any, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of the model that `option` names, which must read the policy's tokens.

    It may have more than those: a reward model often has a token of its own to pad with.

    Args:
        tokenizer: the policy's.

    Raises:
        UserError: it reads other ones.
    """
    own = load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    known = own.get_vocab()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != index:
            raise UserError(
                f"{option} {name_or_path!r} has another tokenizer than the policy, whose tokens it "
                f"is to read: {token!r} is {index} for the policy and "
                f"{known.get(token, 'no token')} there; choose one of the policy's family"
            )
    return own


def load_policy(
    name_or_path: Any,
    dtype: torch.dtype | str = torch.float32,
    gradient_checkpointing: bool = False,
    dropout: bool = True,
    four_bit: torch.dtype | str | None = None,
    **options: Any,
) -> Any:
    """A causal language model to train; `dropout=False` switches its dropout off for good.

    An adapter's directory gives the model it was trained on, with the adapter merged into it; a
    model that is loaded already is taken as it is. `options` are attn_implementation and
    trust_remote_code, as transformers has them.

    Args:
        four_bit: the dtype to multiply in with weights that are frozen in 4 bit, "auto": that of
            the others; None: none are.

    Raises:
        UserError: nothing loadable there, weights that the checkpoint lacks, a reward model, or a
            model whose outputs depend on later tokens or on padding.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(name_or_path, str):
        what = "a causal language model"
        model = _taken(name_or_path, "lm_head", what, dtype, four_bit is not None)
        return _policy(model, "model", gradient_checkpointing, dropout)
    model, fit = _load_model(AutoModelForCausalLM, name_or_path, four_bit, dtype=dtype, **options)
    if any(is_new_head(name) for name in fit.unused):
        raise UserError(
            f"{name_or_path!r} is a reward or value model (it has a {NEW_HEAD} layer), not a "
            "language model: choose the one that it was trained from"
        )
    check_whole(model, name_or_path, fit.missing)
    if fit.unused:
        logging.getLogger(__name__).warning(
            "%s holds %d weights that a %s does not use, %s first",
            name_or_path, len(fit.unused), type(model).__name__, min(fit.unused),
        )  # fmt: skip
    return _policy(model, name_or_path, gradient_checkpointing, dropout)


def _policy(model: Any, name: str, gradient_checkpointing: bool, dropout: bool) -> Any:
    """A causal language model, checked and ready to train."""
    fault = reading_fault(model)
    if fault is not None:
        raise UserError(f"{name!r} is no model to train: {fault}")
    model = _to_train(model, gradient_checkpointing, dropout)
    if not dropout:
        check_quiet(model, name)
    return model


def _taken(
    model: Any, kind: str, what: str, dtype: torch.dtype | str, four_bit: bool = False
) -> Any:
    """A model that a caller has loaded, itself, if it can be trained as one that is loaded here."""
    if has_adapter(model) or hasattr(model, "peft_type"):
        raise UserError("model has an adapter: give the model beneath it, and peft='lora'")
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise UserError(f"model must be a name or {what} of transformers, not a {_kind(model)}")
    if (kind == "lm_head") != (model.get_output_embeddings() is not None):
        raise UserError(f"model must be {what}, not a {_kind(model)}")
    is_4bit = check_given(model, four_bit)
    check_finite(model, "model")
    # in float32 unless other is asked for: steps of 1e-6 would vanish in bfloat16
    return (
        model if is_4bit or dtype == "auto" else model.to(getattr(torch, str(dtype).split(".")[-1]))
    )


def _kind(model: Any) -> str:
    return type(model).__name__


def load_classifier(
    name_or_path: Any,
    dtype: torch.dtype | str = torch.float32,
    gradient_checkpointing: bool = False,
    dropout: bool = True,
    new_head: str | None = None,
    four_bit: torch.dtype | str | None = None,
    **options: Any,
) -> Any:
    """A model that gives a sequence one score, to train; otherwise like `load_policy`.

    Args:
        new_head: what the score's layer is where there is none yet, as in a causal language
            model's directory: "random", "zero", or None, which refuses that.

    Raises:
        UserError: nothing loadable there, weights that the checkpoint lacks, or no linear layer
            that gives one score.
    """
    from transformers import AutoModelForSequenceClassification

    if not isinstance(name_or_path, str):
        what = "a sequence classifier"
        model = _taken(name_or_path, "score", what, dtype, four_bit is not None)
        _check_score(model, type(model).__name__)
        return _to_train(model, gradient_checkpointing, dropout)
    options |= {"dtype": dtype, "num_labels": 1}
    model, fit = _load_model(AutoModelForSequenceClassification, name_or_path, four_bit, **options)
    head = _check_score(model, name_or_path)
    missing = fit.missing
    if new_head is not None:
        missing = {name: why for name, why in missing.items() if not is_new_head(name) or why}
    check_whole(model, name_or_path, missing)
    if new_head == "zero" and len(missing) < len(fit.missing):
        torch.nn.init.zeros_(head.weight)
    return _to_train(model, gradient_checkpointing, dropout)


def _check_score(model: Any, name: str) -> torch.nn.Linear:
    """The layer that gives the score."""
    head = getattr(model, NEW_HEAD, None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise UserError(
            f"{name!r} is a {type(model).__name__}, which gives no single score: choose a "
            "sequence classifier with one label, as `rlcore train reward_model` makes"
        )
    return head


def _load_model(
    auto_class: Any, name_or_path: str, four_bit: torch.dtype | str | None, **options: Any
) -> tuple[Any, Fit]:
    """The model; of an adapter's directory the model it was trained on, with it merged in."""
    base = base_of_adapter(name_or_path)
    if four_bit is not None:
        options |= loading_in_4bit(name_or_path, options.get("trust_remote_code") or False)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with without_load_report():
        if base is None:
            model, info = from_pretrained(auto_class, "model", name_or_path, **options)
            check_finite(model, name_or_path)
            if four_bit is not None:
                made_trainable(model, model.dtype if four_bit == "auto" else four_bit)
            return model, fit_of(info)
        try:
            model, info = from_pretrained(auto_class, "model", base, **options)
        except UserError as error:
            raise UserError(
                f"the adapter in {name_or_path!r} needs the model it was trained on: {error}"
            ) from error
        fit, of_adapter = fit_of(info), fit_of(load_adapter(model, name_or_path))
    missing = {name: why for name, why in fit.missing.items() if not is_brought(model, name)}
    check_finite(model, name_or_path)
    return merge_adapter(model), Fit(missing | of_adapter.missing, of_adapter.unused)


def _to_train(model: Any, gradient_checkpointing: bool, dropout: bool) -> Any:
    if gradient_checkpointing:
        # transformers 5.2x renames it, 5.0 knows the old name only
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if not dropout:
        disable_dropout(model)
    return model.train()


def load_reference(
    name_or_path: Any, dtype: torch.dtype | str = torch.float32, **options: Any
) -> Any:
    """A frozen causal language model in evaluation mode; of one that is loaded already a copy.

    Raises:
        UserError: nothing loadable there.
    """
    if not isinstance(name_or_path, str):
        return copy.deepcopy(name_or_path).eval().requires_grad_(False)
    return load_policy(name_or_path, dtype, dropout=False, **options).eval().requires_grad_(False)
