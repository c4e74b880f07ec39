"""From a model to the losses of its completions: through the logits, or past them.

`LogitsHead` lets the model make its logits. `FusedHead` stops it at the head's input and hands that
and the head's weight to the fused losses, so that no (B, C, V) tensor is ever made. Both have the
same two methods, and give the same numbers to float32 rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.distributed.fsdp import FSDPModule

from rlcore.errors import UserError
from rlcore.kernels.head.pairs import linear_preference_loss
from rlcore.kernels.head.tokens import linear_policy_loss, linear_token_logprob
from rlcore.kernels.pairs.answers import composed_preference_loss
from rlcore.kernels.pairs.preference_loss import PreferenceLoss
from rlcore.kernels.rows.policy_loss import PolicyLoss, policy_loss
from rlcore.kernels.rows.token_logprob import TokenLogprob, token_logprob
from rlcore.models.forward import (
    completion_logits,
    completion_outputs,
    evaluating,
    probe_rows,
    sharded,
    unwrapped,
)
from rlcore.models.packing import pack, packed_outputs

# the names that configurations have for a cap on the logits
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LOUD = 300.0  # ten times the cap that is usual


class Completions(Protocol):
    """What a loss asks a model about: the last C tokens of each of B rows."""

    input_ids: torch.Tensor  # (B, T) int64, prompt and then completion
    attention_mask: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, C) bool: the completion tokens that count

    @property
    def target(self) -> torch.Tensor:
        """(B, C) int64: the completion's tokens."""
        ...


@dataclass(frozen=True)
class _Probe:
    """A few tokens to compare heads on."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class LogitsHead:
    """Losses from the model's own logits."""

    padding_free: bool = False  # the rows go through the model behind each other

    def token_logprob(self, model: Any, batch: Completions, **options: Any) -> TokenLogprob:
        """`rl.token_logprob` of the completions."""
        logits = self.read(model, batch)
        return token_logprob(logits, batch.target, mask=batch.mask, **options)

    def policy_loss(
        self, model: Any, batch: Completions, advantage: torch.Tensor, **options: Any
    ) -> PolicyLoss:
        """`rl.policy_loss` of the completions, whose logits take the gradient."""
        options = {"mask": batch.mask, "inplace_backward": model.training} | options
        logits = self.read(model, batch)
        return policy_loss(logits, batch.target, advantage, **options)

    def preference_loss(
        self, model: Any, batch: Completions, ref_logp: torch.Tensor | None, **options: Any
    ) -> PreferenceLoss:
        """`rl.linear_preference_loss` of rows [chosen; rejected], on the model's own logits."""
        logits = self.read(model, batch)

        def ask(temperature: float) -> TokenLogprob:
            return token_logprob(
                logits, batch.target, mask=batch.mask, temperature=temperature, entropy=False
            )

        return composed_preference_loss(ask, batch.mask, ref_logp, **options)

    def read(self, model: Any, batch: Completions) -> torch.Tensor:
        """(B, C, V): the completions' logits."""
        if not self.padding_free:
            return completion_logits(model, *_place(batch))
        packed = pack(*_place(batch))
        return packed.unpack(packed_outputs(model, packed).logits)


@dataclass(frozen=True)
class FusedHead:
    """Losses from the head's input; weight and bias are read at the call, from `layer`."""

    layer: torch.nn.Linear
    softcap: float | None = None
    logit_scale: float = 1.0
    padding_free: bool = False  # the rows go through the model behind each other

    def token_logprob(self, model: Any, batch: Completions, **options: Any) -> TokenLogprob:
        """`rl.linear_token_logprob` of the completions."""
        hidden = self.read(model, batch)
        return linear_token_logprob(
            hidden, self.layer.weight, batch.target, mask=batch.mask, **self.options(), **options
        )

    def policy_loss(
        self, model: Any, batch: Completions, advantage: torch.Tensor, **options: Any
    ) -> PolicyLoss:
        """`rl.linear_policy_loss` of the completions."""
        options = {"mask": batch.mask} | self.options() | options
        hidden = self.read(model, batch)
        return linear_policy_loss(hidden, self.layer.weight, batch.target, advantage, **options)

    def preference_loss(
        self, model: Any, batch: Completions, ref_logp: torch.Tensor | None, **options: Any
    ) -> PreferenceLoss:
        """`rl.linear_preference_loss` of rows [chosen; rejected]."""
        hidden = self.read(model, batch)
        return linear_preference_loss(
            hidden, self.layer.weight, batch.target, batch.mask, ref_logp,
            **self.options(), **options,
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        return {
            "bias": self.layer.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def of_words(self, count: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Weight and options of the head's first `count` rows."""
        weight, bias = self.layer.weight, self.layer.bias
        if count < len(weight):
            weight, bias = weight[:count], None if bias is None else bias[:count]
        return weight, self.options() | {"bias": bias}

    def read(self, model: Any, batch: Completions) -> torch.Tensor:
        """(B, C, H): what the head would have turned into the completions' logits."""
        packed = pack(*_place(batch)) if self.padding_free else None
        with stopped_at(self.layer) as seen:
            if packed:
                outputs = packed_outputs(model, packed)
            else:
                outputs = completion_outputs(model, *_place(batch))
        hidden = joined(seen[-1], outputs.logits, model)
        return packed.unpack(hidden) if packed else hidden[:, -batch.target.shape[1] :]


Head = LogitsHead | FusedHead


def _place(batch: Completions) -> tuple[torch.Tensor, torch.Tensor, int]:
    return batch.input_ids, batch.attention_mask, batch.target.shape[1]


@contextlib.contextmanager
def stopped_at(layer: torch.nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Collects the layer's inputs, and lets it make a single column of its output."""
    seen: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[..., :1].clone()

    # a layer may have a forward of its own already, put there by another library
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield seen
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def joined(hidden: torch.Tensor, logits: torch.Tensor, model: Any) -> torch.Tensor:
    """What the head was given, (..., H), as a part of what the model gave, (..., 1)."""
    if sharded(model) is None:
        return hidden
    # FSDP2 reduces the root's gradients when one has come in through the model's own outputs
    return hidden + (0 * logits).to(hidden.dtype)


def choose_head(model: Any, fused: bool) -> tuple[Head, str | None]:
    """The head to train a model through, and why it is not the fused one.

    A fused head is taken only after it gave the model's own log-probabilities for a few tokens:
    an architecture may do more to its logits than what is known here.
    """
    if not fused:
        return LogitsHead(), None
    policy = unwrapped(model)
    layer = policy.get_output_embeddings()
    if layer is None:  # a classifier
        return LogitsHead(), None
    # an adapter or a quantised layer is no plain Linear, and its weight is not the whole truth
    if not _is_plain_linear(layer):
        return LogitsHead(), f"its head is a {type(layer).__name__}, not a plain linear layer"
    head = FusedHead(layer, *_logit_options(policy))
    if not _is_exact(head, sharded(model) or policy):
        return LogitsHead(), f"{type(policy).__name__} does more to its logits than is known here"
    return head, None


def _is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether it is a Linear and nothing more; FSDP2 makes a class of its own of a sharded one."""
    kind = type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)
    return kind is torch.nn.Linear


def _logit_options(policy: Any) -> tuple[float | None, float]:
    """(softcap, logit_scale) of Gemma-, Cohere- and Granite-type models; (None, 1.0) elsewhere."""
    config = policy.config.get_text_config()
    softcap = next((getattr(config, name) for name in SOFTCAPS if hasattr(config, name)), None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return softcap, float(scale / (getattr(config, "logits_scaling", None) or 1.0))


def without_padding(head: Head, policy: Any) -> Head:
    """The same head for padding-free passes.

    Raises:
        UserError: the unwrapped `policy` lets sequences in one row see each other.
    """
    packed, batch = replace(head, padding_free=True), _probe(policy)
    with torch.no_grad(), evaluating(policy):
        logp, expected = (
            each.token_logprob(policy, batch, entropy=False).logp for each in (packed, head)
        )
    if not _same(logp, expected, policy):
        raise UserError(
            f"padding_free: {type(policy).__name__} lets the sequences of one row see each other, "
            "so leave padding_free off"
        )
    return packed


@torch.no_grad()
def _is_exact(head: FusedHead, model: Any) -> bool:
    """Whether the head gives the log-probabilities of the model's own logits, large ones too."""
    batch, plain = _probe(model), LogitsHead()

    def agrees(logits: torch.Tensor) -> bool:
        want = token_logprob(logits, batch.target, mask=batch.mask, entropy=False).logp
        return _same(head.token_logprob(model, batch, entropy=False).logp, want, model)

    with evaluating(model):
        logits = plain.read(model, batch)
        if logits.isnan().any():
            raise UserError(
                f"{type(model).__name__} gives logits that are NaN: its weights are broken"
            )
        if not agrees(logits):
            return False
        # a cap shows where logits are beyond it, which a model with small weights never comes to
        with _louder(head.layer, LOUD / logits.abs().max().clamp(min=LOUD * 1e-4).item()):
            return agrees(plain.read(model, batch))


@contextlib.contextmanager
def _louder(layer: torch.nn.Linear, factor: float) -> Iterator[None]:
    """The layer fed with its input times `factor`, for a while."""
    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
    try:
        yield
    finally:
        hook.remove()


def _probe(model: Any) -> _Probe:
    ids, attention_mask = probe_rows(model)
    return _Probe(ids, attention_mask, ids[:, 3:], attention_mask[:, 3:].bool())


def _same(logp: torch.Tensor, expected: torch.Tensor, model: Any) -> bool:
    """Whether both are the same but for rounding, which half precision does to logits as well."""
    half = unwrapped(model).get_input_embeddings().weight.dtype.itemsize == 2
    tolerance = (0.02 if half else 1e-3) * (1 + expected.abs().max())
    return bool((logp - expected).abs().max() <= tolerance)
