"""GRPO on tiny models: a run, an experience, and the loss written out once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from rlcore.models.forward import position_ids
from rlcore.trainers.options.grpo import GRPOConfig, loss_type_of
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.run import Run, make_accelerator, make_optimizer

from . import oracle
from .tiny import tiny_model, tiny_tokenizer

LENGTHS = [5, 2, 3, 1, 5, 4, 2, 3]
PROMPT_LENGTHS = [3, 6, 2, 6, 1, 4, 3, 5]
ADVANTAGES = [1.0, -0.5, 0.0, -0.7, 0.3, 0.0, 0.9, -1.1]


# what a surrogate takes of the config, and what a loss type cannot do without
CLIPS = {
    "ppo_clip": ("epsilon", "epsilon_high", "delta"),
    "cispo": ("epsilon", "epsilon_high"),
    "cispo_abs": ("epsilon_high",),
    "sapo": (),
    "vespo": (),
    "dppo_tv": ("epsilon", "epsilon_high"),
    "reinforce": (),
    "gmpo": ("epsilon", "epsilon_high"),
    "ppo_penalty": (),
}
NEEDED = {"cispo_abs": {"epsilon_high": 1.3}}


def fitting(loss_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that the loss type's surrogate has no use for."""
    unused = set(CLIPS["ppo_clip"]) - set(CLIPS[loss_type_of(loss_type).surrogate])
    return {name: value for name, value in options.items() if name not in unused}


def config(tmp_path: Path, **changes: Any) -> GRPOConfig:
    changes = NEEDED.get(changes.get("loss_type"), {}) | changes
    values = {
        "model": "unused",
        "dataset": "unused",
        "output_dir": str(tmp_path / "run"),
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 7,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-9,
        "max_steps": 10,
        "reward": ["exact_match"],
    }
    return GRPOConfig(**(values | changes))


def make_run(config: GRPOConfig, model: Any = None) -> Run:
    accelerator = make_accelerator(config)
    model = tiny_model("gpt2") if model is None else model
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    return Run(config, accelerator, model, optimizer, tiny_tokenizer(), config.max_steps)


def experience(seed: int = 0, old: float | None = None, ref: float | None = None) -> Experience:
    """Eight rows of different lengths; old and reference logp that far from a plausible one."""
    generator = torch.Generator().manual_seed(seed)
    width, length = max(PROMPT_LENGTHS), max(LENGTHS)
    input_ids = torch.randint(2, 100, (8, width + length), generator=generator)
    columns = torch.arange(length)
    mask = columns < torch.tensor(LENGTHS)[:, None]
    prompt_mask = torch.arange(width) >= width - torch.tensor(PROMPT_LENGTHS)[:, None]
    made = Experience(
        input_ids,
        torch.cat([prompt_mask, mask], dim=1).long(),
        # row 3 was left out of the loss, as a truncated completion is
        mask & (torch.arange(8) != 3)[:, None],
        torch.tensor(ADVANTAGES),
    )
    logp = naive_logp(tiny_model("gpt2"), made, 1.0)[0].detach().float()
    noise = torch.randn(logp.shape, generator=generator)
    return dataclasses.replace(
        made,
        old_logp=None if old is None else logp + old * noise,
        ref_logp=None if ref is None else logp + ref * noise.flip(0),
    )


def naive_logp(model: Any, made: Experience, temperature: float) -> tuple[torch.Tensor, ...]:
    """(logp, entropy) (N, C) in float64, from the logits of all positions."""
    positions = position_ids(made.attention_mask)
    logits = model(
        made.input_ids, attention_mask=made.attention_mask, position_ids=positions
    ).logits.double()
    start = made.input_ids.shape[1] - made.mask.shape[1] - 1
    log_p = (logits[:, start:-1] / temperature).log_softmax(-1)
    logp = log_p.gather(-1, made.target[..., None]).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1)


def naive_loss(model: Any, made: Experience, config: GRPOConfig) -> torch.Tensor:
    """The loss of GRPO as the papers have it, one row at a time."""
    logp, entropy = naive_logp(model, made, config.temperature)
    surrogate = loss_type_of(config.loss_type).surrogate
    clip = {name: getattr(config, name) for name in CLIPS[surrogate]}
    if config.surrogate_params:
        clip["surrogate_params"] = config.surrogate_params
    rows = []
    for row in range(len(made)):
        counted = made.mask[row]
        new = logp[row, counted]
        old = new.detach() if made.old_logp is None else made.old_logp[row, counted].double()
        log_ratio, advantage = new - old, made.advantage[row].double()
        if surrogate == "gmpo":
            log_ratio, _ = oracle.gmpo_clip(log_ratio, advantage, **clip)
        if config.level == "sequence":
            shared = log_ratio.sum() if surrogate in oracle.PRODUCTS else log_ratio.mean()
            log_ratio = shared.expand(log_ratio.shape)
        loss, _ = oracle.SURROGATES[surrogate](log_ratio.exp(), new, advantage, **clip)
        if config.loss_type == "fipo":
            loss = loss * future_kl(log_ratio.detach(), config)
        loss = loss - config.entropy_coef * entropy[row, counted]
        if config.beta:
            gap = made.ref_logp[row, counted].double() - new
            kl = gap.exp() - 1 - gap
            if config.kl_estimator == "k3_ratio":
                kl = kl * log_ratio.exp()
            loss = loss + config.beta * kl
        rows.append(loss)
    tokens = sum(len(row) for row in rows)
    sequences = sum(map(bool, map(len, rows)))
    if config.loss_type in ("grpo", "sapo"):
        return sum(row.mean() for row in rows if len(row)) / sequences
    if config.loss_type == "luspo":
        return sum(row.sum() for row in rows) / sequences
    per_length = config.loss_type == "dr_grpo"
    count = sequences * config.max_completion_length if per_length else tokens
    return sum(row.sum() for row in rows) / count


def future_kl(log_ratio: torch.Tensor, config: GRPOConfig) -> torch.Tensor:
    """FIPO's factors of one row's tokens."""
    steps = torch.arange(len(log_ratio))
    decay = 0.5 ** ((steps - steps[:, None]) / config.fipo_decay_rate)
    future = (decay * (steps >= steps[:, None]) * log_ratio).sum(1)
    reach = config.fipo_clip_range
    return future.exp().clamp(1 if config.fipo_clip_high_only else 1 - reach, 1 + reach)


def gradient(model: Any) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
