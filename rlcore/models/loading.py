"""Models and tokenizers, loaded whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.data.chat import set_template_variables
from rlcore.errors import UserError, reason_of
from rlcore.functional.finite import first_not_finite
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

    tokenizer = _load(AutoTokenizer, "tokenizer", name_or_path, trust_remote_code=trust_remote_code)
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
    **options: Any,
) -> Any:
    """A causal language model to train; `dropout=False` switches its dropout off for good.

    An adapter's directory gives the model it was trained on, with the adapter merged into it; a
    model that is loaded already is taken as it is. `options` are attn_implementation and
    trust_remote_code, as transformers has them.

    Raises:
        UserError: nothing loadable there, weights that the checkpoint lacks, a reward model, or a
            model whose outputs depend on later tokens or on padding.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(name_or_path, str):
        model, name = _taken(name_or_path, "lm_head", "a causal language model", dtype), "model"
        return _policy(model, name, gradient_checkpointing, dropout)
    model, loaded = _load_model(AutoModelForCausalLM, name_or_path, dtype=dtype, **options)
    if any(_is_new_head(name) for name in loaded.unused):
        raise UserError(
            f"{name_or_path!r} is a reward or value model (it has a {NEW_HEAD} layer), not a "
            "language model: choose the one that it was trained from"
        )
    _check_whole(model, name_or_path, loaded.missing)
    if loaded.unused:
        logging.getLogger(__name__).warning(
            "%s holds %d weights that a %s does not use, %s first",
            name_or_path, len(loaded.unused), type(model).__name__, min(loaded.unused),
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


def _taken(model: Any, kind: str, what: str, dtype: torch.dtype | str) -> Any:
    """A model that a caller has loaded, itself, if it can be trained as one that is loaded here."""
    if has_adapter(model) or hasattr(model, "peft_type"):
        raise UserError("model has an adapter: give the model beneath it, and peft='lora'")
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise UserError(f"model must be a name or {what} of transformers, not a {_kind(model)}")
    if (kind == "lm_head") != (model.get_output_embeddings() is not None):
        raise UserError(f"model must be {what}, not a {_kind(model)}")
    if getattr(model, "is_quantized", False):
        raise UserError("model is quantized, and its weights are to be trained: load it otherwise")
    _check_finite(model, "model")
    # in float32 unless other is asked for: steps of 1e-6 would vanish in bfloat16
    return model if dtype == "auto" else model.to(getattr(torch, str(dtype).split(".")[-1]))


def _kind(model: Any) -> str:
    return type(model).__name__


def load_classifier(
    name_or_path: Any,
    dtype: torch.dtype | str = torch.float32,
    gradient_checkpointing: bool = False,
    dropout: bool = True,
    new_head: str | None = None,
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
        model = _taken(name_or_path, "score", "a sequence classifier", dtype)
        _check_score(model, type(model).__name__)
        return _to_train(model, gradient_checkpointing, dropout)
    model, loaded = _load_model(
        AutoModelForSequenceClassification, name_or_path, dtype=dtype, num_labels=1, **options
    )
    head = _check_score(model, name_or_path)
    missing = loaded.missing
    if new_head is not None:
        missing = {name: why for name, why in missing.items() if not _is_new_head(name) or why}
    _check_whole(model, name_or_path, missing)
    if new_head == "zero" and len(missing) < len(loaded.missing):
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


@dataclass(frozen=True)
class _Loaded:
    """How a checkpoint's weights and a model's fit each other."""

    missing: dict[str, str]  # drawn at random; why, where the checkpoint has one that does not fit
    unused: set[str]  # in the checkpoint alone


def _load_model(auto_class: Any, name_or_path: str, **options: Any) -> tuple[Any, _Loaded]:
    """The model; of an adapter's directory the model it was trained on, with it merged in."""
    base = base_of_adapter(name_or_path)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_load_report():
        if base is None:
            model, info = _load(auto_class, "model", name_or_path, **options)
            _check_finite(model, name_or_path)
            return model, _fit(info)
        try:
            model, info = _load(auto_class, "model", base, **options)
        except UserError as error:
            raise UserError(
                f"the adapter in {name_or_path!r} needs the model it was trained on: {error}"
            ) from error
        loaded, of_adapter = _fit(info), _fit(load_adapter(model, name_or_path))
    missing = {name: why for name, why in loaded.missing.items() if not is_brought(model, name)}
    _check_finite(model, name_or_path)
    return merge_adapter(model), _Loaded(missing | of_adapter.missing, of_adapter.unused)


def _fit(info: dict[str, Any]) -> _Loaded:
    """transformers' loading info in our words."""
    shapes = {
        name: f"{tuple(theirs)}, not {tuple(ours)}"
        for name, theirs, ours in info["mismatched_keys"]
    }
    return _Loaded(dict.fromkeys(info["missing_keys"], "") | shapes, set(info["unexpected_keys"]))


def _check_finite(model: Any, name_or_path: str) -> None:
    """Raise UserError where a weight is NaN or infinite: nothing could be trained from there."""
    found = first_not_finite(model.named_parameters())
    if found is not None:
        raise UserError(
            f"{name_or_path!r} holds a broken model: its weight {found[0]} has a {found[1]}"
        )


def _is_new_head(name: str) -> bool:
    return name.split(".")[0] == NEW_HEAD


def _check_whole(model: Any, name_or_path: str, missing: dict[str, str]) -> None:
    """Raise UserError where weights would be those that were drawn just now."""
    if not missing:
        return
    names = [f"{name} ({why})" if why else name for name, why in sorted(missing.items())]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(
        f"{name_or_path!r} does not hold all weights of a {type(model).__name__}: it lacks "
        f"{', '.join(names[:3])}{rest}, which would be random; choose a checkpoint that has them"
    )


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


def _load(auto_class: Any, what: str, name_or_path: str, **options: Any) -> Any:
    path = Path(name_or_path)
    # A path that is not there would be asked for on the hub, with a message about repositories.
    looks_local = path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if path.is_file():
        raise UserError(f"no {what} at {name_or_path!r}: it is a file, not a model's directory")
    if looks_local and not path.is_dir():
        raise UserError(f"no {what} at {name_or_path!r}: there is no such directory")
    try:
        with no_progress_bars():
            given = {name: value for name, value in options.items() if value is not None}
            return auto_class.from_pretrained(name_or_path, **{"trust_remote_code": False} | given)
    except Exception as error:
        # Everything from a missing file to a broken header: transformers knows many error types.
        reason = _why_not_loaded(path, error)
        raise UserError(f"cannot load a {what} from {name_or_path!r}: {reason}") from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    """What the user can see to; without a configuration transformers speaks of anything else."""
    if not path.is_dir():
        return f"there is no such directory here, and as a name on the hub: {reason_of(error)}"
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "the directory has no config.json, so it holds no model"
    return reason_of(error)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers without its bars, which would tear a run's own display."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers without its table of weights that are missing or left over, seen to here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
