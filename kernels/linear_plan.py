"""How a fused head goes through its tokens: chunk sizes, passes, operations, peak memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import statistics_dtype
from .linear_products import SLICE_BYTES

# Bytes of a chunk's logits: on a GPU large enough that the traffic of dW is amortised; on a CPU
# what keeps the row work near the cache.
DEFAULT_CHUNK_BYTES = {"cpu": 64 << 20}
DEFAULT_CHUNK_BYTES_ELSEWHERE = 768 << 20

# strategy -> what it does, as a printed plan says
STRATEGIES = {
    "one-pass": "the loss knows its derivative in the chunk: the gradient is made at once",
    "kept-logits": "all logits fit chunk_bytes twice: kept for the backward, nothing recomputed",
    "unit-gradient": "frozen head: the forward stores unit gradients, the backward scales rows",
    "recompute": "the backward makes each chunk's logits again",
    "forward": "no input needs a gradient",
}


@dataclass(frozen=True)
class LinearPlan:
    """What a call of the fused head will do; print it.

    Args:
        strategy: a key of STRATEGIES.
        tokens, hidden_size, vocabulary: N, H, V.
        chunk_tokens: tokens whose logits exist at one time.
        operations: floating-point operations of all products with every token counted (masked
            and gradient-free rows are left out of the products, so a call may do fewer).
        passes: how often a token's logits are made.
        peak_bytes: memory above the inputs and the gradients that are returned.
        most_tokens: tokens whose logits the budget allows at one time.
        one_dweight: every token's bfloat16 gradient of the logits is kept to the end, in no more
            memory than a float32 sum of dweight would take, and dweight is one product.
    """

    strategy: str
    tokens: int
    hidden_size: int
    vocabulary: int
    chunk_tokens: int
    operations: int
    passes: int
    peak_bytes: int
    most_tokens: int
    one_dweight: bool = False

    @property
    def num_chunks(self) -> int:
        return -(-self.tokens // self.chunk_tokens)

    def __str__(self) -> str:
        shape = f"{self.tokens} x {self.hidden_size} x {self.vocabulary}"
        unit = max(self.tokens * self.hidden_size * self.vocabulary, 1)
        return (
            f"{shape}: {self.strategy} ({STRATEGIES[self.strategy]}); "
            f"{self.operations / unit:.0f} NHV = {self.operations / 1e12:.3f} TFLOP, "
            f"{self.passes} pass{'es' * (self.passes > 1)} over {self.num_chunks} chunks of "
            f"{self.chunk_tokens} tokens, peak {self.peak_bytes / 2**20:.1f} MiB"
        )


def make_plan(
    hidden: Tensor,
    weight: Tensor,
    *,
    chunk_bytes: int | None,
    needs: tuple[bool, bool, bool],
    coupled: bool,
    separate_gradient: bool = False,
    with_entropy: bool = True,
    keeps: bool = True,
    may_keep_dz: bool = False,
) -> LinearPlan:
    """The plan for hidden (N, H) and weight (V, H).

    Args:
        chunk_bytes: budget for the logits at hand; None = the device's default.
        needs: whether hidden, weight and bias need a gradient.
        coupled: the derivative of the loss is known only after every token's logp.
        separate_gradient: the logits' gradient cannot overwrite them (softcap needs both).
        with_entropy: whether a coupled loss may differentiate the entropy.
        keeps: whether a coupled loss may keep logits or gradients from its forward.
        may_keep_dz: whether the pass can keep every token's gradient of the logits.
    """
    (tokens, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    accumulator = statistics_dtype(hidden).itemsize
    low_precision = hidden.element_size() < accumulator
    separate_gradient = separate_gradient or low_precision
    logit = accumulator + hidden.element_size() * separate_gradient
    chunk_tokens, most, chunk_bytes = chunks_of(
        tokens, vocabulary * logit, chunk_bytes, hidden.device.type
    )
    operations = 2 + 2 * needs[0] + 2 * needs[1]
    peak = chunk_tokens * vocabulary * logit
    kept = tokens * vocabulary * accumulator
    strategy = "one-pass"
    if not any(needs):
        strategy = "forward"
    elif coupled and keeps and kept + peak <= chunk_bytes:
        strategy, peak = "kept-logits", kept + peak
    elif coupled and keeps and needs == (True, False, False) and not with_entropy:
        strategy = "unit-gradient"
        peak += tokens * hidden_size * accumulator
    elif coupled:
        strategy, operations = "recompute", operations + 2
    one_dweight = False
    if low_precision:
        beside = beside_low_precision(hidden, weight, needs)
        kept_dz = _beyond_a_chunk(hidden, vocabulary, chunk_tokens)
        one_dweight = may_keep_dz and needs[1] and hidden.dtype == torch.bfloat16
        one_dweight = one_dweight and kept_dz <= weight.numel() * accumulator
        if one_dweight:
            beside += kept_dz - weight.numel() * accumulator
        peak += beside
    return LinearPlan(
        strategy, tokens, hidden_size, vocabulary, chunk_tokens,
        operations * tokens * hidden_size * vocabulary,
        2 if strategy == "recompute" else 1, peak, most, one_dweight,
    )  # fmt: skip


def _beyond_a_chunk(hidden: Tensor, vocabulary: int, chunk_tokens: int) -> int:
    """Bytes of every token's gradient of the logits beyond those of a chunk, and of its hidden."""
    tokens, hidden_size = hidden.shape
    beyond = max(tokens - chunk_tokens, 0) * vocabulary
    return (beyond + tokens * hidden_size) * hidden.element_size()


def chunks_of(
    tokens: int, token_bytes: int, chunk_bytes: int | None, device: str
) -> tuple[int, int, int]:
    """(tokens of a chunk, the most that the budget allows, the budget), chunks of equal size."""
    if chunk_bytes is None:
        chunk_bytes = DEFAULT_CHUNK_BYTES.get(device, DEFAULT_CHUNK_BYTES_ELSEWHERE)
    if chunk_bytes < 0:
        raise ValueError(f"chunk_bytes must not be negative, got {chunk_bytes}")
    most = max(min(chunk_bytes // token_bytes, tokens), 1)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1), most, chunk_bytes


def beside_low_precision(hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> int:
    """Bytes of dweight's fp32 sum, which is rounded at the end, and on a CPU of fp32 slices."""
    accumulator = statistics_dtype(hidden).itemsize
    peak = weight.numel() * accumulator if needs[1] else 0
    if hidden.device.type == "cpu":
        peak += min(SLICE_BYTES, weight.numel() * accumulator)
    return peak
