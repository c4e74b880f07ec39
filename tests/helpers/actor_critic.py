"""Actor and critic on tiny models: a run, an experience, and their losses written out once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rlcore.models.value_model import ValueHead, ValueModel
from rlcore.trainers.options.pg import PGConfig
from rlcore.trainers.options.ppo import PPOConfig
from rlcore.trainers.shared.critic import Critic
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.run import Run

from . import grpo as make
from .tiny import tiny_model

KINDS = ("gpt2", "llama", "qwen2", "gemma2")
COMMON = {
    "model": "unused",
    "dataset": "unused",
    "per_device_train_batch_size": 8,
    "max_completion_length": 7,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-9,
    "max_steps": 10,
    "reward": ["exact_match"],
}


def ppo_config(tmp_path: Path, **changes: Any) -> PPOConfig:
    return PPOConfig(**(COMMON | {"output_dir": str(tmp_path / "run"), "kl_coef": 0.0} | changes))


def pg_config(tmp_path: Path, **changes: Any) -> PGConfig:
    return PGConfig(**(COMMON | {"output_dir": str(tmp_path / "run")} | changes))


def tiny_classifier(kind: str = "gpt2", seed: int = 3) -> Any:
    """A random reward model of that kind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_model(kind).config
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_head(seed: int = 4, hidden_size: int = 32) -> ValueHead:
    """A head that is not zero."""
    head = ValueHead(hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return head


def make_run(config: Any, kind: str = "gpt2") -> tuple[Run, Critic]:
    """A run on the tiny policy of that kind, and a critic of the config's sort."""
    run = make.make_run(config, tiny_model(kind))
    own = config.value_backbone == "own"
    critic = Critic(ValueModel(tiny_classifier(kind)) if own else tiny_head(), config)
    critic.prepare(run)
    return run, critic


def experience(old: float | None = 0.3, ref: float | None = None) -> Experience:
    """GRPO's eight rows, each token with an advantage, a value and a return of its own."""
    made = make.experience(old=old, ref=ref)
    generator = torch.Generator().manual_seed(7)
    advantage, value, change = torch.randn(3, *made.mask.shape, generator=generator)
    return dataclasses.replace(made, advantage=advantage, value=value, returns=value + change)


def padded(made: Experience) -> Experience:
    """The same with three more columns of padding before it, two after it, and NaN in them."""

    def wider(value: torch.Tensor, fill: Any) -> torch.Tensor:
        return torch.cat([value, torch.full((len(value), 2), fill, dtype=value.dtype)], dim=1)

    extra = torch.full((len(made), 3), 7)
    names = ("advantage", "old_logp", "ref_logp", "value", "returns")
    return dataclasses.replace(
        made,
        input_ids=torch.cat([extra, wider(made.input_ids, 9)], dim=1),
        attention_mask=torch.cat([extra * 0, wider(made.attention_mask, 0)], dim=1),
        mask=wider(made.mask, False),
        **{
            name: wider(value, float("nan"))
            for name in names
            if (value := getattr(made, name)) is not None
        },
    )


def naive_outputs(backbone: Any, made: Experience) -> torch.Tensor:
    """(N, P + C, H) hidden states, every row on its own and without its padding; 0 there."""
    rows = []
    for ids, mask in zip(made.input_ids, made.attention_mask, strict=True):
        hidden = backbone(ids[mask.bool()][None]).last_hidden_state[0]
        empty = hidden.new_zeros(len(mask), hidden.shape[1])
        rows.append(empty.index_put((mask.bool(),), hidden))
    return torch.stack(rows)


def naive_logp(model: Any, made: Experience) -> torch.Tensor:
    """(N, C) in float64, from the logits of each row on its own; 0 where there is no token."""
    rows = []
    for ids, mask in zip(made.input_ids, made.attention_mask, strict=True):
        attended = mask.bool()
        log_p = model(ids[attended][None]).logits[0].double().log_softmax(-1)
        logp = log_p[:-1].gather(-1, ids[attended][1:, None]).squeeze(-1)
        # nothing predicts the first token
        places = (attended & (attended.cumsum(0) > 1),)
        rows.append(logp.new_zeros(len(ids)).index_put(places, logp))
    return torch.stack(rows)[:, -made.mask.shape[1] :]


def naive_states(classifier: Any, made: Experience) -> torch.Tensor:
    """(N, P + C): the score after each token."""
    return classifier.score(naive_outputs(classifier.base_model, made)).squeeze(-1).double()


def naive_values(classifier: Any, made: Experience) -> torch.Tensor:
    """(N, C): the value of the state before each completion token."""
    length = made.mask.shape[1]
    return naive_states(classifier, made)[:, -length - 1 : -1]


def naive_hidden_values(model: Any, head: ValueHead, made: Experience) -> torch.Tensor:
    """(N, C): a head's opinion on the policy's own hidden states."""
    length = made.mask.shape[1]
    return head.score(naive_outputs(model.base_model, made)).squeeze(-1)[:, -length - 1 : -1]


def naive_policy_loss(
    model: Any, made: Experience, kl_mode: str, cliprange: float = 0.2, penalty_coef: float = 1.0
) -> torch.Tensor:
    """PPO's loss as the paper has it, in float64."""
    logp, old, advantage = (
        tensor[made.mask].double()
        for tensor in (naive_logp(model, made), made.old_logp, made.advantage)
    )
    ratio = (logp - old).exp()
    if kl_mode == "clip":
        bounded = ratio.clamp(1 - cliprange, 1 + cliprange)
        return -torch.minimum(ratio * advantage, bounded * advantage).mean()
    return -(ratio * advantage - penalty_coef * (ratio - 1 - (logp - old))).mean()


def naive_value_loss(
    values: torch.Tensor, made: Experience, cliprange: float | None = 0.2
) -> torch.Tensor:
    """PPO's value loss."""
    value, old, returns = (
        tensor[made.mask].double() for tensor in (values, made.value, made.returns)
    )
    errors = [(value - returns).square()]
    if cliprange is not None:
        errors.append((value.clamp(old - cliprange, old + cliprange) - returns).square())
    return 0.5 * torch.stack(errors).amax(0).mean()
