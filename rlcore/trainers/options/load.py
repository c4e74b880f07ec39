"""The options of everything that loads a model, and their checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.errors import UserError, unknown_name

DTYPES = ("float32", "bfloat16", "auto")


@dataclass(kw_only=True)
class LoadConfig:
    """Loading."""

    # of the weights: float32, bfloat16, or auto, the checkpoint's own; they are saved in it
    dtype: str = "float32"
    attn_implementation: str | None = None  # eager, sdpa, flash_attention_2, ...; None: the model's
    trust_remote_code: bool = False  # run Python that comes with a model of the hub
    eos_token: str | None = None  # the tokenizer's token to end text with; None: its own eos
    chat_template: str | None = None  # a Jinja file, or its text; None: the tokenizer's own
    chat_template_kwargs: str | None = None  # JSON of the template's own variables

    @property
    def loading(self) -> dict[str, Any]:
        """What the functions that load models take."""
        return {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def reading(self) -> dict[str, Any]:
        """What the functions that load tokenizers take."""
        return {
            "eos_token": self.eos_token,
            "trust_remote_code": self.trust_remote_code,
            "chat_template": self.chat_template and _text_of(self.chat_template),
            "chat_template_kwargs": json.loads(self.chat_template_kwargs or "{}"),
        }


def check_load_config(config: LoadConfig) -> None:
    """Raise UserError for an option that cannot be meant."""
    if config.dtype not in DTYPES:
        raise unknown_name("dtype", config.dtype, DTYPES)
    if config.chat_template is not None:
        _text_of(config.chat_template)
    if config.chat_template_kwargs is not None:
        try:
            values = json.loads(config.chat_template_kwargs)
        except ValueError as error:
            raise UserError(f"chat_template_kwargs is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(
                'chat_template_kwargs must be a JSON object, as {"enable_thinking": false}, not '
                f"{config.chat_template_kwargs}"
            )


def _text_of(template: str) -> str:
    """The template itself, of a file or as it is given."""
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"chat_template {template!r} is neither a file ({error.strerror}) nor a template"
        ) from error
