"""OpenRLHF on rlcore: the actor's log-probabilities and entropy, and its loss objects.

    patch()      serves them by rlcore in every instance, made before or after
    unpatch()    puts OpenRLHF's own back

openrlhf is imported when it is patched. What a loss is set to that rlcore does not compute alike is
left to OpenRLHF's own method, and one log line says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlcore.functional.losses import pairwise_reward_loss, value_loss
from rlcore.integrations.bindings import NamePatch, require_signature
from rlcore.integrations.logp_loss import policy_loss_from_logp
from rlcore.kernels.formulas.sequence_ratio import sequence_mean
from rlcore.kernels.limits import log_ratio
from rlcore.kernels.pairs.preference_loss import preference_loss
from rlcore.kernels.rows.token_logprob import token_logprob

logger = logging.getLogger(__name__)

# OpenRLHF holds a token's log-ratio at this, with no gradient; as a bound on the ratio
RATIO_BOUND = math.exp(20.0)
COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")
POLICY = (
    "self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs",
)  # fmt: skip
VALUE = ("self", "values", "old_values", "returns", "action_mask")
PAIRWISE = ("self", "chosen_reward", "reject_reward", "margin")
DPO = (
    "self", "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
    "reference_rejected_logps",
)  # fmt: skip
LEVELS = {"ppo": "token", "gspo": "sequence"}

_active: NamePatch | None = None
_told: set[str] = set()


def patch() -> NamePatch:
    """Serves OpenRLHF's actor and losses by rlcore, in this process.

    log_probs_from_logits, compute_entropy    by `rl.token_logprob`, wherever they are bound
    PolicyLoss.forward      by the surrogate "ppo_clip", at sequence level for gspo; with a
                            correction for the sampler's probabilities switched on: OpenRLHF's own
    ValueLoss.forward       by `rl.value_loss`; with token_level_loss=False: OpenRLHF's own
    PairWiseLoss.forward    by `rl.pairwise_reward_loss`
    DPOLoss.forward         by `rl.preference_loss`, "sigmoid" or "ipo"

    Returns:
        The patch, also a context manager that takes itself back; so does `unpatch()`.

    Raises:
        ChangedPeer: one of the functions has other parameters than known; nothing is patched.
        RuntimeError: the patch is in place already.
    """
    global _active
    if _active is not None and _active.in_place:
        raise RuntimeError("OpenRLHF is patched already: call unpatch() first")
    utils = importlib.import_module("openrlhf.models.utils")
    importlib.import_module("openrlhf.models.actor")
    losses = importlib.import_module("openrlhf.models.loss")
    version = f"openrlhf {importlib.metadata.version('openrlhf')}"
    require_signature(
        utils.log_probs_from_logits, ("logits", "labels", "temperature"), version=version
    )
    require_signature(utils.compute_entropy, ("logits",), version=version)
    for name, (_, *known) in LOSSES.items():
        require_signature(getattr(losses, name).forward, *known, version=version)
    patch = NamePatch("openrlhf")
    patch.replace("log_probs_from_logits", utils.log_probs_from_logits, log_probs_from_logits)
    patch.replace("compute_entropy", utils.compute_entropy, compute_entropy)
    for name, (make_forward, *_) in LOSSES.items():
        loss = getattr(losses, name)
        patch.set(loss, "forward", make_forward(loss.forward))
    logger.info("%s: the actor's log-probabilities, entropy and losses are rlcore's", version)
    _active = patch
    return patch


def unpatch() -> None:
    """Takes `patch()` back: every attribute is what it was. Without a patch it does nothing."""
    if _active is not None:
        _active.undo()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[label], of labels' shape; the logits stay as they are."""
    return token_logprob(logits, labels, temperature=temperature, entropy=False).logp


def compute_entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(logits), (...) for logits (..., V)."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logprob(logits, target).entropy


def _aggregation(
    token_level_loss: bool,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> dict[str, Any]:
    """OpenRLHF's `aggregate_loss` as options of a policy loss; ranks' gradients are averaged."""
    count = batch_num_tokens if token_level_loss else global_batch_size
    return {
        "loss_agg_mode": "token-mean" if token_level_loss else "seq-mean-token-mean",
        "num_items": None if count is None else count / dp_size,
    }


def _bool_mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    if action_mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return action_mask.bool()


def _leave(loss: nn.Module, setting: str) -> None:
    """Says, once for each, what is left to OpenRLHF."""
    reason = f"{type(loss).__name__} with {setting} is OpenRLHF's own"
    if reason not in _told:
        _told.add(reason)
        logger.info(reason)


def _policy_forward(theirs: Callable) -> Callable:
    def forward(
        self: nn.Module,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        **counts: Any,
    ) -> tuple[Tensor | None, ...]:
        """(loss, share of clipped tokens, KL(old || new), None), from 0.11.2 on one more None."""
        kind = self.policy_loss_type
        setting = _correction(self) or (None if kind in LEVELS else f"policy_loss_type={kind!r}")
        if setting is not None:
            _leave(self, setting)
            arguments = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs)
            return theirs(self, *arguments, **counts)
        mask = _bool_mask(action_mask, log_probs)
        bound = RATIO_BOUND if self.dual_clip is None else self.dual_clip
        output = policy_loss_from_logp(
            log_probs, advantages, old_logp=old_log_probs, mask=mask,
            epsilon=self.clip_eps_low, epsilon_high=self.clip_eps_high, delta=bound,
            importance_sampling_level=LEVELS[kind],
            **_aggregation(self.token_level_loss, **counts),
        )  # fmt: skip
        x = torch.where(mask, log_ratio(log_probs.detach(), old_log_probs), 0.0)
        shared = sequence_mean(x, mask, None) if kind == "gspo" else x
        # OpenRLHF does not count what the dual clip holds, where the advantage is negative
        clipped = output.clipped & ((advantages > 0) | (shared < 0))
        tokens = mask.sum().to(x.dtype)
        metrics = (clipped.sum() / tokens, -x.sum() / tokens, None)
        return output.loss, *metrics, *((None,) if hasattr(self, "is_correction_level") else ())

    return forward


def _correction(loss: nn.Module) -> str | None:
    """The setting that corrects for the sampler's probabilities, None where it is off."""
    if getattr(loss, "is_correction_level", "off") != "off":
        return f"is_correction_level={loss.is_correction_level!r}"
    # its name before 0.11.2
    return (
        "enable_vllm_is_correction" if getattr(loss, "enable_vllm_is_correction", False) else None
    )


def _value_forward(theirs: Callable) -> Callable:
    def forward(
        self: nn.Module,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        **counts: Any,
    ) -> Tensor:
        if not self.token_level_loss:
            _leave(self, "token_level_loss=False")
            return theirs(self, values, old_values, returns, action_mask, **counts)
        return value_loss(
            values,
            old_values,
            returns,
            epsilon=math.inf if self.clip_eps is None else self.clip_eps,
            mask=_bool_mask(action_mask, values),
            num_items=_aggregation(True, **counts)["num_items"],
        )

    return forward


def _pairwise_forward(theirs: Callable) -> Callable:
    def forward(
        self: nn.Module,
        chosen_reward: Tensor,
        reject_reward: Tensor,
        margin: Tensor | None = None,
    ) -> Tensor:
        margin = None if margin is None else margin.flatten()
        return pairwise_reward_loss(chosen_reward.flatten(), reject_reward.flatten(), margin=margin)

    return forward


def _dpo_forward(theirs: Callable) -> Callable:
    def forward(
        self: nn.Module,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = {"loss_type": "ipo"} if self.ipo else {"label_smoothing": self.label_smoothing}
        output = preference_loss(
            policy_chosen_logps, policy_rejected_logps,
            reference_chosen_logps, reference_rejected_logps, beta=self.beta, **options,
        )  # fmt: skip
        return output.loss, output.chosen_reward, output.rejected_reward

    return forward


# each loss's forward, and the parameters it may have: 0.10 has no counts of the global batch
LOSSES: dict[str, tuple] = {
    "PolicyLoss": (_policy_forward, POLICY, (*POLICY, *COUNTS)),
    "ValueLoss": (_value_forward, VALUE, (*VALUE, *COUNTS)),
    "PairWiseLoss": (_pairwise_forward, PAIRWISE),
    "DPOLoss": (_dpo_forward, DPO),
}
