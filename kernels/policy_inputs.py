"""From the arguments of a policy loss to what its kernels take: checks, options, weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .aggregation import token_weight
from .checks import check_finite, check_name, check_per_token, check_positive, check_rows
from .kl import KL_ESTIMATORS
from .reference import statistics_dtype
from .surrogates import SURROGATES, PolicyOptions


class PolicyInputs(NamedTuple):
    """Checked inputs; per_token is [advantage, old_logp, ref_logp, importance_sampling_ratio]."""

    options: PolicyOptions
    mask: Tensor
    weight: Tensor
    per_token: list[Tensor | None]


def prepare_policy(
    rows: Tensor,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    mask: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    *,
    surrogate: str,
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    beta: float,
    kl_estimator: str,
    entropy_coef: float,
    temperature: float,
    importance_sampling_level: str,
    loss_agg_mode: str,
    num_items: int | float | Tensor | None,
    norm_length: int | float | None,
    cu_seqlens: Tensor | None,
    surrogate_params: dict[str, float] | None,
    name: str = "logits",
) -> PolicyInputs:
    """Checks the arguments of `policy_loss`; `rows` are the logits or, by `name`, the hidden."""
    check_rows(rows, target, mask=mask, temperature=temperature, name=name)
    check_positive(epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)
    check_finite(beta=beta, entropy_coef=entropy_coef)
    check_name("surrogate", surrogate, SURROGATES)
    check_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_name("importance_sampling_level", importance_sampling_level, ("token",))
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta is {beta} but ref_logp is None: pass ref_logp or set beta to 0")
    parameters = _parameters(surrogate, old_logp, epsilon, epsilon_high, delta, surrogate_params)
    options = PolicyOptions(surrogate, parameters, kl_estimator, float(beta), float(entropy_coef))
    dtype = statistics_dtype(rows)
    if mask is None:
        mask = torch.ones(target.shape, dtype=torch.bool, device=rows.device)
    weight = token_weight(
        mask.contiguous(), loss_agg_mode, num_items=num_items, norm_length=norm_length,
        cu_seqlens=cu_seqlens, dtype=dtype,
    ).contiguous()  # fmt: skip
    per_token = [
        _per_token(label, value, rows, dtype)
        for label, value in {
            "advantage": advantage, "old_logp": old_logp, "ref_logp": ref_logp,
            "importance_sampling_ratio": importance_sampling_ratio,
        }.items()
    ]  # fmt: skip
    return PolicyInputs(options, mask, weight, per_token)


def _parameters(surrogate, old_logp, epsilon, epsilon_high, delta, surrogate_params):
    """The surrogate's parameters in its order; what it has no use for is refused."""
    entry = SURROGATES[surrogate]
    values = {"epsilon": epsilon, "epsilon_high": epsilon if epsilon_high is None else epsilon_high}
    values["delta"] = float("inf") if delta is None else delta
    for name, value in {"epsilon_high": epsilon_high, "delta": delta}.items():
        if value is not None and name not in entry.parameters:
            raise ValueError(f"surrogate {surrogate!r} does not use {name}: leave it None")
    if old_logp is not None and not entry.has_ratio:
        raise ValueError(
            f"surrogate {surrogate!r} has no importance ratio, so it takes no old_logp: leave it "
            "None, or pass importance_sampling_ratio"
        )
    for name, value in (surrogate_params or {}).items():
        if name in values or name not in entry.parameters:
            known = [p for p in entry.parameters if p not in values]
            raise ValueError(f"surrogate_params of {surrogate!r} may hold {known}, got {name!r}")
        values[name] = value
    missing = [name for name in entry.parameters if name not in values]
    if missing:
        raise ValueError(f"surrogate {surrogate!r} needs surrogate_params {missing}")
    return tuple(float(values[name]) for name in entry.parameters)


def _per_token(name: str, value: Tensor | None, rows: Tensor, dtype: torch.dtype):
    """A detached, contiguous value a token, in the statistics' dtype; (B,) is spread over T."""
    if value is None:
        return None
    if rows.dim() == 3 and value.shape == rows.shape[:1] and name not in (
        "old_logp", "ref_logp"
    ):  # fmt: skip
        value = value[:, None].expand(rows.shape[:-1])
    check_per_token(name, value, rows)
    return value.detach().to(dtype).contiguous()
