"""The value model in a run: made, asked about completions, fitted beside the policy, saved."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rlcore as rl
from rlcore.models.forward import completion_outputs, evaluating
from rlcore.models.pretrained import no_progress_bars
from rlcore.models.value_model import ValueHead, load_value_model, watched
from rlcore.runs.atomic import staged_file
from rlcore.runs.checkpoint import save_model
from rlcore.trainers.options.value import ValueConfig
from rlcore.trainers.shared.divergence import require_finite
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.policies import micro_batches
from rlcore.trainers.shared.run import Run, make_optimizer
from rlcore.trainers.shared.stepping import clip_gradients, optimizer_step, set_learning_rate
from rlcore.trainers.shared.weights import whole_weights

# a model of its own is saved beside the policy, as a directory that transformers loads
VALUE_MODEL = "value_model"
VALUE_HEAD = "value_head.safetensors"

PolicyLoss = Callable[[torch.Tensor], torch.Tensor]  # of the rows of a micro-batch
ValueLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows and values (B, C)


@dataclass
class Critic:
    """A value model; `prepare`, which start_run calls, puts it on the run's machine."""

    model: torch.nn.Module  # a ValueModel, or a ValueHead on the policy's hidden states
    config: ValueConfig
    run: Run | None = None  # its own: the same but for model, optimizer and learning rate

    @property
    def is_shared(self) -> bool:
        """It has no backbone but the policy's."""
        return self.config.value_backbone == "shared"

    def prepare(self, run: Run) -> None:
        """Have the accelerator prepare it and an optimizer, and hold both in checkpoints."""
        config = dataclasses.replace(self.config, learning_rate=self.config.value_rate)
        model, optimizer = run.accelerator.prepare(self.model, make_optimizer(self.model, config))
        self.run = dataclasses.replace(
            run, model=model, optimizer=optimizer, config=config, prefix="value/", router=None
        )

    def save(self, directory: str | Path) -> None:
        """Write it into the run's output directory; every process calls it."""
        weights = whole_weights(self.run)
        if not self.run.accelerator.is_main_process:
            return
        if self.is_shared:
            from safetensors.torch import save_file

            with staged_file(Path(directory) / VALUE_HEAD) as path:
                save_file(weights or self.run.policy.state_dict(), path)
            return
        if weights is not None:
            weights = {name.removeprefix("classifier."): w for name, w in weights.items()}
        with no_progress_bars():
            classifier, place = self.run.policy.classifier, Path(directory) / VALUE_MODEL
            save_model(classifier, self.run.tokenizer, place, weights)


def load_critic(config: ValueConfig, policy: Any, tokenizer: Any) -> Critic:
    """The value model that the config asks for, beside the unwrapped `policy`.

    Raises:
        UserError: `value_model` names nothing that can be one.
    """
    if config.value_backbone == "shared":
        return Critic(ValueHead(policy.config.get_text_config().hidden_size), config)
    with _place_of(config.value_model or config.model, tokenizer) as place:
        model = load_value_model(
            place,
            tokenizer,
            gradient_checkpointing=config.gradient_checkpointing,
            **config.loading,
        )
    return Critic(model.train(), config)


@contextlib.contextmanager
def _place_of(model: Any, tokenizer: Any) -> Iterator[str]:
    """Where a model can be loaded from; of one that was given itself a copy, for a while."""
    if isinstance(model, str):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="rlcore-") as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        yield directory


@torch.no_grad()
def predict_values(
    run: Run, critic: Critic, experience: Experience
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value (N, C) of the state before each completion token, last_value (N,) after the row)."""
    values = torch.zeros(experience.mask.shape, device=experience.mask.device)
    last = values.new_zeros(len(experience))
    everything = torch.arange(len(experience), device=values.device)
    with evaluating(run.model), evaluating(critic.run.model):
        for rows in micro_batches(run, experience, everything):
            part = experience.take(rows).trimmed()
            states = _states(run, critic, part)
            values[rows, : part.completion_length] = states[:, :-1]
            lengths = part.attention_mask[:, -part.completion_length :].sum(1, keepdim=True)
            last[rows] = states.gather(1, lengths).squeeze(1)
    return torch.where(experience.mask, values, 0.0), last


def _states(run: Run, critic: Critic, part: Experience) -> torch.Tensor:
    """(B, C + 1): the value before the completion's first token, and after each of its tokens."""
    count = part.completion_length + 1
    ids, mask = part.input_ids, part.attention_mask
    with run.accelerator.autocast():
        if not critic.is_shared:
            return critic.run.model(ids, mask)[:, -count:]
        with watched(run.policy) as seen:
            # the forward pass leaves out the last column, so it gets one to leave out
            longer = (torch.cat([tensor, tensor[:, -1:]], 1) for tensor in (ids, mask))
            completion_outputs(run.model, *longer, count)
        return critic.run.model(seen[-1][:, -count:])


def actor_critic_step(
    run: Run,
    critic: Critic,
    step: int,
    experience: Experience,
    batches: Sequence[torch.Tensor],
    policy_loss: PolicyLoss,
    value_loss: ValueLoss,
) -> dict[str, float]:
    """One optimizer step of policy and value model: {"loss", "loss/policy_avg", ...}.

    Apart, each on its own loss, where each has its own backbone; on a shared one together, on
    policy loss + vf_coef * value loss.
    """
    if not critic.is_shared:
        trained = optimizer_step(run, step, batches, policy_loss)
        fitted = value_step(critic, step, experience, batches, value_loss)
        balance = run.config.router_aux_loss_coef * trained.get("aux_loss", 0.0)
        return trained | fitted | {"loss/policy_avg": trained["loss"] - balance}
    losses = {"loss/policy_avg": [], "loss/value_avg": []}

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with watched(run.policy) as seen:
            policy = policy_loss(rows)
        length = experience.take(rows).trimmed().completion_length
        value = value_loss(rows, critic.run.model(seen[-1][:, -length:]))
        for part, name in zip((policy, value), losses, strict=True):
            losses[name].append(part.detach())
        return policy + critic.config.vf_coef * value

    with _head_step(critic, step):
        trained = optimizer_step(run, step, batches, loss_of)
    reduce = run.accelerator.reduce
    return trained | {
        name: reduce(torch.stack(parts).sum(), "mean").item() for name, parts in losses.items()
    }


def value_step(
    critic: Critic,
    step: int,
    experience: Experience,
    batches: Sequence[torch.Tensor],
    value_loss: ValueLoss,
) -> dict[str, float]:
    """One optimizer step of a value model with a backbone of its own: {"loss/value_avg", ...}."""

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        part = experience.take(rows).trimmed()
        with critic.run.accelerator.autocast():
            states = critic.run.model(part.input_ids[:, :-1], part.attention_mask[:, :-1])
        return value_loss(rows, states[:, -part.completion_length :])

    fitted = optimizer_step(critic.run, step, batches, loss_of)
    return {
        "loss/value_avg": fitted["loss"],
        "value/grad_norm": fitted["grad_norm"],
        "value/learning_rate": fitted["learning_rate"],
    }


@contextlib.contextmanager
def _head_step(critic: Critic, step: int) -> Iterator[None]:
    """The head on the policy's backbone takes a step on the gradient that comes about inside."""
    head = critic.run
    head.optimizer.zero_grad()
    yield
    set_learning_rate(head, step)
    grad_norm = clip_gradients(head)
    require_finite(head, step, {"grad_norm": grad_norm})
    head.optimizer.step()


def clipped_value_loss(
    value: torch.Tensor, part: Experience, cliprange: float | None, num_items: float
) -> torch.Tensor:
    """`rl.value_loss` of values (B, C); `cliprange` None does not clip."""
    epsilon = float("inf") if cliprange is None else cliprange
    return rl.value_loss(
        value, part.value, part.returns, epsilon=epsilon, mask=part.mask, num_items=num_items
    )


def explained_variance(run: Run, experience: Experience) -> float:
    """1 - Var(returns - value) / Var(returns) over all processes' tokens; 0 for equal returns."""
    mask = experience.mask
    pairs = torch.stack([experience.returns - experience.value, experience.returns]).double()
    moments = torch.stack([torch.where(mask, pairs**power, 0.0).sum((1, 2)) for power in (0, 1, 2)])
    count, total, square = run.accelerator.reduce(moments, "sum")
    residual, variance = (square / count.clamp(min=1) - (total / count.clamp(min=1)) ** 2).tolist()
    return 1 - residual / variance if variance > 0 else 0.0
