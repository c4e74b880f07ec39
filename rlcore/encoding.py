"""Rows as token ids, and token ids as padded batches.

A prompt and its completion are tokenized apart, because that is how the policy meets them when it
generates; prompts are padded on the left, completions on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.rows import Rows


@dataclass(frozen=True)
class Example:
    """One tokenized sequence: what is given and what is learned."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, completions on the right: each row reads without a gap."""

    input_ids: torch.Tensor  # (B, P + C) int64
    attention_mask: torch.Tensor  # (B, P + C) int64
    mask: torch.Tensor  # (B, C) bool: completion tokens

    @property
    def target(self) -> torch.Tensor:
        return self.input_ids[:, -self.mask.shape[1] :]  # (B, C)

    def to(self, device: torch.device) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.mask)
        return Batch(*(tensor.to(device) for tensor in tensors))


def prompt_text(tokenizer: Any, prompt: str | list[dict]) -> str:
    """The prompt as one string: text stays, messages go through the tokenizer's chat template.

    Raises:
        UserError: messages, but a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return prompt
    return _templated(tokenizer, prompt, add_generation_prompt=True)


def _templated(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the data holds chat messages, but the tokenizer {tokenizer.name_or_path!r} has no "
            "chat template: give plain text, or set tokenizer.chat_template and save it"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | list[dict]], max_length: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt; of one that is too long, the last `max_length` tokens.

    Raises:
        UserError: a prompt without any token, which nothing could follow.
    """
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    # A chat template writes its own special tokens.
    plain = [isinstance(prompt, str) for prompt in prompts]
    encoded = _encode_mixed(tokenizer, texts, plain)
    for ids, text in zip(encoded, texts, strict=True):
        if not ids:
            raise UserError(f"the prompt {text!r} has no tokens; it needs at least one")
    return encoded if max_length is None else [ids[-max_length:] for ids in encoded]


def _encode_mixed(tokenizer: Any, texts: list[str], special: list[bool]) -> list[list[int]]:
    """Each text's ids, with the tokenizer's own special tokens where `special` says so."""
    encoded: list[list[int]] = [[] for _ in texts]
    for wanted in (True, False):
        rows = [index for index, value in enumerate(special) if value == wanted]
        if rows:
            batch = [texts[index] for index in rows]
            ids = tokenizer(batch, add_special_tokens=wanted, padding=False)["input_ids"]
            for index, row_ids in zip(rows, ids, strict=True):
                encoded[index] = row_ids
    return encoded


def encode_examples(tokenizer: Any, rows: Rows, max_length: int | None = None) -> list[Example]:
    """Rows to imitate, tokenized; rows that `max_length` leaves without a completion drop out.

    For {"prompt", "completion"} the loss is on the completion and its eos; for {"text"} and
    {"messages"} it is on everything after the first token.

    Raises:
        UserError: messages without a chat template, or no row is left.
    """
    has_prompt = "prompt" in rows.group
    encoded = encode_completions(
        tokenizer, rows.select_columns(rows.group), max_length, has_prompt=has_prompt
    )
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise UserError("no row of the dataset has a completion within max_length tokens")
    return examples


def encode_completions(
    tokenizer: Any, rows: Iterable[dict], max_length: int | None, *, has_prompt: bool = True
) -> list[Example | None]:
    """Rows of {"prompt", "completion"}, or without a prompt, tokenized; None without a completion.

    The first `max_length` tokens stay; a completion of text ends with eos, one of messages as the
    chat template ends it.
    """
    pairs = [_as_pair(tokenizer, row) for row in rows]
    prompts, completions, special = (list(column) for column in zip(*pairs, strict=True))
    prompt_ids = _encode_mixed(tokenizer, prompts, special)
    completion_ids = _encode_mixed(tokenizer, completions, [False] * len(pairs))
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    examples: list[Example | None] = []
    for prompt, completion, plain in zip(prompt_ids, completion_ids, special, strict=True):
        ids = (prompt + completion + (eos if plain else []))[:max_length]
        # Without a prompt the first token plays its part: nothing comes before it to predict it.
        length = len(prompt) if has_prompt else 1
        fits = 0 < length < len(ids)
        examples.append(Example(ids[:length], ids[length:]) if fits else None)
    return examples


def _as_pair(tokenizer: Any, row: dict) -> tuple[str, str, bool]:
    """(prompt text, completion text, whether special tokens are still to be added)."""
    if "text" in row:
        return row["text"], "", True
    if "messages" in row:
        return _templated(tokenizer, row["messages"]), "", False
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion, True
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError("'prompt' and 'completion' must both be text or both be messages")
    head = _templated(tokenizer, prompt, add_generation_prompt=True)
    whole = _templated(tokenizer, prompt + completion)
    if not whole.startswith(head):
        raise UserError(
            "the chat template writes the prompt differently once an answer follows, so prompt "
            "and completion cannot be told apart; give plain text instead"
        )
    return head, whole[len(head) :], False


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
    return Batch(torch.cat(ids, dim=1), torch.cat(attention, dim=1), attention[1].bool())
