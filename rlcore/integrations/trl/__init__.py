"""TRL on rlcore's losses: one line in, one line out.

    from rlcore.integrations import trl as rl_trl

    rl_trl.patch()          # or: with rl_trl.patch(): ...
    trainer = GRPOTrainer(...); trainer.train()
    rl_trl.unpatch()

There are three seams, each taken only where this TRL's functions are the ones known here:

    policy      GRPO and RLOO: log-probabilities past the logits; the whole loss in one pass where
                its gradient follows from each token alone
    kernel      SFT, DPO and KTO from TRL 1.15 on: the head that TRL runs in chunks
    logits      SFT, DPO and KTO before: log-probabilities and entropies of the logits, and SFT's
                chunked cross-entropy in one pass

A reward model's head has one column, so there is nothing to fuse: RewardTrainer is left as it is.
TRL is imported when `patch` is called.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from rlcore.integrations.bindings import ChangedPeer, NamePatch, require_signature
from rlcore.integrations.trl import head as trl_head
from rlcore.integrations.trl import plans as trl_plans
from rlcore.integrations.trl import policy as trl_policy
from rlcore.integrations.trl.policy import FusedLogpsMixin

__all__ = ["ChangedPeer", "FusedLogpsMixin", "TRLPatch", "patch", "unpatch"]

logger = logging.getLogger(__name__)

STATISTICS_PARAMETERS = (
    "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    "compute_entropy", "compute_aux_loss", *trl_plans.MULTIMODAL,
)  # fmt: skip
# TRL 1.14 hands on what it is given
GENERAL_PARAMETERS = ("self", "model", "args", "batch_size", "compute_aux_loss", "kwargs")
LOSS_PARAMETERS = ("self", "model", "inputs")
SELECTIVE_PARAMETERS = ("logits", "index")
LATER_SELECTIVE_PARAMETERS = (*SELECTIVE_PARAMETERS, "temperature", "row_mask")
ENTROPY_PARAMETERS = ("logits", "chunk_size")

_active: TRLPatch | None = None


class TRLPatch(NamePatch):
    """A patch of TRL that is in place; `seams` names those taken, and by which trainers."""

    def __init__(self) -> None:
        super().__init__("trl")
        self.seams: dict[str, str] = {}


def patch() -> TRLPatch:
    """Serves TRL's trainers by rlcore in this process, those that exist already included.

    Returns:
        The patch, also a context manager that takes itself back; so does `unpatch()`.

    Raises:
        ChangedPeer: this TRL has other functions than those known; nothing is patched.
        ImportError: no TRL here.
        RuntimeError: TRL is patched already.
    """
    global _active
    if _active is not None and _active.in_place:
        raise RuntimeError("TRL is patched already: call unpatch() first")
    utils = importlib.import_module("trl.trainer.utils")
    made = TRLPatch()
    try:
        for seam in (_patch_policy, _patch_head):
            seam(made, utils)
    except BaseException:
        made.undo()
        raise
    _active = made
    for seam, where in made.seams.items():
        logger.info("%s: %s by the %s seam", _version(), where, seam)
    return made


def unpatch() -> None:
    """TRL as it was before `patch`; does nothing where it is not patched."""
    if _active is not None:
        _active.undo()


def _patch_policy(made: TRLPatch, utils: Any) -> None:
    methods = [
        (
            trl_policy.METHOD,
            (STATISTICS_PARAMETERS, GENERAL_PARAMETERS),
            trl_policy.token_statistics,
        ),
        ("_compute_loss", (LOSS_PARAMETERS,), trl_policy.policy_loss),
    ]
    trainers = [
        getattr(importlib.import_module(f"trl.trainer.{name.lower()}_trainer"), f"{name}Trainer")
        for name in ("GRPO", "RLOO")
    ]
    for name, known, _ in methods:
        for trainer in trainers:
            require_signature(getattr(trainer, name), *known, version=_version())
    for name, _, ours in methods:
        for trainer in trainers:
            made.set(trainer, name, _method(getattr(trainer, name), ours))
    made.seams["policy"] = "GRPO and RLOO"


def _method(theirs: Callable, ours: Callable) -> Callable:
    """A method that runs ours on the trainer, with TRL's own, bound to it, at hand."""

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        return ours(self, functools.partial(theirs, self), *args, **options)

    return method


def _patch_head(made: TRLPatch, utils: Any) -> None:
    if hasattr(utils, "add_fused_lm_head"):
        _patch_kernel(made, utils)
    else:
        _patch_logits(made, utils)


def _patch_kernel(made: TRLPatch, utils: Any) -> None:
    theirs = utils._ChunkedLogProbFunction
    if theirs is None:
        raise ChangedPeer(f"{_version()} has no chunked head without Triton: nothing was patched")
    known = trl_head.KERNEL_PARAMETERS
    require_signature(theirs.forward, known, version=_version())
    made.set(utils, "_ChunkedLogProbFunction", trl_head.make_kernel(theirs))
    by_triton = getattr(utils, "_use_triton", None)
    if by_triton is not None:
        # where TRL has no Triton it scores every position; rlcore wants the counted ones alone
        made.set(utils, "_use_triton", lambda device: device.type == "cpu" or by_triton(device))
    made.seams["kernel"] = "SFT, DPO and KTO"


def _patch_logits(made: TRLPatch, utils: Any) -> None:
    sft = importlib.import_module("trl.trainer.sft_trainer")
    for name in ("dpo", "kto"):
        importlib.import_module(f"trl.trainer.{name}_trainer")
    selective, entropy = utils.selective_log_softmax, utils.entropy_from_logits
    cross_entropy = sft._chunked_cross_entropy_loss
    selective_known = (SELECTIVE_PARAMETERS, LATER_SELECTIVE_PARAMETERS)
    require_signature(selective, *selective_known, version=_version())
    require_signature(entropy, ENTROPY_PARAMETERS, version=_version())
    known = trl_head.CROSS_ENTROPY_PARAMETERS
    require_signature(cross_entropy, known, version=_version())
    ours = trl_head.make_selective_log_softmax(selective)
    made.replace("selective_log_softmax", selective, ours)
    made.replace("entropy_from_logits", entropy, trl_head.make_entropy(entropy))
    ours = trl_head.make_cross_entropy(cross_entropy)
    made.replace("_chunked_cross_entropy_loss", cross_entropy, ours)
    made.seams["logits"] = "SFT, DPO and KTO"


def _version() -> str:
    return f"trl {importlib.import_module('trl').__version__}"
