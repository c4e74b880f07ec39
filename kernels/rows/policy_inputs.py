"""From the arguments of a policy loss to what its kernels take: checks, options, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

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
from ..formulas.surrogates import LEVELS, SURROGATES, PerToken, PolicyOptions
from ..implementation import implementation

# parameters of surrogates that are arguments of every policy loss
SHARED = ("epsilon", "epsilon_high", "delta")


class PolicyArguments(TypedDict, total=False):
    """What every policy loss takes by name; `policy_loss` says what each means."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    mask: Tensor | None
    surrogate: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    kl_estimator: str
    entropy_coef: float
    temperature: float
    importance_sampling_level: str
    importance_sampling_ratio: Tensor | None
    loss_agg_mode: str
    num_items: int | float | Tensor | None
    norm_length: int | float | None
    cu_seqlens: Tensor | None
    surrogate_params: dict[str, float] | None


DEFAULTS = PolicyArguments(
    old_logp=None, ref_logp=None, mask=None, surrogate="ppo_clip", epsilon=0.2, epsilon_high=None,
    delta=None, beta=0.0, kl_estimator="k3", entropy_coef=0.0, temperature=1.0,
    importance_sampling_level="token", importance_sampling_ratio=None, loss_agg_mode="token-mean",
    num_items=None, norm_length=None, cu_seqlens=None, surrogate_params=None,
)  # fmt: skip


class PolicyInputs(NamedTuple):
    """Checked inputs: what a token's loss is made of, (N,) or (B, T) masks and weights, values."""

    options: PolicyOptions
    mask: Tensor
    weight: Tensor
    per_token: PerToken


def prepare_policy(
    rows: Tensor, target: Tensor, advantage: Tensor, given: PolicyArguments, name: str = "logits"
) -> PolicyInputs:
    """Checks all arguments of `policy_loss`; `rows` are the logits or, by `name`, the hidden."""
    mask, level = given["mask"], given["importance_sampling_level"]
    check_rows(rows, target, mask=mask, temperature=given["temperature"], name=name)
    _check_options(given)
    _check_level(given["surrogate"], level, rows, given["loss_agg_mode"], given["cu_seqlens"])
    options = PolicyOptions(
        given["surrogate"], _parameters(given), given["kl_estimator"], float(given["beta"]),
        float(given["entropy_coef"]), level,
    )  # fmt: skip
    if mask is None:
        mask = torch.ones(target.shape, dtype=torch.bool, device=rows.device)
    weight = token_weight(
        mask.contiguous(), given["loss_agg_mode"], num_items=given["num_items"],
        norm_length=given["norm_length"], cu_seqlens=given["cu_seqlens"],
        dtype=statistics_dtype(rows),
    ).contiguous()  # fmt: skip
    values = {"advantage": advantage, **{n: given[n] for n in PerToken._fields[1:]}}
    per_token = PerToken(*(_per_token(n, value, rows, name) for n, value in values.items()))
    return PolicyInputs(options, mask, weight, per_token)


def _check_options(given: PolicyArguments) -> None:
    """Numbers in range, known names, and no two options at odds."""
    check_positive(**{name: given[name] for name in SHARED})
    check_finite(beta=given["beta"], entropy_coef=given["entropy_coef"])
    surrogate, kl_estimator, beta = (given[n] for n in ("surrogate", "kl_estimator", "beta"))
    check_name("surrogate", surrogate, SURROGATES)
    check_name("kl_estimator", kl_estimator, POLICY_KL_ESTIMATORS)
    if kl_estimator == "k3_ratio" and SURROGATES[surrogate].clip_token is not None:
        raise ValueError(
            f"kl_estimator 'k3_ratio' needs pi / pi_old, of which surrogate {surrogate!r} clips "
            "the tokens: use 'k1', 'k2' or 'k3'"
        )
    if beta != 0 and given["ref_logp"] is None:
        raise ValueError(f"beta is {beta} but ref_logp is None: pass ref_logp or set beta to 0")


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


def _parameters(given: PolicyArguments) -> tuple[float, ...]:
    """The surrogate's parameters in its order; what it has no use for is refused."""
    surrogate = given["surrogate"]
    entry = SURROGATES[surrogate]
    for name in ("epsilon_high", "delta"):
        if given[name] is not None and name not in entry.parameters:
            raise ValueError(f"surrogate {surrogate!r} does not use {name}: leave it None")
        if given[name] is None and name in entry.explicit:
            raise ValueError(
                f"surrogate {surrogate!r} bounds the ratio itself by {name}: pass it, 5.0 say"
            )
    if given["old_logp"] is not None and not entry.has_ratio:
        raise ValueError(
            f"surrogate {surrogate!r} has no importance ratio, so it takes no old_logp: leave it "
            "None, or pass importance_sampling_ratio"
        )
    shared = {name: given[name] for name in SHARED if given[name] is not None}
    shared = {"epsilon_high": given["epsilon"], "delta": float("inf")} | shared
    values = shared | own_parameters(surrogate, given["surrogate_params"] or {})
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
