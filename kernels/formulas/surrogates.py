"""The table of policy-gradient surrogates, and a token's policy loss made from one of them.

A new surrogate is one pair of formulas and one row in SURROGATES (a user's: `register_surrogate`);
every kernel, backend and trainer then knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..limits import held, times
from . import divergence_losses as divergences
from . import token_losses as formulas
from .kl import policy_kl_terms

LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Surrogate:
    """A row of the table.

    Args:
        torch: (logp, old_logp, advantage, parameters) -> (loss, dlogp, clipped), elementwise.
        triton: the jitted twin; None = served by the torch formula on every backend.
        parameters: names of the scalars the formulas take, in order: of "epsilon",
            "epsilon_high", "delta" (arguments of every policy loss) and its own.
        defaults: values of its own parameters where surrogate_params leaves them out.
        positive: its own parameters that must be positive.
        explicit: those of every policy loss that it takes no default of: they must be given.
        needs_advantage: whether a token of advantage 0 has no gradient, so needs no computing.
        has_ratio: False where the formula has no importance ratio, so takes no old_logp.
        levels: the importance_sampling_levels that it is defined at.
        product: at sequence level, whether the ratio is the product of the tokens' ratios, and
            not their geometric mean.
        clip_token: at sequence level, what becomes of each token's log-ratio before the mean:
            (log_ratio, advantage, parameters) -> (log_ratio, clipped).
    """

    torch: Callable[..., tuple[Tensor, Tensor, Tensor]]
    triton: Callable | None
    parameters: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    explicit: tuple[str, ...] = ()
    needs_advantage: bool = True
    has_ratio: bool = True
    levels: tuple[str, ...] = LEVELS
    product: bool = False
    clip_token: Callable[..., tuple[Tensor, Tensor]] | None = None


CLIP = ("epsilon", "epsilon_high")
TOKEN, SEQUENCE = LEVELS[:1], LEVELS[1:]

SURROGATES: dict[str, Surrogate] = {
    "reinforce": Surrogate(
        formulas.reinforce, formulas.reinforce_, has_ratio=False, levels=TOKEN
    ),
    "ppo_clip": Surrogate(formulas.ppo_clip, formulas.ppo_clip_, (*CLIP, "delta")),
    "ppo_penalty": Surrogate(
        formulas.ppo_penalty, formulas.ppo_penalty_, ("kl_coef",), {"kl_coef": 1.0},
        needs_advantage=False, levels=TOKEN,
    ),
    "cispo": Surrogate(formulas.cispo, formulas.cispo_, CLIP),
    "cispo_abs": Surrogate(
        formulas.cispo_abs, formulas.cispo_abs_, CLIP[1:], explicit=("epsilon_high",)
    ),
    "sapo": Surrogate(
        formulas.sapo, formulas.sapo_, ("tau_pos", "tau_neg"), {"tau_pos": 1.0, "tau_neg": 1.05},
        positive=("tau_pos", "tau_neg"),
    ),
    "gmpo": Surrogate(
        formulas.gmpo, None, CLIP, levels=SEQUENCE, clip_token=formulas.gmpo_clip
    ),
    "vespo": Surrogate(
        formulas.vespo, None, ("k_pos", "lambda_pos", "k_neg", "lambda_neg"),
        {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
        positive=("k_pos", "lambda_pos", "k_neg", "lambda_neg"), levels=SEQUENCE, product=True,
    ),
    "dppo_tv": Surrogate(divergences.dppo_tv, divergences.dppo_tv_, CLIP, levels=TOKEN),
    "dppo_kl": Surrogate(divergences.dppo_kl, divergences.dppo_kl_, CLIP, levels=TOKEN),
    "prime_rl": Surrogate(
        divergences.prime_rl, divergences.prime_rl_, (*CLIP, "kl_tau"), {"kl_tau": 1e-3},
        needs_advantage=False, levels=TOKEN,
    ),
    "dro": Surrogate(
        divergences.dro, divergences.dro_, ("tau",), {"tau": 0.05},
        needs_advantage=False, levels=TOKEN,
    ),
    "kl_cov": Surrogate(
        divergences.kl_cov, divergences.kl_cov_, ("kl_coef",), {"kl_coef": 1.0},
        needs_advantage=False, levels=TOKEN,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PolicyOptions:
    """What a token's policy loss is made of; `parameters` belong to the surrogate, in its order."""

    surrogate: str
    parameters: tuple[float, ...]
    kl_estimator: str
    beta: float
    entropy_coef: float
    importance_sampling_level: str = "token"

    def flat(self) -> tuple[str, str, list[float]]:
        """As an operator takes them, at token level: (surrogate, kl_estimator, numbers)."""
        return self.surrogate, self.kl_estimator, [self.beta, self.entropy_coef, *self.parameters]

    @staticmethod
    def of(surrogate: str, kl_estimator: str, numbers: list[float]) -> PolicyOptions:
        """The options that `flat` was called on."""
        beta, entropy_coef, *parameters = numbers
        return PolicyOptions(surrogate, tuple(parameters), kl_estimator, beta, entropy_coef)


class PerToken(NamedTuple):
    """What a policy loss is given of each token; old_logp None = the present policy sampled."""

    advantage: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance_sampling_ratio: Tensor | None


class PolicyTerms(NamedTuple):
    """A token's loss, dloss/dlogp (dloss/dentropy is -entropy_coef), KL estimate and clipping."""

    loss: Tensor
    dlogp: Tensor
    kl: Tensor | None
    clipped: Tensor


def policy_terms(
    logp: Tensor,
    entropy: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    options: PolicyOptions,
) -> PolicyTerms:
    """loss = ratio_is * surrogate + beta * KL(pi || ref) - entropy_coef * H, elementwise.

    Without old_logp the sampling policy is the present one: its value, not its gradient. What
    lies beyond the dtype is its largest number, so that tokens of both signs add up.
    """
    old_logp = logp.detach() if old_logp is None else old_logp
    formula = SURROGATES[options.surrogate].torch
    loss, dlogp, clipped = formula(logp, old_logp, advantage, options.parameters)
    if importance_sampling_ratio is not None:
        loss, dlogp = (times(importance_sampling_ratio, x) for x in (loss, dlogp))
    kl = None
    if ref_logp is not None:
        kl, dkl = policy_kl_terms(logp, old_logp, ref_logp, options.kl_estimator)
        if options.beta:
            # the surrogate and the KL may overflow towards either side
            loss = held(loss) + held(options.beta * kl)
            dlogp = held(dlogp) + held(options.beta * dkl)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    return PolicyTerms(held(loss), held(dlogp), kl, clipped)
