"""Completions sampled from a policy, many at once.

Each prompt goes through the model once and its cache is repeated for its completions; prompts are
padded on the left, positions count attended tokens only, and rows that ended leave the batch
once they are half of it. The same seed gives the same completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data.chat import goes_on, prompt_text
from rlcore.data.encoding import encode_prompts, is_encoded, pad
from rlcore.data.ends import end_tokens
from rlcore.data.tokens import begins_anew, mid_text
from rlcore.errors import UserError, reason_of
from rlcore.models.forward import (
    completion_logits,
    evaluating,
    forward_options,
    position_ids,
    probe_rows,
    same_logits,
    unwrapped,
)
from rlcore.sampling.choosing import Chooser, likeliest, sampled

# what models call the states that they go on from
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Rollout:
    """N = prompts x generations rows, the generations of a prompt next to each other."""

    input_ids: torch.Tensor  # (N, P + C) int64: left-padded prompt, right-padded completion
    attention_mask: torch.Tensor  # (N, P + C) int64
    prompt_length: int  # P
    completion_ids: torch.Tensor  # (N, C) int64
    completion_mask: torch.Tensor  # (N, C) bool: up to and with eos
    completions: list[str]  # N texts without special tokens and what ended them
    truncated: torch.Tensor  # (N,) bool: max_new_tokens came before eos
    # (N, C) float32: of the distribution that each token was drawn from, tempered and truncated as
    # it was; of greedy ones the model's own; 0 where masked
    sampling_logp: torch.Tensor


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict] | list[int]],
    *,
    num_generations: int = 1,
    max_new_tokens: int,
    max_prompt_length: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    seed: int = 0,
    full_length: bool = False,
) -> Rollout:
    """Sample `num_generations` completions of each prompt.

    Args:
        prompts: texts or chat messages, or token ids, all of them; of a longer one the last
            `max_prompt_length` tokens stay.
        temperature, top_p, top_k: as in transformers; 1.0 and 0 switch the truncations off.
        greedy: take the likeliest token instead; the sampling options have no part in it.
        seed: of this call's own random generator; the global one is not touched.
        full_length: run every row to `max_new_tokens` forward passes, finished or not: sharded
            models need equally many on every process.

    Returns:
        A Rollout on the model's device. C is the longest completion's length.

    Raises:
        UserError: a prompt without tokens, or messages without a chat template.
        ValueError: a sampling option out of its range.
        FloatingPointError: the logits that a token was chosen by, over temperature, are NaN or
            infinite; at the end, so that every process has made its forward passes.
    """
    device = next(model.parameters()).device
    encoded = encode_prompts(tokenizer, prompts, max_prompt_length)
    prompt_ids = pad(encoded, tokenizer.pad_token_id, "left").to(device)  # (B, P)
    prompt_mask = pad([[1] * len(ids) for ids in encoded], 0, "left").to(device)
    generator = torch.Generator(device).manual_seed(seed)
    choose = likeliest if greedy else sampled(temperature, top_p, top_k, generator)
    eos = end_tokens(model, tokenizer).to(device)
    with torch.no_grad(), evaluating(model):
        decoder = _Decoder(model, prompt_ids, prompt_mask, num_generations)
        ids, logp, broken = _decode(decoder, choose, eos, max_new_tokens, not full_length)
    if broken:
        raise FloatingPointError(f"{type(model).__name__} gives logits that are NaN or infinite")
    return as_rollout(tokenizer, prompts, encoded, ids, logp, eos)


def as_rollout(
    tokenizer: Any,
    prompts: Sequence[str | list[dict] | list[int]],
    encoded: Sequence[Sequence[int]],
    ids: torch.Tensor,
    logp: torch.Tensor,
    eos: torch.Tensor,
) -> Rollout:
    """The Rollout of sampled tokens, on their device.

    Args:
        prompts, encoded: B prompts as they were given, and as token ids.
        ids: (N, C) int64, the generations of a prompt next to each other; of each row what comes
            up to its first end token counts.
        logp: (N, C), what each token was drawn with.
        eos: (E,) int64, the end tokens.
    """
    repeats = len(ids) // len(encoded)
    prompt_ids = pad(encoded, tokenizer.pad_token_id, "left").to(ids.device)  # (B, P)
    prompt_mask = pad([[1] * len(row) for row in encoded], 0, "left").to(ids.device)
    prompt_ids, prompt_mask = (x.repeat_interleave(repeats, 0) for x in (prompt_ids, prompt_mask))
    mask, truncated = _up_to_end(ids, eos)
    completion_ids = torch.where(mask, ids, tokenizer.pad_token_id)
    spoken = mask & ~torch.isin(ids, eos)
    return Rollout(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
        prompt_length=prompt_ids.shape[1],
        completion_ids=completion_ids,
        completion_mask=mask,
        completions=_texts(tokenizer, prompts, completion_ids, spoken),
        truncated=truncated,
        sampling_logp=torch.where(mask, logp.float(), 0.0),
    )


class _Decoder:
    """A model, its cache, and the logits for each row's next token."""

    def __init__(
        self, model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, repeats: int
    ):
        self.model = model
        self.options = forward_options(model)
        self.cache_name = next((name for name in CACHES if name in self.options), CACHES[0])
        self.mask = prompt_mask
        self.cache = None
        self._forward(prompt_ids, position_ids(prompt_mask))
        if repeats > 1:
            self.keep(
                torch.arange(len(prompt_ids), device=self.mask.device).repeat_interleave(repeats)
            )

    def advance(self, token: torch.Tensor) -> None:
        """Append one token (N,) to every row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._forward(token[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with the rows in `rows` (M,) int64 alone, each as often as it is there."""
        # the one way that every kind of layer has, those with recurrent states too
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.logits = self.logits[rows]  # (M, V)

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        # states alone look back at no mask: theirs is of the new tokens
        is_state = self.cache_name != CACHES[0]
        arguments = {
            "attention_mask": self.mask[:, -input_ids.shape[1] :] if is_state else self.mask,
            "position_ids": positions,
            self.cache_name: self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        arguments = {name: value for name, value in arguments.items() if name in self.options}
        output = self.model(input_ids, **arguments)
        self.cache = getattr(output, self.cache_name, None)
        if self.cache is None:
            name = type(unwrapped(self.model)).__name__
            raise UserError(f"{name} gives no cache of what it has read, and sampling needs one")
        self.logits = output.logits[:, -1]


@torch.no_grad()
def check_sampling(model: Any) -> None:
    """Raise UserError where completions cannot be sampled from the model, row by row, exactly.

    Two prompts, one of them padded, are repeated, go on, lose rows and go on again; the logits must
    then be those of a pass without a cache.
    """
    kind = type(unwrapped(model)).__name__
    ids, mask = (rows[:, :6] for rows in probe_rows(model))
    more = ids[:, 1:5].reshape(2, 4)  # (steps, rows)
    kept = torch.tensor([1, 2], device=ids.device)  # a repeat of each prompt
    try:
        with evaluating(model):
            decoder = _Decoder(model, ids, mask, 2)
            decoder.advance(more[0])
            decoder.keep(kept)
            decoder.advance(more[1, kept])
            # the last column is there to be predicted
            whole = torch.cat([ids, more[:, kept].T, ids[:, :1]], dim=1)
            expected = completion_logits(model, whole, torch.cat([mask, mask[:, -3:]], 1), 1)
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise UserError(
            f"completions cannot be sampled from a {kind}, whose cache does not go with repeated "
            f"rows: {reason}"
        ) from error
    if not same_logits(decoder.logits, expected[:, 0]):
        raise UserError(
            f"completions cannot be sampled from a {kind}: its cache gives other logits than a "
            "pass without it; choose another architecture"
        )


def _decode(
    decoder: _Decoder, choose: Chooser, eos: torch.Tensor, max_new_tokens: int, drop_ended: bool
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(ids, logp, broken) of the rows that are decoded.

    ids (N, C) int64 are their tokens, logp (N, C) float32 what these were drawn with, both
    undefined behind an end token; broken: some token was chosen from logits that were not fit.
    """
    count = len(decoder.mask)
    rows = torch.arange(count, device=eos.device)  # the rows still in the decoder
    ended = torch.zeros(count, dtype=torch.bool, device=eos.device)
    columns: list[torch.Tensor] = []
    logps: list[torch.Tensor] = []
    broken = torch.zeros((), dtype=torch.bool, device=eos.device)
    while True:
        token, logp, unfit = choose(decoder.logits)
        broken |= unfit.any()
        columns.append(torch.zeros(count, dtype=torch.int64, device=eos.device))
        columns[-1][rows] = token
        logps.append(torch.zeros(count, device=eos.device))
        logps[-1][rows] = logp
        ended = ended | torch.isin(token, eos)
        ended_rows = int(ended.sum()) if drop_ended else 0
        if len(columns) == max_new_tokens or (drop_ended and ended_rows == len(ended)):
            break
        if 2 * ended_rows >= len(ended) > 1:
            alive = (~ended).nonzero().squeeze(1)
            decoder.keep(alive)
            rows, ended, token = rows[alive], ended[alive], token[alive]
        decoder.advance(token)
    return torch.stack(columns, dim=1), torch.stack(logps, dim=1), bool(broken)


def _up_to_end(ids: torch.Tensor, eos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask (N, C): up to and with the first end token, truncated (N,): there is none)."""
    is_end = torch.isin(ids, eos)
    ends_before = is_end.cumsum(1) - is_end.long()
    return ends_before == 0, ~is_end.any(1)


def _texts(
    tokenizer: Any, prompts: Sequence[str | list], ids: torch.Tensor, mask: torch.Tensor
) -> list[str]:
    """The counted tokens of (N, C) as text behind their prompts, special tokens left out."""
    rows = [row[counts].tolist() for row, counts in zip(ids.cpu(), mask.cpu(), strict=True)]
    generations = len(rows) // len(prompts)
    texts: list[str] = []
    for number, prompt in enumerate(prompts):
        # a turn's own text begins without the blank that some tokenizers put before every text
        middle = not is_encoded(prompt) and goes_on(prompt)
        middle = middle and not begins_anew(tokenizer, prompt_text(tokenizer, prompt))
        texts += (mid_text(tokenizer) if middle else tokenizer).batch_decode(
            rows[number * generations : (number + 1) * generations],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
    return texts
