"""GRPO and RLOO of TRL: per-token log-probabilities, and the whole policy loss in one pass.

Of a loss L(logp_t) the fused head makes the value and the gradient in one pass over the logits
where dL/dlogp_t follows from the token alone. TRL's own formulas then run on the per-token values,
for its metrics and as a check: the number that is logged is TRL's, the gradient is the fused one's.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.integrations.logp_loss import policy_loss_from_logp
from rlcore.integrations.patching import Patch
from rlcore.integrations.trl.plans import PLANS, tokens_of
from rlcore.models.forward import unwrapped
from rlcore.models.heads import FusedHead, choose_head, joined, stopped_at

logger = logging.getLogger("rlcore.integrations.trl")

METHOD = "_get_per_token_logps_and_entropies"
# RLOO's ratio of a sequence is 1 up to the rounding of two passes
GRADIENT_TOLERANCE = 1e-3
Statistics = tuple[Tensor, Tensor | None, Tensor | None]  # logp, entropy, auxiliary loss

_heads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_said: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# trainers whose own loss was not the fused one: they get fused log-probabilities
_differing: weakref.WeakSet = weakref.WeakSet()


class FusedLogpsMixin:
    """Fused log-probabilities and losses for a GRPOTrainer or RLOOTrainer of one's own.

    class Trainer(FusedLogpsMixin, GRPOTrainer): ...

    does for that class what `patch()` does for all.
    """

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Statistics:
        theirs = super()._get_per_token_logps_and_entropies
        return token_statistics(self, theirs, *args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return policy_loss(self, super()._compute_loss, model, inputs)


def token_statistics(
    trainer: Any,
    theirs: Callable[..., Statistics],
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **multimodal: Any,
) -> Statistics:
    """TRL's method of that name past the logits: logp and entropy (B, C), C = logits_to_keep.

    Images, router losses and heads that are no plain linear layer go to TRL's own, `theirs`.
    """
    head = None
    if compute_aux_loss:
        _say(trainer, "a router's loss is asked for: TRL computes the log-probabilities")
    elif any(value is not None for value in multimodal.values()):
        _say(trainer, "the batch has more than tokens: TRL computes the log-probabilities")
    else:
        head = _head_of(trainer, model)
    if head is None:
        return theirs(
            model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
            compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss, **multimodal,
        )  # fmt: skip
    rows = batch_size or len(input_ids)
    parts = []
    for ids, attention in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
        hidden = _hidden(trainer, head, model, ids, attention, logits_to_keep)
        with _products(trainer, hidden):
            out = rl.linear_token_logprob(
                hidden, head.layer.weight, ids[:, -logits_to_keep:],
                mask=attention[:, -logits_to_keep:].bool(), temperature=trainer.temperature,
                entropy=compute_entropy, **head.options(),
            )  # fmt: skip
        parts.append(out)
    logp = torch.cat([part.logp for part in parts])
    return logp, torch.cat([part.entropy for part in parts]) if compute_entropy else None, None


def policy_loss(
    trainer: Any, theirs: Callable[..., Tensor], model: Any, inputs: dict[str, Any]
) -> Tensor:
    """TRL's `_compute_loss`, its gradient made in one pass where the loss is one of ours.

    Elsewhere TRL's own loss runs, on fused log-probabilities, and the log says why.
    """
    if METHOD in vars(trainer):  # someone's own, or ours of an outer call
        return theirs(model, inputs)
    kind = next(PLANS[c.__name__] for c in type(trainer).__mro__ if c.__name__ in PLANS)
    plan = "its loss was not the fused one" if trainer in _differing else kind(trainer, inputs)
    if isinstance(plan, str):
        _say(trainer, f"fused log-probabilities alone: {plan}", logging.INFO)
        return theirs(model, inputs)
    head = _head_of(trainer, model)
    if head is None:
        return theirs(model, inputs)
    _say(trainer, "the whole policy loss is fused", logging.INFO)
    ids, attention, mask = tokens_of(inputs)
    count = mask.shape[1]
    hidden = _hidden(trainer, head, model, ids, attention, count)
    with _products(trainer, hidden):
        ours = rl.linear_policy_loss(
            hidden, head.layer.weight, ids[:, -count:], inputs["advantages"], mask=mask,
            temperature=trainer.temperature, **head.options(), **plan,
        )  # fmt: skip
    value = _checked(trainer, theirs, model, inputs, plan, ours, mask)
    if value is None:
        _differing.add(trainer)
        _say(trainer, "TRL's loss is not the fused one here: fused log-probabilities from now on")
        return theirs(model, inputs)
    return value + (ours.loss - ours.loss.detach())


def _checked(
    trainer: Any, theirs: Callable[..., Tensor], model: Any, inputs: dict, plan: dict,
    ours: rl.PolicyLoss, mask: Tensor,
) -> Tensor | None:  # fmt: skip
    """TRL's loss on our per-token values, its metrics logged; None if its gradient is not ours."""
    logp = ours.logp
    if inputs.get("old_per_token_logps") is not None:
        # what does not count has a ratio of 1 in TRL's formulas, which multiply by the mask
        logp = torch.where(mask, logp, inputs["old_per_token_logps"])
    logp = logp.detach().requires_grad_(torch.is_grad_enabled())
    with Patch() as patch:
        # the trainer finds its statistics already computed
        patch.set(trainer, METHOD, lambda *_, **__: (logp, ours.entropy, None))
        value = theirs(model, inputs)
    if not logp.requires_grad:
        return value
    formula = policy_loss_from_logp(logp, inputs["advantages"], mask=mask, **plan).loss
    dlogp, theirs_dlogp = (torch.autograd.grad(loss, logp)[0] for loss in (formula, value))
    agree = (dlogp - theirs_dlogp).abs().max() <= GRADIENT_TOLERANCE * theirs_dlogp.abs().max()
    return value.detach() if agree else None


def _head_of(trainer: Any, model: Any) -> FusedHead | None:
    """The fused head of the model, found once; None where TRL's own way has to do."""
    core = unwrapped(model)
    if core not in _heads:
        _heads[core] = _find_head(core, model)
    found = _heads[core]
    if isinstance(found, str):
        _say(trainer, f"TRL computes the log-probabilities: {found}")
        return None
    return found


def _find_head(core: Any, model: Any) -> FusedHead | str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP1 hides the head's weight (FSDP2 does not)"
    if any(hasattr(parameter, "ds_id") for parameter in core.parameters()):
        return "DeepSpeed ZeRO-3 hides the head's weight"
    if getattr(core.config, "vision_config", None) is not None:
        return "the model also sees images"
    head, reason = choose_head(model, fused=True)
    return head if isinstance(head, FusedHead) else reason or "the model has no output head"


def _hidden(
    trainer: Any, head: FusedHead, model: Any, ids: Tensor, attention: Tensor, count: int
) -> Tensor:
    """(B, count, H): what the head would have turned into the completions' logits."""
    with stopped_at(head.layer) as seen, trainer.accelerator.autocast():
        # positions are the model's own choice, as they are in TRL
        outputs = model(input_ids=ids, attention_mask=attention, use_cache=False)
    hidden = joined(seen[-1], outputs.logits, model)[:, -count - 1 : -1]
    return hidden.float() if getattr(trainer.args, "cast_lm_head_to_fp32", False) else hidden


def _products(trainer: Any, hidden: Tensor) -> contextlib.AbstractContextManager:
    """The precision that TRL's own head would run in."""
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        return torch.autocast(hidden.device.type, enabled=False)
    return trainer.accelerator.autocast()


def _say(trainer: Any, what: str, level: int = logging.WARNING) -> None:
    """Once for each trainer."""
    said = _said.setdefault(trainer, set())
    if what not in said:
        said.add(what)
        logger.log(level, "%s: %s", type(trainer).__name__, what)
