"""How the next token is chosen from a row's logits, and with what log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# from logits (N, V) to a token a row (N,) int64, what it was drawn with (N,) float32, and whether
# its logits were not fit to choose by (N,) bool
Chooser = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Chooser of the likeliest token, with its log-probability under the logits as they are."""
    # a NaN counts as the largest
    largest, token = logits.max(-1)
    return token, largest.float() - logits.float().logsumexp(-1), ~largest.isfinite()


def sampled(temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Chooser:
    """A Chooser that samples.

    Raises:
        ValueError: an option out of its range.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}; greedy=True is its 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, not {top_k}")

    def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities = (logits.float() / temperature).softmax(-1)
        # one NaN or +inf among the logits makes a NaN of every probability
        unfit = probabilities[:, 0].isnan()
        probabilities.masked_fill_(unfit[:, None], 1.0)
        mass = 1.0
        if top_k or top_p < 1:
            probabilities = truncated(probabilities, top_p, top_k)
            mass = probabilities.sum(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
        return token.squeeze(1), (probabilities.gather(1, token).squeeze(1) / mass).log(), unfit

    return choose


def truncated(probabilities: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The `top_k` likeliest tokens, and of these the fewest that hold `top_p` of their mass."""
    count = min(top_k, probabilities.shape[-1]) if top_k else probabilities.shape[-1]
    kept, index = probabilities.topk(count)
    mass_before = kept.cumsum(-1) - kept
    # The likeliest token stays at any top_p: nothing comes before it.
    kept = kept.masked_fill(mass_before >= top_p * kept.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, index, kept)
