"""From prompts to experience: sample, then have it judged; and held-out evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.runs.samples import Sample, telling
from rlcore.sampling.rewards import (
    Rewards,
)
from rlcore.sampling.rollout import Rollout
from rlcore.trainers.shared.correction import compared
from rlcore.trainers.shared.divergence import stop_together
from rlcore.trainers.shared.experience import Experience, from_rollout
from rlcore.trainers.shared.judging import Judge
from rlcore.trainers.shared.order import mix_seed, split
from rlcore.trainers.shared.run import Run
from rlcore.trainers.shared.samplers import generated

PASSES = 1.0  # a completion passes where its reward is at least this
SHOWN_TOKENS = 128  # of a completion that is there to be looked at alone
BROKEN = ("a logit over temperature, in sampling,", math.nan)


@dataclass(frozen=True)
class Sampled:
    """A generation batch: this process's completions, and how all of them were judged."""

    experience: Experience  # this process's N completions, without advantages
    truncated: torch.Tensor  # (N,) bool: they do not end
    all_scores: torch.Tensor  # (M,) float32 of all processes, in their order; NaN: not judged
    rank: int
    metrics: dict[str, float]  # of the whole batch
    all_rewards: torch.Tensor | None = None  # (M, F) float32: each function's; NaN: no opinion

    def mine(self, values: torch.Tensor) -> torch.Tensor:
        """This process's share (N,) of (M,) values, on the experience's device."""
        count = len(self.experience)
        share = values[self.rank * count : (self.rank + 1) * count]
        return share.to(self.experience.input_ids.device)


def collect(run: Run, chosen: Mapping[str, Sequence], judge: Judge, seed: int) -> Sampled:
    """Sample and judge a generation batch; counts its tokens in `run.num_tokens`.

    Args:
        chosen: the columns of the prompts of all processes.
        seed: of the sampling; each process mixes its own out of it.
    """
    config, accelerator = run.config, run.accelerator
    share, rank = config.prompts_per_process, accelerator.process_index
    run.phase("sampling")
    mine = {name: values[rank * share : (rank + 1) * share] for name, values in chosen.items()}
    rollout = generated(
        run,
        mine["prompt"],
        num_generations=config.num_generations,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=mix_seed(seed, rank),
    )
    stop_together(run, run.step + 1, BROKEN if rollout is None else None)
    run.phase("judging")
    rewards = judge(repeated(mine, config.num_generations), rollout)
    everyone = _gathered(accelerator, rollout, rewards)
    metrics = _metrics(everyone, judge, config.num_generations)
    run.num_tokens += metrics["tokens"]
    scores = everyone["total"]
    if config.normalize_rewards:
        run.reward_moments.add(scores[~scores.isnan()])
        scores = run.reward_moments.normalized(scores)
    run.samples["train"] = chosen_samples(run, mine, rollout, rewards, judge)
    scores = scores - (config.missing_eos_penalty or 0.0) * everyone["truncated"].float()
    experience = from_rollout(rollout, mask_truncated_completions=config.mask_truncated_completions)
    experience, differences = compared(run, experience)
    rewards = everyone["per_function"]
    return Sampled(experience, rollout.truncated, scores, rank, metrics | differences, rewards)


def chosen_samples(
    run: Run, columns: Mapping[str, Sequence], rollout: Rollout, rewards: Rewards, judge: Judge
) -> list[Sample]:
    """Some of the main process's completions, with what they got."""
    if not (run.config.log_completions and run.accelerator.is_main_process):
        return []
    return telling(as_samples(judge, columns, rollout, rewards), run.config.log_completions)


def as_samples(
    judge: Judge, columns: Mapping[str, Sequence], rollout: Rollout, rewards: Rewards
) -> list[list[Sample]]:
    """The completions of each prompt, with what they got; `columns` has an entry a prompt."""
    prompts = columns["prompt"]
    group = len(rollout.completions) // len(prompts)
    judged = zip(
        rollout.completions, rewards.total.tolist(), rewards.per_function.tolist(),
        rollout.truncated.tolist(), strict=True,
    )  # fmt: skip
    samples = [
        Sample(i, prompts[i // group], text, dict(zip(judge.names, each, strict=True)), total, cut)
        for i, (text, total, each, cut) in enumerate(judged)
    ]
    return split(samples, group)


def note_advantages(run: Run, advantage: torch.Tensor) -> None:
    """Give the samples that are to be shown their advantage, of this process's (N,)."""
    for sample in run.samples.get("train", ()):
        sample.advantage = advantage[sample.row].item()


def repeated(columns: Mapping[str, Sequence], times: int) -> dict[str, list]:
    """The columns with each entry `times` times, next to each other."""
    return {
        name: [value for value in values for _ in range(times)] for name, values in columns.items()
    }


def _gathered(accelerator: Any, rollout: Rollout, rewards: Rewards) -> dict[str, torch.Tensor]:
    """Rewards and lengths of all processes' completions, in the order of the processes."""
    local = {
        "total": rewards.total,
        "per_function": rewards.per_function,
        "length": rollout.completion_mask.sum(1),
        "tokens": rollout.attention_mask.sum(1),
        "truncated": rollout.truncated,
    }
    device = accelerator.device
    return {
        name: accelerator.gather(value.to(device).contiguous()).cpu()
        for name, value in local.items()
    }


def _metrics(
    everyone: Mapping[str, torch.Tensor], judge: Judge, num_generations: int
) -> dict[str, float]:
    """TRL's metrics of a generation batch."""
    groups = everyone["total"].reshape(-1, num_generations)
    std = _nanstd(groups)
    length = everyone["length"].float()
    metrics = {
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": everyone["truncated"].float().mean(),
        "tokens": everyone["tokens"].sum(),
    }
    if judge.names:
        metrics |= {
            "reward": groups.nanmean(),
            "reward_std": std.mean(),
            "frac_reward_zero_std": (std == 0).float().mean(),
            "completions/unjudged": everyone["total"].isnan().sum(),
        }
    for name, scores in zip(judge.names, everyone["per_function"].T, strict=True):
        metrics[f"rewards/{name}/mean"] = scores.nanmean()
        metrics[f"rewards/{name}/std"] = _nanstd(scores[None])[0]
    return {name: value.item() for name, value in metrics.items()}


def _nanstd(rows: torch.Tensor) -> torch.Tensor:
    """(R,): each row's unbiased std over what is no NaN; exactly 0 where all of it is equal."""
    present = ~rows.isnan()
    centered = torch.where(present, rows - rows.nanmean(1, keepdim=True), 0.0)
    others = (present.sum(1) - 1).clamp(min=1)
    lowest = rows.nan_to_num(torch.inf).amin(1)
    highest = rows.nan_to_num(-torch.inf).amax(1)
    std = (centered.square().sum(1) / others).sqrt()
    return torch.where(lowest < highest, std, 0.0)
