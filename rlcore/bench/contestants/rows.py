"""The contestants on logits and on episodes: ours, plain PyTorch, and the peers that import.

An adapter takes an operation's inputs and gives its outputs, in a few lines. What a peer wants
in another form is prepared before its clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.bench import operations
from rlcore.bench.cases import Case
from rlcore.bench.operations import EPSILON, GAMMA, LAM, OPERATIONS, Inputs


@dataclass(frozen=True)
class Contestant:
    """One way to compute an operation.

    Args:
        run: inputs -> outputs, differentiable in the operation's leaves.
        needs_gpu: it can only run there.
        prepare: makes its own inputs from the operation's, leaves among them, untimed.
        restore: brings the gradients of those leaves into the operation's shapes, untimed.
        most_steps: longest T that it goes through one at a time; None = any.
    """

    run: Callable[[Inputs], tuple[Tensor, ...]]
    needs_gpu: bool = False
    prepare: Callable[[Inputs], Inputs] | None = None
    restore: Callable[[list[Tensor]], list[Tensor]] | None = None
    most_steps: int | None = None

    def unable(self, case: Case, device: torch.device) -> str | None:
        """Why this contestant cannot run the case here, None where it can."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.most_steps is not None and self.most_steps < case.T:
            return f"not run: a loop over {case.T} steps"
        return None


def on_both_backends(
    function: Callable[[Inputs, str], tuple[Tensor, ...]],
) -> dict[str, Contestant]:
    """The adapter on both backends."""
    return {
        "rlcore triton": Contestant(lambda inputs: function(inputs, "triton"), needs_gpu=True),
        "rlcore torch": Contestant(lambda inputs: function(inputs, "torch")),
    }


def ours_token_logprob(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    out = rl.token_logprob(inputs["logits"], inputs["target"], backend=backend)
    return out.logp, out.entropy


def ours_token_logp(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    logits, target = inputs["logits"], inputs["target"]
    return (rl.token_logprob(logits, target, entropy=False, backend=backend).logp,)


def ours_policy_loss(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    out = rl.policy_loss(
        inputs["logits"], inputs["target"], inputs["advantage"], old_logp=inputs["old_logp"],
        epsilon=EPSILON, backend=backend,
    )  # fmt: skip
    return (out.loss,)


def ours_sequence_policy_loss(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    logits, length = inputs["logits"], inputs["T"]
    target, advantage, old_logp = (
        inputs[name].view(-1, length) for name in ("target", "advantage", "old_logp")
    )
    out = rl.policy_loss(
        logits.view(-1, length, logits.shape[-1]), target, advantage, old_logp=old_logp,
        epsilon=EPSILON, importance_sampling_level="sequence", backend=backend,
    )  # fmt: skip
    return (out.loss,)


def ours_cross_entropy(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    ones = torch.ones_like(inputs["advantage"])
    out = rl.policy_loss(
        inputs["logits"], inputs["target"], ones, surrogate="reinforce", backend=backend
    )
    return (out.loss,)


def ours_categorical_kl(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    return (rl.categorical_kl(inputs["p_logits"], inputs["q_logits"], backend=backend),)


def ours_fisher(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    return (rl.fisher_vector_product(inputs["logits"], inputs["tangent"], backend=backend),)


def ours_gae(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    return rl.gae(inputs["reward"], inputs["value"], gamma=GAMMA, lam=LAM, backend=backend)


def trl_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = inputs["logits"]
    return selective_log_softmax(logits, inputs["target"]), entropy_from_logits(logits)


def trl_triton_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(inputs["logits"], inputs["target"])


def trl_token_logp(inputs: Inputs) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(inputs["logits"], inputs["target"]),)


def trl_policy_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    return (operations.clipped_loss(inputs, trl_token_logp(inputs)[0]),)


def verl_token_logp(inputs: Inputs) -> tuple[Tensor, ...]:
    from verl.utils.torch_functional import logprobs_from_logits

    return (logprobs_from_logits(inputs["logits"], inputs["target"], inplace_backward=False),)


def verl_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    from verl.utils.torch_functional import entropy_from_logits

    return (*verl_token_logp(inputs), entropy_from_logits(inputs["logits"]))


def openrlhf_token_logprob(inputs: Inputs) -> tuple[Tensor, ...]:
    from openrlhf.models.utils import compute_entropy, log_probs_from_logits

    logits = inputs["logits"].view(-1, inputs["T"], inputs["logits"].shape[-1])
    logp = log_probs_from_logits(logits, inputs["target"].view(-1, inputs["T"]))
    return logp.reshape(-1), compute_entropy(logits).reshape(-1)


def with_room_for_the_prompt(inputs: Inputs) -> Inputs:
    """Liger's GRPO takes logits (B, T + 1, V), of which it reads all but the last of a sequence."""
    length, logits = inputs["T"], inputs["logits"]
    padded = logits.new_zeros(logits.shape[0] // length, length + 1, logits.shape[1])
    padded[:, :-1] = logits.view(-1, length, logits.shape[1])
    return inputs | {"logits": padded}


def without_room(gradients: list[Tensor]) -> list[Tensor]:
    return [gradient[:, :-1].flatten(0, 1) for gradient in gradients]


def liger_policy_loss(inputs: Inputs, level: str = "token") -> tuple[Tensor, ...]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    length = inputs["T"]
    old_logp, target = (inputs[name].view(-1, length) for name in ("old_logp", "target"))
    loss, _ = triton_grpo_loss(
        inputs["logits"], old_logp, None, target, inputs["advantage"][::length].contiguous(),
        temperature=1.0, beta=0.0, eps_low=EPSILON, eps_high=EPSILON, inplace=False,
        loss_type="dapo" if level == "token" else "grpo", importance_sampling_level=level,
        reduce=True,
    )  # fmt: skip
    return (loss,)


def liger_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # it writes the gradient over its logits: it gets a copy, as any caller who needs them must
    return (liger_cross_entropy(inputs["logits"] * 1, inputs["target"]),)


def quack_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from quack import cross_entropy

    return (cross_entropy(inputs["logits"], inputs["target"], reduction="mean"),)


def fla_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from fla.modules import FusedCrossEntropyLoss

    return (FusedCrossEntropyLoss(inplace_backward=False)(inputs["logits"], inputs["target"]),)


def torchrl_gae(inputs: Inputs) -> tuple[Tensor, ...]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    reward, value = inputs["reward"], inputs["value"]
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    ends = torch.zeros_like(reward, dtype=torch.bool)
    columns = (x.unsqueeze(-1) for x in (value, following, reward, ends, ends))
    advantage, returns = vec_generalized_advantage_estimate(GAMMA, LAM, *columns)
    return advantage.squeeze(-1), returns.squeeze(-1)


def verl_gae(inputs: Inputs) -> tuple[Tensor, ...]:
    """Its advantages come whitened, so they are not compared; its returns are."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    reward, value = inputs["reward"], inputs["value"]
    _, returns = compute_gae_advantage_return(reward, value, torch.ones_like(reward), GAMMA, LAM)
    return returns - value, returns


def _liger_grpo(level: str) -> Contestant:
    return Contestant(
        lambda inputs: liger_policy_loss(inputs, level),
        needs_gpu=True,
        prepare=with_room_for_the_prompt,
        restore=without_room,
    )


CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "token_logprob": {
        **on_both_backends(ours_token_logprob),
        "trl": Contestant(trl_token_logprob),
        "trl triton": Contestant(trl_triton_token_logprob, needs_gpu=True),
        "verl": Contestant(verl_token_logprob),
        "openrlhf": Contestant(openrlhf_token_logprob),
    },
    "token_logp": {
        **on_both_backends(ours_token_logp),
        "trl": Contestant(trl_token_logp),
        "verl": Contestant(verl_token_logp),
    },
    "policy_loss": {
        **on_both_backends(ours_policy_loss),
        "trl": Contestant(trl_policy_loss),
        "liger": _liger_grpo("token"),
    },
    "sequence_policy_loss": {
        **on_both_backends(ours_sequence_policy_loss),
        "liger": _liger_grpo("sequence"),
    },
    "cross_entropy": {
        **on_both_backends(ours_cross_entropy),
        "liger": Contestant(liger_cross_entropy, needs_gpu=True),
        "quack": Contestant(quack_cross_entropy, needs_gpu=True),
        "fla": Contestant(fla_cross_entropy, needs_gpu=True),
    },
    "categorical_kl": on_both_backends(ours_categorical_kl),
    "fisher_vector_product": on_both_backends(ours_fisher),
    "gae": {
        **on_both_backends(ours_gae),
        "torchrl": Contestant(torchrl_gae),
        "verl": Contestant(verl_gae, most_steps=1 << 16),
    },
}


def contestants(op: str) -> dict[str, Contestant]:
    """All of an operation's: those of the tables, eager PyTorch, and torch.compile of it."""
    from rlcore.bench.contestants.head import HEAD_CONTESTANTS

    formula = OPERATIONS[op].formula
    loops = {"most_steps": 1 << 16} if op == "gae" else {}
    eager = {"eager": Contestant(formula, **loops)}
    if op != "gae":
        eager["torch.compile"] = Contestant(_compiled(op))
    return (CONTESTANTS | HEAD_CONTESTANTS)[op] | eager


_compilations: dict[str, Any] = {}


def _compiled(op: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if op not in _compilations:
            _compilations[op] = torch.compile(OPERATIONS[op].formula, dynamic=True)
        return _compilations[op](inputs)

    return run


def names() -> Iterator[str]:
    """Every contestant's name, ours first."""
    yield from dict.fromkeys(name for op in OPERATIONS for name in contestants(op))
