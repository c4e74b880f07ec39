"""verl on rlcore: losses and advantages in its registries, and its log-probabilities patched.

    register()   adds rlcore_ppo, rlcore_gspo, rlcore_grpo, ... to verl's registries
    patch()      serves logprobs_from_logits, linear_cross_entropy and GAE by rlcore
    unpatch()    puts verl's own back

verl is imported when one of them is called. From verl 0.9 on an installed rlcore registers itself
(entry-point group verl.plugins); for 0.7 and 0.8 set
VERL_USE_EXTERNAL_MODULES=rlcore.integrations.verl_plugin.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlcore.integrations.bindings import NamePatch, require_signature
from rlcore.integrations.verl.advantages import ESTIMATORS, gae
from rlcore.integrations.verl.losses import LOSSES, make_policy_loss
from rlcore.kernels.head.tokens import linear_token_logprob
from rlcore.kernels.rows.token_logprob import token_logprob

logger = logging.getLogger(__name__)

LOSS_PARAMETERS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config",
    "rollout_is_weights",
)  # fmt: skip
GAE_PARAMETERS = ("token_level_rewards", "values", "response_mask", "gamma", "lam")
# what the trainer hands to an estimator depends on no name, so one of them stands for all
GROUP_PARAMETERS = ("token_level_rewards", "response_mask", "index", "epsilon", "config", "kwargs")
LOGPROB_PARAMETERS = ("logits", "labels", "inplace_backward")
CROSS_ENTROPY_PARAMETERS = (
    "ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group",
)  # fmt: skip

_active: NamePatch | None = None


def register() -> None:
    """Adds LOSSES and ESTIMATORS to verl's registries; a second call changes nothing.

    Raises:
        ChangedPeer: this verl calls losses or estimators otherwise; nothing is registered.
        ImportError: verl's core_algos does not import here.
    """
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    require_signature(core.compute_policy_loss_vanilla, LOSS_PARAMETERS, version=_version())
    require_signature(core.compute_rloo_outcome_advantage, GROUP_PARAMETERS, version=_version())
    for name in LOSSES:
        if name not in core.POLICY_LOSS_REGISTRY:
            core.register_policy_loss(name)(make_policy_loss(name))
    for name, estimator in ESTIMATORS.items():
        core.register_adv_est(name)(estimator)


def patch() -> NamePatch:
    """Serves verl's log-probabilities, its fused head and its GAE by rlcore, in this process.

    logprobs_from_logits    by `rl.token_logprob`, in every verl module that binds the name
    linear_cross_entropy    by `rl.linear_token_logprob` (actor ... use_fused_kernels=True,
                            fused_kernel_options.impl_backend=triton); a vocabulary-parallel call
                            or another reduction than "none" goes to verl's own
    compute_gae_advantage_return    by `rl.gae` and `rl.whiten`

    Returns:
        The patch, also a context manager that takes itself back; so does `unpatch()`.

    Raises:
        ChangedPeer: one of the functions has other parameters than known; nothing is patched.
        RuntimeError: the patch is in place already.
    """
    global _active
    if _active is not None and _active.in_place:
        raise RuntimeError("verl is patched already: call unpatch() first")
    functional = importlib.import_module("verl.utils.torch_functional")
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    known = [
        (functional.logprobs_from_logits, LOGPROB_PARAMETERS),
        (fused.LinearCrossEntropy.forward, CROSS_ENTROPY_PARAMETERS),
        (core.compute_gae_advantage_return, GAE_PARAMETERS),
    ]
    for function, parameters in known:
        require_signature(function, parameters, version=_version())
    fallback = fused.linear_cross_entropy
    patch = NamePatch("verl")
    patch.replace("logprobs_from_logits", functional.logprobs_from_logits, logprobs_from_logits)
    patch.replace("linear_cross_entropy", fallback, _make_linear_cross_entropy(fallback))
    patch.replace("compute_gae_advantage_return", core.compute_gae_advantage_return, gae)
    logger.info("%s: log-probabilities, the fused head and GAE are served by rlcore", _version())
    _active = patch
    return patch


def unpatch() -> None:
    """Takes `patch()` back: every attribute is what it was. Without a patch it does nothing."""
    if _active is not None:
        _active.undo()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits)[label], float32 (float64 for float64 logits), of labels' shape.

    Args:
        logits: (..., V).
        labels: integers (...) in [0, V).
        inplace_backward: permits the gradient to take the logits' storage, as verl's own does with
            flash-attn; of no effect where that storage is a leaf's, or shared by expansion.
    """
    # only other shapes are flattened, which copies strided logits
    rows = logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])
    owner = rows if rows._base is None else rows._base
    is_expanded = any(n > 1 and s == 0 for n, s in zip(rows.shape, rows.stride(), strict=True))
    logp = token_logprob(
        rows,
        labels.reshape(rows.shape[:-1]),
        entropy=False,
        inplace_backward=inplace_backward and not owner.is_leaf and not is_expanded,
    ).logp
    return logp.view(labels.shape)


def _make_linear_cross_entropy(fallback: Callable) -> Callable[..., Any]:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(logp, entropy), each (N,), of a head without bias on hidden (..., H) or (N, H)."""
        if dist_process_group is not None or reduction.lower() != "none":
            return fallback(hidden, weight, labels, temperature, reduction, dist_process_group)
        logp, entropy, _ = linear_token_logprob(
            hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1),
            temperature=temperature,
        )  # fmt: skip
        return logp, entropy

    return linear_cross_entropy


def _version() -> str:
    return f"verl {importlib.import_module('verl').__version__}"
