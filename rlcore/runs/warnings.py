"""What a run's metrics warn of, each with what to do: the table RULES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

PATIENCE = 3  # lines of metrics in a row that a rule must hold for


@dataclass(frozen=True)
class Rule:
    """A sentence that holds while a metric is beyond its bound."""

    metric: str
    beyond: Callable[[float], bool]
    sentence: str  # takes the value as {value}
    not_beside: tuple[str, ...] = ()  # metrics of runs in which this one means something else


# of runs on labelled completions, whose KL is a completion's, and which sample nothing
_LABELLED = ("rewards/chosen", "rewards/rejected")
RULES = (
    Rule(
        "frac_reward_zero_std",
        lambda share: share >= 0.95,
        "{value:.0%} of the groups have equal rewards, from which nothing is learned: take easier "
        "or harder prompts, a graded reward, or a higher num_generations",
    ),
    Rule(
        "completions/clipped_ratio",
        lambda share: share >= 0.5,
        "{value:.0%} of the completions are cut off: raise max_completion_length, or see whether "
        "the model knows its end token",
    ),
    Rule(
        "completions/unjudged",
        lambda count: count > 0,
        "{value:.0f} completions of a batch got no reward: a reward function returned None or NaN",
    ),
    Rule(
        "entropy",
        lambda nats: nats <= 0.01,
        "the policy's entropy is {value:.4f}, so its samples hardly differ: raise entropy_coef or "
        "temperature, or lower learning_rate",
        _LABELLED,
    ),
    Rule(
        "kl",
        lambda nats: nats >= 1.0,
        "the KL to the reference is {value:.2f} a token: raise beta or lower learning_rate",
        _LABELLED,
    ),
    Rule(
        "objective/kl",
        lambda nats: nats >= 50.0,
        "the KL to the reference is {value:.0f} a completion: raise kl_coef, give kl_target, or "
        "lower learning_rate",
    ),
    Rule(
        "kl/bounded",
        lambda share: share > 0.0,
        "{value:.1%} of the tokens are so much likelier to the reference that their KL is bounded: "
        "raise beta or lower learning_rate",
    ),
    Rule(
        "clip_ratio/region_mean",
        lambda share: share >= 0.5,
        "{value:.0%} of the tokens are clipped and learn nothing: lower learning_rate, or take "
        "fewer updates of a batch",
    ),
    Rule(
        "value/explained_variance",
        lambda share: share <= 0.0,
        "the value model explains none of the returns ({value:.2f}): raise its learning rate, or "
        "give it more steps",
    ),
    Rule(
        "sampling/logp_difference/mean",
        lambda nats: nats >= 0.02,
        "sampler and trainer disagree: their log-probabilities differ by {value:.3f} on average: "
        "serve in the trainer's dtype, sample with top_p 1 and top_k 0, or see that the server has "
        "this model",
    ),
)


class Warnings:
    """Follows a run's lines of metrics; `active` has the sentences that hold now."""

    def __init__(self) -> None:
        self._held = dict.fromkeys((rule.metric for rule in RULES), 0)
        self._values: dict[str, float] = {}

    def follow(self, metrics: Mapping[str, float]) -> None:
        for rule in RULES:
            if rule.metric in metrics and not any(name in metrics for name in rule.not_beside):
                value = metrics[rule.metric]
                held = self._held[rule.metric] + 1 if rule.beyond(value) else 0
                self._held[rule.metric], self._values[rule.metric] = held, value

    @property
    def active(self) -> dict[str, str]:
        """{metric: sentence}"""
        return {
            rule.metric: rule.sentence.format(value=self._values[rule.metric])
            for rule in RULES
            if self._held[rule.metric] >= PATIENCE
        }
