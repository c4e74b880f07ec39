"""How a fused head goes through its tokens: chunk sizes, passes, operations, peak memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..blocks import ALIGNED, aligned, statistics_dtype
from .products import SLICE_BYTES, gradient_dtype

# Bytes of logits and their gradients at hand, and how many of them a chunk takes at most: on a
# CPU what keeps the row work near the cache, on a GPU what keeps the products large.
DEFAULT_CHUNK_BYTES = {"cpu": 256 << 20}
DEFAULT_CHUNK_BYTES_ELSEWHERE = 2 << 30
MOST_CHUNK_BYTES = {"cpu": 56 << 20}
CHUNK_STEP = 128  # a large chunk's tokens are a multiple of it, as tiles of a product are
# Bytes of a float32 slice of dweight before it is rounded: on a GPU few slices, as every one costs
# the host's launches of its products.
PART_BYTES = {"cpu": 32 << 20}
PART_BYTES_ELSEWHERE = 256 << 20

# strategy -> what it does, as a printed plan says
STRATEGIES = {
    "one-pass": "the loss knows its derivative in the chunk: the gradient is made at once",
    "kept-logits": "all logits fit half of chunk_bytes: kept for the backward, nothing recomputed",
    "unit-gradient": "frozen head: the forward stores unit gradients, the backward scales rows",
    "recompute": "the backward makes the logits again, a slice of the vocabulary at a time",
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
        passes: how often a token's logits are made, at most.
        peak_bytes: memory above the inputs and the gradients that are returned.
        most_tokens: tokens whose logits the budget allows at one time.
        slice_columns: width of the slices of the vocabulary that gradients are made by; 0 = none.
        dz_tokens: tokens whose gradient of the logits has memory of its own at one time.
        remade_tokens: tokens whose logits are made a second time for dweight, as their gradient
            fits neither there nor in the memory that dweight will take.
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
    slice_columns: int = 0
    dz_tokens: int = 0
    remade_tokens: int = 0

    @property
    def num_chunks(self) -> int:
        return -(-self.tokens // self.chunk_tokens)

    def __str__(self) -> str:
        shape = f"{self.tokens} x {self.hidden_size} x {self.vocabulary}"
        unit = max(self.tokens * self.hidden_size * self.vocabulary, 1)
        return (
            f"{shape}: {self.strategy} ({STRATEGIES[self.strategy]}); "
            f"{self.operations / unit:.3g} NHV = {self.operations / 1e12:.3f} TFLOP, "
            f"{self.passes} pass{'es' * (self.passes > 1)} over {self.num_chunks} chunks of "
            f"{self.chunk_tokens} tokens, peak {self.peak_bytes / 2**20:.1f} MiB"
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes: of a logit, of its gradient's own memory, of a gradient that waits to be handed out,
    and beside them what a CPU's products take.

    `low_precision` says that sums are kept in a wider dtype than the inputs'.
    """

    logit: int
    dz: int
    waiting: int
    beside: int
    low_precision: bool

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, separate_gradient: bool = False) -> Sizes:
        accumulator = statistics_dtype(hidden).itemsize
        low_precision = hidden.element_size() < accumulator
        beside = 0
        if low_precision and hidden.device.type == "cpu":
            beside = 2 * min(SLICE_BYTES, weight.numel() * accumulator)
            beside += hidden.numel() * accumulator
        dz = hidden.element_size() if low_precision or separate_gradient else 0
        waiting = gradient_dtype(hidden.dtype).itemsize
        return Sizes(accumulator, dz, waiting, beside, low_precision)

    @property
    def both(self) -> int:
        return self.logit + self.dz


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
    chunk_tokens: int | None = None,
) -> LinearPlan:
    """The plan for hidden (N, H) and weight (V, H).

    Args:
        chunk_bytes: budget for logits and their gradients; None = the device's default.
        needs: whether hidden, weight and bias need a gradient.
        coupled: the derivative of the loss is known only after every token's logp.
        separate_gradient: the logits' gradient cannot overwrite them (softcap needs both).
        with_entropy: whether a coupled loss may differentiate the entropy.
        keeps: whether a coupled loss may keep logits or gradients from its forward.
        chunk_tokens: of a loss that is not coupled and has chunks of its own, the largest of them.
    """
    (tokens, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    sizes = Sizes.of(hidden, weight, separate_gradient)
    device, one = hidden.device.type, tokens * hidden_size * vocabulary
    operations = (2 + 2 * needs[0] + 2 * needs[1]) * one
    shape = (tokens, hidden_size, vocabulary)
    if any(needs) and not coupled:
        plan = _one_pass_plan(shape, sizes, chunk_bytes, device, needs, chunk_tokens)
        return replace(plan, operations=operations + 2 * plan.remade_tokens * one // max(tokens, 1))
    fits = 2 * tokens * vocabulary * sizes.logit <= budget_of(chunk_bytes, device)
    frozen_head = needs == (True, False, False) and not with_entropy
    if any(needs) and (fits or not (keeps and frozen_head)):
        plan = _sliced_plan(shape, sizes, chunk_bytes, device, needs, keeps and fits)
        return replace(plan, operations=operations + 2 * (plan.passes - 1) * one)
    token_bytes = vocabulary * (sizes.both if any(needs) else sizes.logit)
    chunk_tokens, most, _ = chunks_of(tokens, token_bytes, chunk_bytes, device)
    peak = chunk_tokens * token_bytes + sizes.beside
    peak += tokens * hidden_size * sizes.logit * any(needs)
    strategy = "unit-gradient" if any(needs) else "forward"
    return LinearPlan(strategy, *shape, chunk_tokens, operations, 1, peak, most)


def _one_pass_plan(
    shape: tuple[int, int, int],
    sizes: Sizes,
    chunk_bytes: int | None,
    device: str,
    needs: tuple[bool, bool, bool],
    chunk_tokens: int | None,
) -> LinearPlan:
    """A chunk's gradient at once; in low precision dweight is made at the end, of every token's."""
    tokens, hidden_size, vocabulary = shape
    stores = sizes.low_precision and needs[1]
    row, budget = vocabulary * sizes.both, budget_of(chunk_bytes, device)
    chunk, _, _ = chunks_of(tokens, row, budget // 2 if stores else budget, device)
    chunk_tokens = chunk if chunk_tokens is None else chunk_tokens
    plan = LinearPlan(
        "one-pass", *shape, chunk_tokens, 0, 1, chunk_tokens * row + sizes.beside,
        max(budget // row, 1),
    )  # fmt: skip
    if not stores:
        return plan
    # tokens whose gradient of the logits fits in the memory that dweight will take
    own = hidden_size * sizes.waiting // sizes.dz
    room = (budget - chunk_tokens * vocabulary * sizes.logit) // (vocabulary * sizes.dz)
    room = max(room, chunk_tokens)
    remade = max(tokens - own - room, 0)
    dz_tokens = max(min(room, tokens - own), chunk_tokens)
    part_bytes = min(PART_BYTES.get(device, PART_BYTES_ELSEWHERE), budget // 8)
    columns = min(_rounded(part_bytes // (hidden_size * sizes.logit), ALIGNED), vocabulary)
    peak = chunk_tokens * vocabulary * sizes.logit + dz_tokens * vocabulary * sizes.dz
    # tokens that are not all neighbours have their hidden states copied for the product
    peak += columns * hidden_size * sizes.logit + tokens * hidden_size * sizes.dz
    return replace(
        plan, passes=1 + (remade > 0), peak_bytes=peak + sizes.beside, slice_columns=columns,
        dz_tokens=dz_tokens, remade_tokens=remade,
    )  # fmt: skip


def _sliced_plan(
    shape: tuple[int, int, int],
    sizes: Sizes,
    chunk_bytes: int | None,
    device: str,
    needs: tuple[bool, bool, bool],
    keeps: bool,
) -> LinearPlan:
    """A forward by chunks of tokens, a backward by slices of the vocabulary."""
    tokens, hidden_size, vocabulary = shape
    row, budget = vocabulary * sizes.logit, budget_of(chunk_bytes, device)
    chunk_tokens, most, _ = chunks_of(tokens, row, budget, device)
    strategy, passes, kept = "recompute", 2, 0
    if keeps:
        strategy, passes, kept, chunk_tokens = "kept-logits", 1, tokens * row, max(tokens, 1)
    # where sums are wider than the inputs, that of dhidden
    summed = tokens * hidden_size * sizes.logit * (sizes.low_precision and needs[0])
    left = max(budget - kept - summed, budget // 4)
    most_bytes = min(left, MOST_CHUNK_BYTES.get(device, left))
    columns = _rounded(most_bytes // (max(tokens, 1) * sizes.both), ALIGNED)
    columns = min(columns, vocabulary)
    sliced = summed + tokens * aligned(columns) * sizes.both
    peak = max(chunk_tokens * row, kept + sliced) + sizes.beside
    return LinearPlan(
        strategy, *shape, chunk_tokens, 0, passes, peak, most, slice_columns=columns
    )  # fmt: skip


def budget_of(chunk_bytes: int | None, device: str) -> int:
    if chunk_bytes is None:
        return DEFAULT_CHUNK_BYTES.get(device, DEFAULT_CHUNK_BYTES_ELSEWHERE)
    if chunk_bytes < 0:
        raise ValueError(f"chunk_bytes must not be negative, got {chunk_bytes}")
    return chunk_bytes


def chunks_of(
    tokens: int, token_bytes: int, chunk_bytes: int | None, device: str
) -> tuple[int, int, int]:
    """(tokens of a chunk, the most that the budget allows, the budget), chunks of equal size."""
    budget = budget_of(chunk_bytes, device)
    fitting = min(budget, MOST_CHUNK_BYTES.get(device, budget)) // token_bytes
    most = max(min(_rounded(fitting, 1), tokens), 1)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1), max(budget // token_bytes, 1), budget


def _rounded(count: int, least: int) -> int:
    """Down to a multiple of CHUNK_STEP, or of `least` where that would leave nothing."""
    step = CHUNK_STEP if count >= CHUNK_STEP else least
    return max(count // step * step, least)


def beside_low_precision(hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> int:
    """Bytes of dweight's fp32 sum, which is rounded at the end, and of a CPU's fp32 operands."""
    peak = weight.numel() * statistics_dtype(hidden).itemsize if needs[1] else 0
    return peak + Sizes.of(hidden, weight).beside
