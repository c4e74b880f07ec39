"""Text as token ids and back, wherever in a sequence the text stands.

Many tokenizers take every text for a beginning: they open it with bos or close it with eos, and
write a blank before its first word (sentencepiece's dummy prefix). None of that belongs into what
follows a prompt:

    ids(prompt + completion) = ids(prompt) + following ids(completion)

"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from rlcore.errors import UserError

SENTENCEPIECE_BLANK = "▁"


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's ids; special tokens where the text writes them itself, and no others."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, padding=False)["input_ids"]


def opened_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's ids after the special tokens that open a sequence, which then come once.

    Those that the tokenizer would close it with are left out: the sequence goes on.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=True, padding=False, return_special_tokens_mask=True
    )
    rows = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [_opened(ids, added, tokenizer.eos_token_id) for ids, added in rows]


def _opened(ids: list[int], added: list[int], eos_token_id: int | None) -> list[int]:
    if 0 not in added:
        # an empty text: of what is added only a last eos is known to close it
        return ids[:-1] if ids and ids[-1] == eos_token_id else ids
    start, end = added.index(0), len(added) - added[::-1].index(0)
    opening, body = ids[:start], ids[start:end]
    return body if body[:start] == opening else opening + body


def following_ids(tokenizer: Any, head: list[int], whole: list[int], tail: str) -> list[int]:
    """The tail's ids behind the head's: as in the whole text, where that has the head's too.

    Elsewhere a token of the whole text reaches over the boundary. Whoever reads the head alone
    cannot come to it, so the tail is then read by itself, as the middle of a text, as far as the
    first special token in it.
    """
    if whole[: len(head)] == head:
        return whole[len(head) :]
    special = _any_special(tokenizer, len(tokenizer)).search(tail)
    place = special.start() if special else len(tail)
    (middle,) = plain_ids(mid_text(tokenizer), [tail[:place]])
    (rest,) = plain_ids(tokenizer, [tail[place:]])
    return middle + rest


@functools.lru_cache(maxsize=8)
def _any_special(tokenizer: Any, size: int) -> re.Pattern:
    added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    # of none, what is nowhere
    return re.compile("|".join(map(re.escape, added)) or "(?!)")


def begins_anew(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer takes what follows `text` for another beginning, dummy prefix and all.

    Some do so behind every special token.
    """
    if mid_text(tokenizer) is tokenizer:
        return False
    before, whole, alone = plain_ids(tokenizer, [text, f"{text}a", "a"])
    return whole == before + alone


def mid_text(tokenizer: Any) -> Any:
    """The tokenizer for the middle of a text: without a blank of its own, written or taken off.

    Raises:
        UserError: a tokenizer without a Rust backend that writes such a blank.
    """
    return _mid_text(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _mid_text(tokenizer: Any, size: int) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        first = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, ["a"])[0])[0]
        if first.startswith(SENTENCEPIECE_BLANK):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) writes a "
                "blank before every text, completions too: save it as a fast one (tokenizer.json)"
            )
        return tokenizer
    written = json.loads(backend.to_str())
    parts = {name: written[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    inner = {name: _without_beginning(part) for name, part in parts.items()}
    if inner == parts:
        return tokenizer
    middle = copy.copy(tokenizer)
    middle._tokenizer = type(backend).from_str(json.dumps(written | inner))
    return middle


def _without_beginning(part: Any) -> Any:
    """A part of a tokenizer.json that does nothing about the beginning of a text."""
    if isinstance(part, list):
        return [_without_beginning(each) for each in part if each.get("type") != "Prepend"]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changes = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        # of a decoder, then of a normalizer
        "Strip": {"start": 0} if "start" in part else {"strip_left": False},
    }
    inner = {name: _without_beginning(value) for name, value in part.items()}
    return inner | changes.get(part.get("type"), {})
