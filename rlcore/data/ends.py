"""The tokens that end a completion: of text, of an assistant's turn, and as the model has them.

A base model's tokenizer often ends text with one token and its chat template a turn with another;
whoever stops at the first alone never stops in a chat.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from rlcore.data.chat import rendered

ANSWER = "(answer)"


def end_tokens(model: Any, tokenizer: Any) -> torch.Tensor:
    """(E,) int64: the tokenizer's ends and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    known = {*configured, *end_ids(tokenizer)} - {None}
    return torch.tensor(sorted(known), dtype=torch.int64)


def set_end_tokens(model: Any, tokenizer: Any) -> None:
    """Note them in the model's generation config, which is saved beside it, where it has one."""
    config = getattr(model, "generation_config", None)
    ends = end_tokens(model, tokenizer).tolist()
    if config is not None and ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def end_ids(tokenizer: Any) -> set[int]:
    """The tokenizer's eos, and what its chat template ends a turn with."""
    return {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}


def completion_end(tokenizer: Any, is_text: bool) -> int | None:
    """The token that a completion is learned to end with: of text eos, of messages their turn's."""
    end = None if is_text else end_of_turn(tokenizer)
    return tokenizer.eos_token_id if end is None else end


def until_end(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Without what a chat template writes after the end of a last turn, which no policy gets to.

    That is blanks, and perhaps an end of the whole text.
    """
    ends = end_ids(tokenizer)
    closing = itertools.takewhile(
        lambda place: ids[place] in ends or not tokenizer.decode(ids[place]).strip(),
        reversed(range(len(ids))),
    )
    length = min((place + 1 for place in closing if ids[place] in ends), default=len(ids))
    return list(ids[:length])


def missing_end(tokenizer: Any) -> str | None:
    """What to say of a chat template whose turns no token ends; None where one does."""
    if tokenizer.chat_template is None or end_of_turn(tokenizer) is not None:
        return None
    return (
        "the chat template ends an assistant's turn with no token of its own, so completions of "
        f"messages stop at {tokenizer.eos_token!r} alone, which they do not learn"
    )


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template ends an assistant's turn with, None where there is none."""
    if tokenizer.chat_template is None:
        return None
    return _end_of_turn(
        tokenizer, str(tokenizer.chat_template), tokenizer.eos_token, len(tokenizer)
    )


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, *state: Any) -> int | None:
    """The same, asked once as long as the tokenizer's `state` is what it was."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = rendered(tokenizer, turn)
    except Exception:
        # a template may refuse this conversation by any error; it will speak of the data's itself
        return None
    _, found, closing = text.rpartition(ANSWER)
    # vocabularies hold blanks as added tokens too, which end nothing
    ends = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if str(token).strip(" ▁\t\r\n") and str(token) in closing
    }
    if not found or not ends:
        return None
    # of two at one place the longer, as the tokenizer reads it
    return ends[min(ends, key=lambda token: (closing.index(token), -len(token)))]
