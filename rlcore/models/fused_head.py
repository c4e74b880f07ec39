"""The fused head for a training loop of one's own: a model in, log-probabilities and losses out.

The backbone runs as usual; its hidden states and the output head's weight go to the fused losses a
chunk of tokens at a time, and the (B, T, V) logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.kernels.pairs.preference_loss import PreferenceLoss
from rlcore.kernels.rows.policy_loss import PolicyLoss
from rlcore.kernels.rows.token_logprob import TokenLogprob
from rlcore.models.forward import reading_fault, sharded, unwrapped
from rlcore.models.heads import FusedHead, choose_head

IGNORED = -100  # transformers' label for a token that does not count


@dataclass(frozen=True)
class _Tokens:
    """A whole batch as a head wants it: every token but a row's first is predicted."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    target: torch.Tensor  # (B, T-1)
    mask: torch.Tensor  # (B, T-1) bool


@dataclass(frozen=True)
class ModelHead:
    """What `fused_head` returns; every method runs the model once.

    All take input_ids (B, T) int64, attention_mask (B, T), where None stands for ones, and labels
    (B, T) int64, where -100 marks what does not count and None stands for every attended token.
    Per-token results are (B, T-1) float32: entry [:, t] is about labels[:, t + 1], and 0 where
    that is -100 or where token t is padding, as a row's first token has nothing to predict it.
    Rows may be padded on either side: positions count attended tokens.
    """

    model: Any
    head: FusedHead

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> TokenLogprob:
        """The labels' `rl.linear_token_logprob`: (logp, entropy, lse), differentiable.

        Args:
            options: `temperature`, `entropy`, `chunk_bytes` and `backend`.

        Raises:
            ValueError: shapes that do not fit each other, or a label outside the vocabulary.
        """
        tokens = _tokens(input_ids, attention_mask, labels)
        return self.head.token_logprob(self.model, tokens, **options)

    def policy_loss(
        self,
        input_ids: torch.Tensor,
        advantage: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> PolicyLoss:
        """`rl.linear_policy_loss` of the labels: the loss and all gradients in one pass.

        Args:
            advantage: (B,) or (B, T-1).
            options: `old_logp`, `ref_logp`, `surrogate` and so on; per-token ones are (B, T-1), as
                this head's own log-probabilities are.

        Raises:
            ValueError: as `rl.linear_policy_loss`.
        """
        tokens = _tokens(input_ids, attention_mask, labels)
        return self.head.policy_loss(self.model, tokens, advantage, **options)

    def preference_loss(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        ref_logp: torch.Tensor | None = None,
        **options: Any,
    ) -> PreferenceLoss:
        """`rl.linear_preference_loss` of rows [chosen; rejected], B even; ref_logp (B,) are sums.

        Raises:
            ValueError: as `rl.linear_preference_loss`.
        """
        tokens = _tokens(input_ids, attention_mask, labels)
        return self.head.preference_loss(self.model, tokens, ref_logp, **options)


def fused_head(model: Any) -> ModelHead:
    """The model's losses past its logits, for a training loop of one's own.

        head = rl.fused_head(model)
        old_logp = head(input_ids, attention_mask, labels=labels).logp.detach()
        head.policy_loss(input_ids, advantage, attention_mask, labels=labels, old_logp=old_logp)

    Tied weights, a bias, `final_logit_softcapping`, `logit_scale` and `logits_scaling` are taken
    from the model; that nothing else happens to its logits is checked here on a few tokens. The
    weight is read at each call, so that it may be trained, sharded or moved in between.

    Args:
        model: an AutoModelForCausalLM, plain or with DDP, FSDP2, torch.compile or peft around it.

    Raises:
        UserError: the head is no plain linear layer, as with a LoRA adapter on it, the model does
            more to its logits than the fused losses know, or it is not causal.
    """
    head, reason = choose_head(model, fused=True)
    if isinstance(head, FusedHead):
        reason = reading_fault(sharded(model) or unwrapped(model), in_batches=False)
    elif reason is None:
        reason = "it has no output head"
    if reason is not None:
        raise UserError(f"no fused head for this model: {reason}")
    return ModelHead(model, head)


def _tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> _Tokens:
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} must be (B, T) with T at least 2: the first token "
            "has nothing to predict it"
        )
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    target = labels[:, 1:]
    # a row's first token has no predecessor, on whichever side the row is padded
    mask = (target != IGNORED) & attention_mask[:, :-1].bool()
    return _Tokens(input_ids, attention_mask, target.masked_fill(~mask, 0), mask)
