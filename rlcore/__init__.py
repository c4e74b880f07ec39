"""Exact fused loss kernels and readable trainers for reinforcement learning of language models.

The functional API: pure functions on tensors, served by Triton kernels on a GPU and by blocked
PyTorch elsewhere. Names are imported when first used, so that `import rlcore` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .functional.advantages import (
        decoupled_group_advantage,
        group_advantage,
        leave_one_out_advantage,
        whiten,
    )
    from .functional.corrections import (
        clip_cov_weight,
        future_kl_weight,
        importance_weights,
        kl_cov_mask,
    )
    from .functional.kl_control import ppo_kl_coef, proportional_kl_coef
    from .functional.losses import pairwise_reward_loss, token_kl, value_loss
    from .functional.masks import (
        high_entropy_mask,
        off_policy_mask,
        rejection_mask,
        second_moment_mask,
    )
    from .functional.trust_region import CGResult, LineSearch, conjugate_gradient, line_search
    from .kernels.backend import use_backend
    from .kernels.formulas.registration import register_surrogate
    from .kernels.head.divergence import linear_categorical_divergence
    from .kernels.head.kl import linear_categorical_kl
    from .kernels.head.pairs import linear_preference_loss
    from .kernels.head.plan import LinearPlan
    from .kernels.head.tokens import linear_policy_loss, linear_token_logprob, plan_linear
    from .kernels.pairs.kto_loss import kto_loss
    from .kernels.pairs.preference_loss import PreferenceLoss, preference_loss
    from .kernels.rows.categorical_divergence import categorical_divergence
    from .kernels.rows.categorical_kl import categorical_kl
    from .kernels.rows.fisher import fisher_vector_product
    from .kernels.rows.policy_loss import PolicyLoss, policy_loss
    from .kernels.rows.token_logprob import TokenLogprob, token_logprob
    from .kernels.rows.topk_divergence import topk_divergence
    from .kernels.scans.scan import (
        GAE,
        GAEFromScores,
        discounted_return,
        gae,
        gae_from_scores,
        shaped_reward,
    )
    from .models.fused_head import ModelHead, fused_head

_HOMES = {
    "CGResult": "functional.trust_region",
    "GAE": "kernels.scans.scan",
    "GAEFromScores": "kernels.scans.scan",
    "LineSearch": "functional.trust_region",
    "LinearPlan": "kernels.head.plan",
    "ModelHead": "models.fused_head",
    "PolicyLoss": "kernels.rows.policy_loss",
    "PreferenceLoss": "kernels.pairs.preference_loss",
    "TokenLogprob": "kernels.rows.token_logprob",
    "categorical_divergence": "kernels.rows.categorical_divergence",
    "categorical_kl": "kernels.rows.categorical_kl",
    "clip_cov_weight": "functional.corrections",
    "conjugate_gradient": "functional.trust_region",
    "decoupled_group_advantage": "functional.advantages",
    "discounted_return": "kernels.scans.scan",
    "fisher_vector_product": "kernels.rows.fisher",
    "fused_head": "models.fused_head",
    "future_kl_weight": "functional.corrections",
    "gae": "kernels.scans.scan",
    "gae_from_scores": "kernels.scans.scan",
    "group_advantage": "functional.advantages",
    "high_entropy_mask": "functional.masks",
    "importance_weights": "functional.corrections",
    "kl_cov_mask": "functional.corrections",
    "kto_loss": "kernels.pairs.kto_loss",
    "leave_one_out_advantage": "functional.advantages",
    "line_search": "functional.trust_region",
    "linear_categorical_divergence": "kernels.head.divergence",
    "linear_categorical_kl": "kernels.head.kl",
    "linear_policy_loss": "kernels.head.tokens",
    "linear_preference_loss": "kernels.head.pairs",
    "linear_token_logprob": "kernels.head.tokens",
    "off_policy_mask": "functional.masks",
    "pairwise_reward_loss": "functional.losses",
    "plan_linear": "kernels.head.tokens",
    "policy_loss": "kernels.rows.policy_loss",
    "ppo_kl_coef": "functional.kl_control",
    "preference_loss": "kernels.pairs.preference_loss",
    "proportional_kl_coef": "functional.kl_control",
    "register_surrogate": "kernels.formulas.registration",
    "rejection_mask": "functional.masks",
    "second_moment_mask": "functional.masks",
    "shaped_reward": "kernels.scans.scan",
    "token_kl": "functional.losses",
    "token_logprob": "kernels.rows.token_logprob",
    "topk_divergence": "kernels.rows.topk_divergence",
    "use_backend": "kernels.backend",
    "value_loss": "functional.losses",
    "whiten": "functional.advantages",
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
