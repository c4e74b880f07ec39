"""The scans as operators, registered for graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..implementation import implementation
from .checks import result_dtype


def run_gae(
    reward: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    last_value: Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(advantage, returns); without a value the advantage is an empty tensor."""
    given = (reward, value, mask, terminated, last_value)
    return implementation(backend).gae(*given, gamma, lam, result_dtype(reward, value, last_value))


gae_op = torch.library.custom_op("rlcore::gae", run_gae, mutates_args=())


@gae_op.register_fake
def _(reward, value, mask, terminated, last_value, gamma, lam, backend):
    dtype = result_dtype(reward, value, last_value)
    returns = torch.empty(reward.shape, dtype=dtype, device=reward.device)
    return returns.new_empty(0 if value is None else reward.shape), returns


def run_shaped_reward(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    beta: float,
    kl_estimator: str,
    backend: str,
) -> Tensor:
    dtype = result_dtype(score, logp, ref_logp)
    given = (score, logp, ref_logp, mask, beta, kl_estimator, dtype)
    return implementation(backend).shaped_reward(*given)


shaped_reward_op = torch.library.custom_op(
    "rlcore::shaped_reward", run_shaped_reward, mutates_args=()
)


@shaped_reward_op.register_fake
def _(score, logp, ref_logp, *_):
    return logp.new_empty(logp.shape, dtype=result_dtype(score, logp, ref_logp))


def run_gae_from_scores(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    value: Tensor,
    mask: Tensor,
    terminated: Tensor | None,
    last_value: Tensor | None,
    beta: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantage, returns, moments (3, B): count, mean and squared deviations of each row)."""
    dtype = result_dtype(score, logp, ref_logp, value, last_value)
    given = (score, logp, ref_logp, value, mask, terminated, last_value)
    numbers = (beta, kl_estimator, gamma, lam, dtype)
    return implementation(backend).gae_from_scores(*given, *numbers)


gae_from_scores_op = torch.library.custom_op(
    "rlcore::gae_from_scores", run_gae_from_scores, mutates_args=()
)


@gae_from_scores_op.register_fake
def _(score, logp, ref_logp, value, mask, terminated, last_value, *_):
    dtype = result_dtype(score, logp, ref_logp, value, last_value)
    advantage = logp.new_empty(logp.shape, dtype=dtype)
    return advantage, torch.empty_like(advantage), advantage.new_empty((3, logp.shape[0]))
