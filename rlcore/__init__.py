"""Exact fused loss kernels and readable trainers for reinforcement learning of language models.

The functional API: pure functions on tensors, served by Triton kernels on a GPU and by blocked
PyTorch elsewhere. Names are imported when first used, so that `import rlcore` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .advantages import group_advantage, leave_one_out_advantage, whiten
    from .controllers import ppo_kl_coef, proportional_kl_coef
    from .corrections import clip_cov_weight, importance_weights, kl_cov_mask
    from .kernels.backend import use_backend
    from .kernels.categorical import categorical_kl
    from .kernels.fisher import fisher_vector_product
    from .kernels.linear_categorical import linear_categorical_kl
    from .kernels.linear_head import linear_policy_loss, linear_token_logprob, plan_linear
    from .kernels.linear_plan import LinearPlan
    from .kernels.linear_preference import linear_preference_loss
    from .kernels.policy_loss import PolicyLoss, policy_loss
    from .kernels.preference_loss import PreferenceLoss, kto_loss, preference_loss
    from .kernels.scan import (
        GAE,
        GAEFromScores,
        discounted_return,
        gae,
        gae_from_scores,
        shaped_reward,
    )
    from .kernels.surrogate_registration import register_surrogate
    from .kernels.token_logprob import TokenLogprob, token_logprob
    from .losses import pairwise_reward_loss, token_kl, value_loss
    from .model_head import ModelHead, fused_head
    from .trust_region import CGResult, LineSearch, conjugate_gradient, line_search

_HOMES = {
    "CGResult": "trust_region",
    "GAE": "kernels.scan",
    "GAEFromScores": "kernels.scan",
    "LineSearch": "trust_region",
    "LinearPlan": "kernels.linear_plan",
    "ModelHead": "model_head",
    "PolicyLoss": "kernels.policy_loss",
    "PreferenceLoss": "kernels.preference_loss",
    "TokenLogprob": "kernels.token_logprob",
    "categorical_kl": "kernels.categorical",
    "clip_cov_weight": "corrections",
    "conjugate_gradient": "trust_region",
    "discounted_return": "kernels.scan",
    "fisher_vector_product": "kernels.fisher",
    "fused_head": "model_head",
    "gae": "kernels.scan",
    "gae_from_scores": "kernels.scan",
    "group_advantage": "advantages",
    "importance_weights": "corrections",
    "kl_cov_mask": "corrections",
    "kto_loss": "kernels.preference_loss",
    "leave_one_out_advantage": "advantages",
    "line_search": "trust_region",
    "linear_categorical_kl": "kernels.linear_categorical",
    "linear_policy_loss": "kernels.linear_head",
    "linear_preference_loss": "kernels.linear_preference",
    "linear_token_logprob": "kernels.linear_head",
    "pairwise_reward_loss": "losses",
    "plan_linear": "kernels.linear_head",
    "policy_loss": "kernels.policy_loss",
    "ppo_kl_coef": "controllers",
    "preference_loss": "kernels.preference_loss",
    "proportional_kl_coef": "controllers",
    "register_surrogate": "kernels.surrogate_registration",
    "shaped_reward": "kernels.scan",
    "token_kl": "losses",
    "token_logprob": "kernels.token_logprob",
    "use_backend": "kernels.backend",
    "value_loss": "losses",
    "whiten": "advantages",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'rlcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
