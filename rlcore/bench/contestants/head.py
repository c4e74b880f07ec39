"""The contestants from hidden states and the head's weight to losses and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import rlcore as rl
from rlcore.bench import operations
from rlcore.bench.contestants.rows import Contestant, on_both_backends, trl_token_logprob
from rlcore.bench.operations import BETA, EPSILON, Inputs


def ours_token_logprob(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    out = rl.linear_token_logprob(
        inputs["hidden"], inputs["weight"], inputs["target"], mask=inputs["mask"], backend=backend
    )
    return out.logp, out.entropy


def ours_policy_loss(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    out = rl.linear_policy_loss(
        inputs["hidden"], inputs["weight"], inputs["target"], inputs["advantage"],
        old_logp=inputs["old_logp"], mask=inputs["mask"], epsilon=EPSILON, backend=backend,
    )  # fmt: skip
    return (out.loss,)


def ours_any_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same loss written in PyTorch on `linear_token_logprob`."""
    logp = rl.linear_token_logprob(
        inputs["hidden"], inputs["weight"], inputs["target"], mask=inputs["mask"], entropy=False
    ).logp
    return (operations.clipped_loss(inputs, logp),)


def ours_cross_entropy(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    ones = torch.ones_like(inputs["advantage"])
    out = rl.linear_policy_loss(
        inputs["hidden"], inputs["weight"], inputs["target"], ones, mask=inputs["mask"],
        surrogate="reinforce", backend=backend,
    )  # fmt: skip
    return (out.loss,)


def ours_dpo(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    shape = (-1, inputs["T"])
    hidden, mask = inputs["hidden"].view(*shape, inputs["hidden"].shape[1]), inputs["mask"]
    ref_logp = (inputs["ref_logp"] * mask).view(shape).sum(1)
    out = rl.linear_preference_loss(
        hidden, inputs["weight"], inputs["target"].view(shape), mask.view(shape), ref_logp,
        beta=BETA, backend=backend,
    )  # fmt: skip
    return (out.loss,)


def trl_chunked(inputs: Inputs, *outputs: str) -> list[Tensor]:
    """Log-probabilities (and what else is named) of counted tokens, as TRL's trainers call it."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    mask = inputs["mask"]
    out = _ChunkedLogProbFunction.apply(
        inputs["hidden"][mask], inputs["weight"], None, inputs["target"][mask], 1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs,
    )  # fmt: skip
    zeros = torch.zeros(mask.shape, device=mask.device)
    return [zeros.masked_scatter(mask, x.float()) for x in out[: 1 + len(outputs)]]


def trl_token_logprob_chunked(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(trl_chunked(inputs, "entropy"))


def trl_logits_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    statistics = trl_token_logprob(operations.head_logits(inputs))
    return tuple(x * inputs["mask"] for x in statistics)


def trl_policy_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    return (operations.clipped_loss(inputs, trl_chunked(inputs)[0]),)


def trl_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    return (-trl_chunked(inputs)[0].sum() / inputs["num_items"],)


def trl_dpo(inputs: Inputs) -> tuple[Tensor, ...]:
    return (operations.dpo_loss(inputs, trl_chunked(inputs)[0]),)


def liger_policy_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = inputs["T"]
    hidden = inputs["hidden"].view(-1, length, inputs["hidden"].shape[1])
    target, mask, old_logp = (
        inputs[name].view(-1, length) for name in ("target", "mask", "old_logp")
    )
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, chunk_size=1, loss_type="bnpo",
        max_completion_length=length, temperature=1.0, epsilon_low=EPSILON, epsilon_high=EPSILON,
    )  # fmt: skip
    advantage = inputs["advantage"][::length]
    return loss(hidden, inputs["weight"], target, mask, advantage, old_per_token_logps=old_logp)[:1]


def _ignoring_masked(inputs: Inputs) -> Tensor:
    return inputs["target"].masked_fill(~inputs["mask"], -100)


def liger_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return (
        liger_fused_linear_cross_entropy(
            inputs["hidden"], inputs["weight"], _ignoring_masked(inputs)
        ),
    )


def cce_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(inputs["hidden"], inputs["weight"], _ignoring_masked(inputs)),)


def cce_policy_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        inputs["hidden"], inputs["weight"], _ignoring_masked(inputs), reduction="none"
    )
    return (operations.clipped_loss(inputs, -nll.float()),)


def verl_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, entropy = linear_cross_entropy(
        inputs["hidden"], inputs["weight"], inputs["target"], 1.0, "none"
    )
    return logp * inputs["mask"], entropy * inputs["mask"]


def verl_policy_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    return (operations.clipped_loss(inputs, verl_token_logprob(inputs)[0]),)


def quack_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return (
        chunked_linear_cross_entropy(
            inputs["hidden"], inputs["weight"], _ignoring_masked(inputs), reduction="mean"
        ),
    )


def fla_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss()
    return (loss(inputs["hidden"], _ignoring_masked(inputs), inputs["weight"]),)


def torch_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    """torch.nn.functional.linear_cross_entropy, in releases that have it."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ModuleNotFoundError("this torch has no linear_cross_entropy", name="torch")
    return (function(inputs["hidden"], inputs["weight"], _ignoring_masked(inputs)),)


HEAD_CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "linear_token_logprob": {
        **on_both_backends(ours_token_logprob),
        "trl logits": Contestant(trl_logits_token_logprob),
        "trl chunked": Contestant(trl_token_logprob_chunked),
        "verl": Contestant(verl_token_logprob, needs_gpu=True),
    },
    "linear_policy_loss": {
        **on_both_backends(ours_policy_loss),
        "rlcore any loss": Contestant(ours_any_loss),
        "trl chunked": Contestant(trl_policy_loss),
        "liger": Contestant(liger_policy_loss),
        "cce": Contestant(cce_policy_loss, needs_gpu=True),
        "verl": Contestant(verl_policy_loss, needs_gpu=True),
    },
    "linear_cross_entropy": {
        **on_both_backends(ours_cross_entropy),
        "trl chunked": Contestant(trl_cross_entropy),
        "torch": Contestant(torch_cross_entropy),
        "liger": Contestant(liger_cross_entropy, needs_gpu=True),
        "cce": Contestant(cce_cross_entropy, needs_gpu=True),
        "quack": Contestant(quack_cross_entropy, needs_gpu=True),
        "fla": Contestant(fla_cross_entropy, needs_gpu=True),
    },
    "linear_dpo": {
        **on_both_backends(ours_dpo),
        "trl chunked": Contestant(trl_dpo),
    },
}
