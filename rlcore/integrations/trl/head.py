"""The output heads of TRL's trainers served by the fused head, and what TRL asks of it besides.

Whether the label is the likeliest token follows for most tokens from its probability p and the
entropy H alone: p > 1/2 makes it so, and as max p >= exp(-H), p < exp(-H) rules it out. Logits are
made for the undecided tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.kernels.head.plan import DEFAULT_CHUNK_BYTES

KERNEL_PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
CROSS_ENTROPY_PARAMETERS = (
    "hidden_states", "lm_head_weight", "chunk_size", "labels", "shift_labels",
    "num_items_in_batch", "logit_scale", "final_logit_softcapping", "lm_head_bias",
)  # fmt: skip
IGNORED = -100
MARGIN = 1e-3  # in the logarithm: what rounding may do to logp and the entropy


def make_kernel(theirs: Any) -> Any:
    """A stand-in for TRL's `_ChunkedLogProbFunction`, whose `apply` is all that TRL calls."""

    class FusedLogProb:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor | None, ...]:
            """(N,) log-probabilities and the other `outputs`, in TRL's order."""
            if not _takes(hidden, weight, logit_scale):
                return theirs.apply(
                    hidden, weight, bias, targets, temperature, chunk_size,
                    final_logit_softcapping, logit_scale, outputs,
                )  # fmt: skip
            head = {"bias": bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
            want_entropy = "entropy" in outputs or "is_top1" in outputs
            out = rl.linear_token_logprob(
                hidden, weight, targets, temperature=temperature, entropy=want_entropy, **head
            )
            with torch.no_grad():
                extra = _extras(hidden, weight, targets, temperature, head, out, outputs)
            entropy = out.entropy if "entropy" in outputs else None
            return out.logp, entropy, *extra

    return FusedLogProb


def _takes(hidden: Tensor, weight: Tensor, logit_scale: float) -> bool:
    """ZeRO-3 gathers the weight anew for TRL's own backward; other devices have no kernels here."""
    return (
        hidden.device.type in ("cpu", "cuda") and not hasattr(weight, "ds_id") and logit_scale > 0
    )


def _extras(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, head: dict,
    out: rl.TokenLogprob, outputs: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """log sum_v p_v^2, the mean logit, and whether the target is likeliest; None if not asked."""
    squares = mean = top = None
    if "log_sum_sq_probs" in outputs:
        # sum_v exp(2 z_v / T) is the normaliser at half the temperature
        half = rl.linear_token_logprob(
            hidden, weight, targets, temperature=temperature / 2, entropy=False, **head
        )
        squares = half.lse - 2 * out.lse
    if "mean_logits" in outputs:
        mean = _mean_logits(hidden, weight, temperature, head)
    if "is_top1" in outputs:
        top = is_likeliest(hidden, weight, targets, out, **head)
    return squares, mean, top


def _mean_logits(hidden: Tensor, weight: Tensor, temperature: float, head: dict) -> Tensor:
    """(N,) float32: the mean of z / T, which without a softcap is the mean row's own logit."""
    if head["softcap"] is not None:
        chunks = _logits(hidden, weight, **head)
        return torch.cat([logits.mean(-1) for _, logits in chunks] or [hidden[:, 0]]) / temperature
    row = weight.mean(0, dtype=torch.float32)
    bias = 0.0 if head["bias"] is None else head["bias"].float().mean()
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.float() @ row + bias) * (head["logit_scale"] / temperature)


def is_likeliest(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    out: rl.TokenLogprob,
    **head: Any,
) -> Tensor:
    """(N,) bool: whether each target has the highest of all logits; an earlier equal one wins."""
    likeliest = out.logp > -0.6931 + MARGIN
    undecided = ~likeliest & (out.logp > -out.entropy - MARGIN * (1 + out.entropy))
    rows = undecided.nonzero().squeeze(1)
    for part, logits in _logits(hidden[rows], weight, **head):
        place = rows[part]
        likeliest[place] = logits.argmax(-1) == targets[place]
    return likeliest


def _logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None,
    logit_scale: float,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """(rows, their logits before the temperature, float32), some rows at a time."""
    rows = max(1, DEFAULT_CHUNK_BYTES["cpu"] // (4 * len(weight)))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias)
        logits = logits.float() * logit_scale
        yield part, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def make_cross_entropy(theirs: Callable) -> Callable:
    """A stand-in for `_chunked_cross_entropy_loss` of TRL's SFT (until 1.14), in one pass."""

    def fused_cross_entropy_loss(
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        chunk_size: int,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the correct tokens, summed entropy and counted tokens of this batch."""
        if not _takes(hidden_states, lm_head_weight, logit_scale):
            return theirs(
                hidden_states, lm_head_weight, chunk_size, labels, shift_labels,
                num_items_in_batch, logit_scale, final_logit_softcapping, lm_head_bias,
            )  # fmt: skip
        if shift_labels is None:
            hidden_states, shift_labels = hidden_states[:, :-1], labels[:, 1:]
        hidden, target = hidden_states.flatten(0, -2), shift_labels.flatten()
        mask = target != IGNORED
        target = target.masked_fill(~mask, 0)
        head = {
            "bias": lm_head_bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale,
        }  # fmt: skip
        # -1 * logp summed and divided by the count: REINFORCE with every advantage 1
        out = rl.linear_policy_loss(
            hidden, lm_head_weight, target, torch.ones_like(target, dtype=torch.float32),
            mask=mask, surrogate="reinforce", num_items=num_items_in_batch, **head,
        )  # fmt: skip
        with torch.no_grad():
            rows = mask.nonzero().squeeze(1)
            counted = rl.TokenLogprob(out.logp[rows], out.entropy[rows], None)
            correct = is_likeliest(hidden[rows], lm_head_weight, target[rows], counted, **head)
        return out.loss, correct.sum().float(), out.entropy.sum(), mask.sum()

    return fused_cross_entropy_loss


def serves_logits(logits: Tensor, index: Tensor) -> bool:
    """Whether `rl.token_logprob` takes these: one index a row, on a device with kernels."""
    return index.dim() == logits.dim() - 1 and logits.device.type in ("cpu", "cuda")


def make_selective_log_softmax(theirs: Callable) -> Callable:
    """A stand-in for TRL's `selective_log_softmax`: the log-probability of each row's index."""

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if not serves_logits(logits, index):
            options = {} if row_mask is None else {"row_mask": row_mask}
            options |= {} if temperature == 1.0 else {"temperature": temperature}
            return theirs(logits, index, **options)
        mask = None if row_mask is None else row_mask.bool()
        out = rl.token_logprob(logits, index, temperature=temperature, mask=mask, entropy=False)
        # TRL writes into what it gets
        return out.logp.clone()

    return selective_log_softmax


def make_entropy(theirs: Callable) -> Callable:
    """A stand-in for TRL's `entropy_from_logits`."""

    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        index = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
        if not serves_logits(logits, index):
            return theirs(logits, chunk_size)
        return rl.token_logprob(logits, index).entropy

    return entropy_from_logits
