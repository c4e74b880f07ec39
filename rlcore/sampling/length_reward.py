"""Rewards of a completion's tokens alone: how many there are, and how often they repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TokenReward = Callable[..., list[float]]
LENGTH = 512  # of a completion, where no trainer says how long one may be
NGRAM = 3


def soft_overlong_within(max_length: int, cache: int | None = None) -> TokenReward:
    """The soft overlong punishment of completions of at most `max_length` tokens.

    DAPO (arXiv:2503.14476) eq. 13: 0 up to max_length - cache tokens, from there on falling in a
    line to -1 at max_length, and -1 beyond.

    Args:
        cache: tokens over which it falls; None: a fifth of max_length, as DAPO's 4096 of 20480.
    """
    cache = max(max_length // 5, 1) if cache is None else cache

    def soft_overlong_punishment(
        prompts: list, completions: list, completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        over = (len(ids) - (max_length - cache) for ids in completion_ids)
        return [max(min(-tokens / cache, 0.0), -1.0) for tokens in over]

    return soft_overlong_punishment


def repetition_of(ngram_size: int) -> TokenReward:
    """Minus the share of a completion's n-grams of tokens that were there before.

    arXiv:2502.03373, appendix C.2: unique n-grams / n-grams - 1, which is 0 where none is repeated
    or there are fewer than `ngram_size` tokens, and above -1; a reward weight scales it.
    """

    def repetition_penalty(
        prompts: list, completions: list, completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        return [_repeated(ids, ngram_size) for ids in completion_ids]

    return repetition_penalty


def _repeated(ids: list[int], size: int) -> float:
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


soft_overlong_punishment = soft_overlong_within(LENGTH)
repetition_penalty = repetition_of(NGRAM)
