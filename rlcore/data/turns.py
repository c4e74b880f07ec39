"""Which part of a conversation the assistant writes.

A template marks it between {% generation %} and {% endgeneration %}. Where it marks nothing, an
answer is what the template writes beyond the text that asks for it:

    answer i = whole[len(text of messages before i, and the assistant's turn begun)
                     : len(text of messages up to i)]

without what follows the end of its turn, which no policy gets to. Thoughts that a template leaves
out of all turns but the last are learned in that one.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any

from rlcore.data.chat import marked, rendered
from rlcore.data.ends import until_end
from rlcore.data.tokens import following_ids, plain_ids
from rlcore.errors import UserError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_ids(
    tokenizer: Any, conversations: Sequence[list[dict]]
) -> list[tuple[list[int], list[bool]]]:
    """Each conversation's token ids, and which of them are the assistant's.

    Raises:
        UserError: no conversation, or one whose answers cannot be told from the rest.
    """
    for messages in conversations:
        if isinstance(messages, str):
            raise UserError(
                f"assistant_only_loss needs a list of messages in 'messages', not {messages!r:.80}"
            )
    marks = has_marks(tokenizer)
    pieces = [
        _pieces(*(marked if marks else _told_apart)(tokenizer, messages))
        for messages in conversations
    ]
    return [_ids(tokenizer, each, to_end=not marks) for each in pieces]


def has_marks(tokenizer: Any) -> bool:
    """Whether the chat template marks what the assistant writes."""
    return bool(_MARK.search(str(tokenizer.chat_template)))


def _told_apart(tokenizer: Any, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and where in it each of the assistant's turns starts and stops."""
    whole, spans = rendered(tokenizer, messages), []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = rendered(tokenizer, messages[: place + 1])
        head = _asked(tokenizer, messages[:place], turn)
        # some templates close a whole text with eos
        forms = (turn, turn.rstrip().removesuffix(tokenizer.eos_token or ""))
        span = head and next(filter(None, (_span(whole, head, f, message) for f in forms)), None)
        if span is None:
            raise UserError(
                "assistant_only_loss: the chat template writes the conversation differently around "
                f"message {place + 1}, so what the assistant says there cannot be told apart: give "
                "a --chat-template with {% generation %} around it"
            )
        spans.append(span)
    return whole, spans


def _span(whole: str, head: str, turn: str, message: dict) -> tuple[int, int] | None:
    """Where in `whole` the last message of `turn` stands, which `head` asks for; None: unclear.

    Of a message that others follow a template may leave out how its turn began, its thoughts.
    """
    if whole.startswith(turn) and turn.startswith(head):
        return len(head), len(turn)
    start = sum(itertools.takewhile(bool, map(operator.eq, head, whole)))
    content = message["content"]
    words = content.strip() if isinstance(content, str) else ""
    places = [match.start() for match in re.finditer(re.escape(words), turn)] if words else []
    for place in places:
        if whole.startswith(turn[place:], start):
            return start, start + len(turn) - place
    return None


def _asked(tokenizer: Any, before: list[dict], turn: str) -> str | None:
    """The text that asks for the last message of `turn`; None where nothing is known to."""
    if before:
        return rendered(tokenizer, before, add_generation_prompt=True)
    # no template need write an empty conversation: what opens an answer is read off another
    question = [{"role": "user", "content": "?"}]
    asking = rendered(tokenizer, question, add_generation_prompt=True)
    opening = asking.removeprefix(rendered(tokenizer, question))
    start, found, _ = turn.partition(opening) if opening else ("", "", "")
    return start + found if found else None


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text cut at the spans; the last piece of the assistant's is the last one."""
    pieces, before = [], 0
    for start, stop in spans:
        pieces += [(text[before:start], False), (text[start:stop], True)]
        before = stop
    return [(piece, mine) for piece, mine in pieces if piece]


def _ids(
    tokenizer: Any, pieces: Sequence[tuple[str, bool]], *, to_end: bool
) -> tuple[list[int], list[bool]]:
    """The pieces' ids, each behind those before it as a policy would come to it."""
    texts = ["".join(piece for piece, _ in pieces[: stop + 1]) for stop in range(len(pieces))]
    ids: list[int] = []
    learned: list[bool] = []
    before: list[int] = []
    for (piece, mine), whole in zip(pieces, plain_ids(tokenizer, texts), strict=True):
        new = following_ids(tokenizer, before, whole, piece)
        count = len(until_end(tokenizer, new) if to_end else new) if mine else 0
        ids += new
        learned += [place < count for place in range(len(new))]
        before = whole
    return ids, learned
