"""Rows as token ids, and token ids as padded batches.

A completion's tokens follow its prompt's, because that is how the policy meets them when it
generates; prompts are padded on the left, completions on the right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data.chat import answer_text, notes_of_tools, prompt_text, rendered
from rlcore.data.ends import end_ids, until_end
from rlcore.data.loaded import Loaded, Tally, encoded, measured
from rlcore.data.rows import Rows
from rlcore.data.tokens import following_ids, opened_ids, plain_ids
from rlcore.data.turns import assistant_ids
from rlcore.errors import UserError


@dataclass(frozen=True)
class Example:
    """One tokenized sequence: what is given and what is learned."""

    prompt: list[int]
    completion: list[int]
    learned: list[bool] | None = None  # which of the completion's tokens are; None: all

    @property
    def num_learned(self) -> int:
        """How many tokens have a loss."""
        return len(self.completion) if self.learned is None else sum(self.learned)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, completions on the right: each row reads without a gap."""

    input_ids: torch.Tensor  # (B, P + C) int64
    attention_mask: torch.Tensor  # (B, P + C) int64
    mask: torch.Tensor  # (B, C) bool: completion tokens that are learned

    @property
    def target(self) -> torch.Tensor:
        return self.input_ids[:, -self.mask.shape[1] :]  # (B, C)

    def to(self, device: torch.device) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.mask)
        return Batch(*(tensor.to(device) for tensor in tensors))


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | list[dict] | list[int]], max_length: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt; of one that is too long, the last `max_length` tokens.

    A prompt of token ids, which all of them are then, is one already.

    Raises:
        UserError: a prompt without any token, which nothing could follow.
    """
    if is_encoded(prompts[0]):
        return [prompt[-(max_length or len(prompt)) :] for prompt in prompts]
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    encoded = _head_ids(tokenizer, texts, [isinstance(prompt, str) for prompt in prompts])
    for ids, text in zip(encoded, texts, strict=True):
        if not ids:
            raise UserError(f"the prompt {text!r} has no tokens; it needs at least one")
    return encoded if max_length is None else [ids[-max_length:] for ids in encoded]


def is_encoded(prompt: str | list[dict] | list[int]) -> bool:
    """Whether a prompt is token ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _head_ids(tokenizer: Any, texts: Sequence[str], is_text: Sequence[bool]) -> list[list[int]]:
    """Ids of what a sequence begins with; a chat template has written its own special tokens."""
    rows = list(zip(texts, is_text, strict=True))
    opened = iter(opened_ids(tokenizer, [text for text, plain in rows if plain]))
    templated = iter(plain_ids(tokenizer, [text for text, plain in rows if not plain]))
    return [next(opened if plain else templated) for _, plain in rows]


def encode_examples(
    tokenizer: Any,
    rows: Rows,
    max_length: int | None = None,
    *,
    assistant_only: bool = False,
    may_be_empty: bool = False,
) -> Loaded:
    """Rows to imitate, tokenized, as Examples; rows that have or keep no completion are left out.

    For {"prompt", "completion"} the loss is on the completion and its eos; for {"text"} and
    {"messages"} it is on everything after the first token.

    Args:
        assistant_only: of {"messages"} the loss is on what the assistant writes.
        may_be_empty: no row need be left.

    Raises:
        UserError: a row that cannot be encoded, which is named, or no row is left.
    """
    encode, nothing = _how_to_encode(tokenizer, rows, assistant_only)
    examples, places, tally = Loaded(), [], Tally(rows)
    for row, example in enumerate(encoded(rows.select_columns(rows.group), encode)):
        if example is None:
            tally.add(f"are left out: {nothing}", row)
            continue
        short = shortened(example, max_length)
        if short is None:
            tally.add(f"are left out: max_length {max_length} leaves them no completion", row)
            continue
        if len(short) < len(example):
            tally.add(f"lose their end to max_length {max_length}", row)
        examples.append(short)
        places.append(row)
    if not examples and not may_be_empty:
        raise UserError(f"no row is left: {'; '.join(tally.notes)}")
    examples.notes = rows.notes + notes_of_tools(tokenizer, rows) + tally.notes
    ids = (example.prompt + example.completion for example in examples)
    examples.extent = measured(rows, zip(places, ids, strict=True))
    return examples


def _how_to_encode(
    tokenizer: Any, rows: Rows, assistant_only: bool
) -> tuple[Callable[[list[dict]], list[Example | None]], str]:
    """What makes Examples of rows, and what to say of a row that it makes none of."""
    if not assistant_only:
        has_prompt = "prompt" in rows.group
        how = functools.partial(encode_completions, tokenizer, has_prompt=has_prompt)
        return how, "without a first token there is nothing to learn from"
    if "messages" not in rows.group:
        raise UserError(
            "assistant_only_loss is for rows of 'messages', and these have "
            f"{' and '.join(map(repr, rows.group))}: leave it out"
        )
    return functools.partial(_encode_answers, tokenizer), "no token of theirs is the assistant's"


def _encode_answers(tokenizer: Any, rows: Sequence[dict]) -> list[Example | None]:
    """Rows of {"messages"}, from the assistant's first token to its last; None without one."""
    examples = []
    for ids, learned in assistant_ids(tokenizer, [row["messages"] for row in rows]):
        # nothing comes before the first token to predict it
        start = max(learned.index(True), 1) if True in learned else len(ids)
        examples.append(_up_to_learned(ids[:start], ids[start:], learned[start:]))
    return examples


def _up_to_learned(prompt: list[int], completion: list[int], learned: list[bool]) -> Example | None:
    """Without the tokens behind the last that is learned; None where none is."""
    length = max((place + 1 for place, counts in enumerate(learned) if counts), default=0)
    return Example(prompt, completion[:length], learned[:length]) if length else None


def shortened(example: Example, max_length: int | None) -> Example | None:
    """Its first `max_length` tokens, None where none of the completion is among them."""
    if max_length is None or len(example) <= max_length:
        return example
    length = max(max_length - len(example.prompt), 0)
    kept = example.completion[:length]
    if example.learned is not None:
        return _up_to_learned(example.prompt, kept, example.learned[:length])
    return Example(example.prompt, kept) if kept else None


def encode_completions(
    tokenizer: Any, rows: Iterable[dict], *, has_prompt: bool = True
) -> list[Example | None]:
    """Rows of {"prompt", "completion"}, or without a prompt, tokenized; None without a completion.

    A completion of text ends with eos, one of messages as the chat template ends it.
    """
    pairs = [_as_pair(tokenizer, row) for row in rows]
    heads, tails, is_text = (list(column) for column in zip(*pairs, strict=True))
    prompts = _head_ids(tokenizer, heads, is_text)
    completions = [[]] * len(pairs)
    if has_prompt:
        wholes = [head + tail for head, tail in zip(heads, tails, strict=True)]
        wholes = _head_ids(tokenizer, wholes, is_text)
        rows = zip(prompts, wholes, tails, strict=True)
        completions = [following_ids(tokenizer, *row) for row in rows]
    ends = end_ids(tokenizer)
    examples: list[Example | None] = []
    for prompt, completion, plain in zip(prompts, completions, is_text, strict=True):
        ids = prompt + completion
        if plain and tokenizer.eos_token_id is not None and not set(ids[-1:]) & ends:
            ids = [*ids, tokenizer.eos_token_id]
        # Without a prompt the first token plays its part: nothing comes before it to predict it.
        length = len(prompt) if has_prompt else 1
        fits = 0 < length < len(ids)
        examples.append(Example(ids[:length], ids[length:]) if fits else None)
    return examples


def up_to_end(tokenizer: Any, example: Example) -> Example:
    """Without what a chat template writes after the end of the last turn: see `until_end`."""
    return Example(example.prompt, until_end(tokenizer, example.completion))


def _as_pair(tokenizer: Any, row: dict) -> tuple[str, str, bool]:
    """(prompt text, completion text, whether special tokens are still to be added)."""
    if "text" in row:
        return row["text"], "", True
    if "messages" in row:
        return rendered(tokenizer, row["messages"]), "", False
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError("'prompt' and 'completion' must both be text or both be messages")
    if isinstance(prompt, str):
        return prompt, completion, True
    return *answer_text(tokenizer, prompt, completion), False


def pad(sequences: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """(B, longest) int64, filled with `value` on the "left" or on the "right"."""
    width = max(map(len, sequences))
    gaps = [[value] * (width - len(sequence)) for sequence in sequences]
    pairs = zip(gaps, sequences, strict=True)
    rows = [[*gap, *ids] if side == "left" else [*ids, *gap] for gap, ids in pairs]
    return torch.tensor(rows, dtype=torch.int64)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples as one padded batch, as wide as its longest prompt and its longest completion."""
    prompts = [example.prompt for example in examples]
    completions = [example.completion for example in examples]
    attention = [
        pad([[1] * len(prompt) for prompt in prompts], 0, "left"),
        pad([[1] * len(completion) for completion in completions], 0, "right"),
    ]
    ids = [pad(prompts, pad_token_id, "left"), pad(completions, pad_token_id, "right")]
    learned = [example.learned or [True] * len(example.completion) for example in examples]
    mask = pad(learned, 0, "right").bool()
    return Batch(torch.cat(ids, dim=1), torch.cat(attention, dim=1), mask)
