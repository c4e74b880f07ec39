"""From the arguments of a policy loss to what its kernels take: checks, options, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import statistics_dtype
from ..checks import (
    check_finite,
    check_name,
    check_numbers,
    check_per_token,
    check_positive,
    check_rows,
)
from ..formulas.kl import POLICY_KL_ESTIMATORS
from ..formulas.sequences import token_weight
from ..formulas.surrogates import LEVELS, SURROGATES, PolicyOptions
from ..implementation import implementation

# parameters of surrogates that are arguments of every policy loss
SHARED = ("epsilon", "epsilon_high", "delta")


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
    check_name("kl_estimator", kl_estimator, POLICY_KL_ESTIMATORS)
    if kl_estimator == "k3_ratio" and SURROGATES[surrogate].clip_token is not None:
        raise ValueError(
            f"kl_estimator 'k3_ratio' needs pi / pi_old, of which surrogate {surrogate!r} clips "
            "the tokens: use 'k1', 'k2' or 'k3'"
        )
    _check_level(surrogate, importance_sampling_level, rows, loss_agg_mode, cu_seqlens)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta is {beta} but ref_logp is None: pass ref_logp or set beta to 0")
    parameters = _parameters(surrogate, old_logp, epsilon, epsilon_high, delta, surrogate_params)
    options = PolicyOptions(
        surrogate, parameters, kl_estimator, float(beta), float(entropy_coef),
        importance_sampling_level,
    )  # fmt: skip
    dtype = statistics_dtype(rows)
    if mask is None:
        mask = torch.ones(target.shape, dtype=torch.bool, device=rows.device)
    weight = token_weight(
        mask.contiguous(), loss_agg_mode, num_items=num_items, norm_length=norm_length,
        cu_seqlens=cu_seqlens, dtype=dtype,
    ).contiguous()  # fmt: skip
    per_token = [
        _per_token(label, value, rows, name)
        for label, value in {
            "advantage": advantage, "old_logp": old_logp, "ref_logp": ref_logp,
            "importance_sampling_ratio": importance_sampling_ratio,
        }.items()
    ]  # fmt: skip
    return PolicyInputs(options, mask, weight, per_token)


def knows_derivative(options: PolicyOptions, backend: str) -> bool:
    """Whether a token's dloss/dlogp follows from the token alone, by a formula of the backend."""
    has_formula = implementation(backend).has_formula(options.surrogate)
    return has_formula and options.importance_sampling_level == "token"


def _check_level(
    surrogate: str, level: str, rows: Tensor, loss_agg_mode: str, cu_seqlens: Tensor | None
) -> None:
    check_name("importance_sampling_level", level, LEVELS)
    levels = SURROGATES[surrogate].levels
    if level not in levels:
        raise ValueError(
            f"surrogate {surrogate!r} has no importance ratio at {level} level: set "
            f"importance_sampling_level to {' or '.join(map(repr, levels))}"
        )
    if level == "sequence" and rows.dim() == 2 and cu_seqlens is None:
        raise ValueError(
            "importance_sampling_level 'sequence' on packed (N,) tokens needs cu_seqlens, the "
            "(B + 1,) boundaries of the sequences; or pass (B, T) tensors"
        )
    if cu_seqlens is not None and level == "token" and loss_agg_mode == "token-mean":
        raise ValueError(
            "cu_seqlens has no use at token level with loss_agg_mode 'token-mean': leave it None"
        )


def _parameters(surrogate, old_logp, epsilon, epsilon_high, delta, surrogate_params):
    """The surrogate's parameters in its order; what it has no use for is refused."""
    entry = SURROGATES[surrogate]
    given = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    for name in ("epsilon_high", "delta"):
        if given[name] is not None and name not in entry.parameters:
            raise ValueError(f"surrogate {surrogate!r} does not use {name}: leave it None")
        if given[name] is None and name in entry.explicit:
            raise ValueError(
                f"surrogate {surrogate!r} bounds the ratio itself by {name}: pass it, 5.0 say"
            )
    if old_logp is not None and not entry.has_ratio:
        raise ValueError(
            f"surrogate {surrogate!r} has no importance ratio, so it takes no old_logp: leave it "
            "None, or pass importance_sampling_ratio"
        )
    shared = {"epsilon": epsilon, "epsilon_high": epsilon if epsilon_high is None else epsilon_high}
    shared["delta"] = float("inf") if delta is None else delta
    values = shared | own_parameters(surrogate, surrogate_params or {})
    return tuple(float(values[name]) for name in entry.parameters)


def own_parameters(surrogate: str, params: Mapping[str, float]) -> dict[str, float]:
    """surrogate_params over the table's defaults, without gaps and in range.

    Raises:
        ValueError: not a mapping, an unknown or a missing name, a value out of its range.
    """
    entry = SURROGATES[surrogate]
    if not isinstance(params, Mapping):
        raise ValueError(f"surrogate_params must hold values by name, got {params!r}")
    own = [name for name in entry.parameters if name not in SHARED]
    for name in params:
        if name not in own:
            raise ValueError(f"surrogate_params of {surrogate!r} may hold {own}, got {name!r}")
    values = {**entry.defaults, **params}
    missing = [name for name in own if name not in values]
    if missing:
        raise ValueError(f"surrogate {surrogate!r} needs surrogate_params {missing}")
    check_numbers(**values)
    check_finite(**values)
    check_positive(**{name: values[name] for name in entry.positive})
    return values


def _per_token(argument: str, value: Tensor | None, rows: Tensor, name: str) -> Tensor | None:
    """A detached, contiguous value a token, in the statistics' dtype; (B,) is spread over T."""
    if value is None:
        return None
    if rows.dim() == 3 and value.shape == rows.shape[:1] and argument not in (
        "old_logp", "ref_logp"
    ):  # fmt: skip
        value = value[:, None].expand(rows.shape[:-1])
    check_per_token(argument, value, rows, name)
    return value.detach().to(statistics_dtype(rows)).contiguous()
