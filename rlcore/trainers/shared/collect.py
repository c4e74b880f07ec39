"""From prompts to experience: sample, then have it judged; and held-out evaluation."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data.encoding import Example
from rlcore.errors import UserError
from rlcore.models.reward_model import RewardModel
from rlcore.runs.samples import Sample, telling
from rlcore.sampling import sandbox
from rlcore.sampling.code_reward import code_runs, code_runs_in
from rlcore.sampling.rewards import (
    RewardFunction,
    RewardLike,
    Rewards,
    as_functions,
    compute_rewards,
    load_reward,
    reward_name,
)
from rlcore.sampling.rollout import Rollout, generate
from rlcore.sampling.scores import pass_at_k
from rlcore.trainers.options.reward import RewardConfig
from rlcore.trainers.shared.divergence import stop_together
from rlcore.trainers.shared.experience import Experience, from_rollout
from rlcore.trainers.shared.run import Run, mix_seed, shared_out, split

PASSES = 1.0  # a completion passes where its reward is at least this
SHOWN_TOKENS = 128  # of a completion that is there to be looked at alone
BROKEN = ("a logit over temperature, in sampling,", math.nan)


@dataclass(frozen=True)
class Judge:
    """The run's reward functions, their names in the metrics, and their weights."""

    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None

    def __call__(self, columns: Mapping[str, Sequence], rollout: Rollout) -> Rewards:
        """The rewards of N completions; `columns` has the data's, N entries each."""
        others = {name: values for name, values in columns.items() if name != "prompt"}
        return compute_rewards(
            self.functions,
            self.weights,
            columns["prompt"],
            rollout.completions,
            others,
            completion_ids=_unpadded(rollout),
        )

    def prepare(self, tokenizer: Any, device: torch.device) -> None:
        """Load the reward models among the functions, for a policy with that tokenizer.

        Where programs are run, one line on stderr says what holds them.
        """
        for model in self.reward_models:
            model.prepare(tokenizer, device)
        if code_runs in self.functions and os.environ.get("RANK", "0") == "0":
            print(sandbox.describe(), file=sys.stderr)

    @property
    def reward_models(self) -> list[RewardModel]:
        """Those of the functions that are models."""
        return [each for each in self.functions if isinstance(each, RewardModel)]


def _unpadded(rollout: Rollout) -> list[list[int]]:
    """Each completion's tokens, up to and with eos."""
    pairs = zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def make_judge(
    config: RewardConfig, functions: RewardLike | Sequence[RewardLike] | None = None
) -> Judge:
    """The config's rewards, and the `functions` besides; like names get a number each."""
    models = () if config.reward_model is None else (RewardModel(config.reward_model),)
    named = [load_reward(name) for name in config.reward]
    if config.code_sandbox is not None:
        sandboxed = code_runs_in(config.code_sandbox)
        named = [sandboxed if function is code_runs else function for function in named]
    functions = (*named, *as_functions(functions), *models)
    weights = config.reward_weights
    own = [reward_name(function) for function in functions]
    unique = tuple(
        name if own.count(name) == 1 else f"{name}_{own[:index].count(name)}"
        for index, name in enumerate(own)
    )
    return Judge(functions, unique, None if weights is None else tuple(weights))


@dataclass(frozen=True)
class Sampled:
    """A generation batch: this process's completions, and how all of them were judged."""

    experience: Experience  # this process's N completions, without advantages
    truncated: torch.Tensor  # (N,) bool: they do not end
    all_scores: torch.Tensor  # (M,) float32 of all processes, in their order; NaN: not judged
    rank: int
    metrics: dict[str, float]  # of the whole batch

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
    rollout = _generated(
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
    run.samples["train"] = _samples(run, mine, rollout, rewards, judge)
    scores = scores - (config.missing_eos_penalty or 0.0) * everyone["truncated"].float()
    experience = from_rollout(rollout, mask_truncated_completions=config.mask_truncated_completions)
    return Sampled(experience, rollout.truncated, scores, rank, metrics)


def _samples(
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


def show_completions(run: Run, examples: Sequence[Example]) -> None:
    """Have greedy completions of the examples' prompts shown, of SHOWN_TOKENS at most.

    Every process calls it. A model that cannot sample shows none.
    """
    if not examples:
        return
    longest = max(len(example.completion) for example in examples)
    try:
        rollout = generate(
            run.policy,
            run.tokenizer,
            [example.prompt for example in examples],
            max_new_tokens=min(longest, SHOWN_TOKENS),
            greedy=True,
            full_length=run.is_sharded,
        )
    except (UserError, FloatingPointError):
        return
    prompts = run.tokenizer.batch_decode([example.prompt for example in examples])
    shown = zip(prompts, rollout.completions, rollout.truncated.tolist(), strict=True)
    run.samples["eval"] = [
        Sample(row, prompt, completion, {}, math.nan, truncated)
        for row, (prompt, completion, truncated) in enumerate(shown)
    ]


def note_advantages(run: Run, advantage: torch.Tensor) -> None:
    """Give the samples that are to be shown their advantage, of this process's (N,)."""
    for sample in run.samples.get("train", ()):
        sample.advantage = advantage[sample.row].item()


def _generated(run: Run, prompts: Sequence, **options: Any) -> Rollout | None:
    """Completions of the policy; None where its logits are no numbers."""
    config = run.config
    try:
        return generate(
            run.policy,
            run.tokenizer,
            prompts,
            max_new_tokens=config.max_completion_length,
            max_prompt_length=config.max_prompt_length,
            full_length=run.is_sharded,
            **options,
        )
    except FloatingPointError:
        return None


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
        "reward": groups.nanmean(),
        "reward_std": std.mean(),
        "frac_reward_zero_std": (std == 0).float().mean(),
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": everyone["truncated"].float().mean(),
        "completions/unjudged": everyone["total"].isnan().sum(),
        "tokens": everyone["tokens"].sum(),
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


@torch.no_grad()
def evaluate(run: Run, rows: Any, judge: Judge) -> dict[str, float]:
    """Rewards of one greedy completion for each held-out row: {"eval/reward", ...}.

    With `eval_num_generations` k also "eval/mean@k" and "eval/pass@k" of k sampled ones, the same
    prompts' samples being drawn with the same seed each time.
    """
    sums: dict[str, torch.Tensor] = {}  # (sum, count)
    found = None
    for batch, counts in shared_out(run, range(len(rows)), run.config.eval_batch_size):
        columns = rows[list(batch)]
        rollouts = _held_out_rollouts(run, columns["prompt"], batch[0])
        if None in rollouts:
            found = BROKEN
        elif counts:
            for name, values in _held_out_values(run, columns, judge, *rollouts).items():
                some = torch.stack([values.double().nansum(), (~values.isnan()).sum()])
                sums[name] = sums.get(name, 0.0) + some
    stop_together(run, run.step, found)
    # a process without a row of its own has no sums
    names = _held_out_names(run, judge)
    stacked = torch.stack([sums.get(name, torch.zeros(2, dtype=torch.float64)) for name in names])
    total, count = run.accelerator.reduce(stacked.to(run.accelerator.device), "sum").cpu().unbind(1)
    means = (total / count.clamp(min=1)).tolist()
    return {f"eval/{name}": value for name, value in zip(names, means, strict=True)}


def _held_out_names(run: Run, judge: Judge) -> list[str]:
    """What is measured, the same on every process."""
    k = run.config.eval_num_generations
    sampled = [f"mean@{k}", f"pass@{k}"] if k else []
    parts = [f"rewards/{name}/mean" for name in judge.names]
    return ["reward", *sampled, "completions/mean_length", *parts]


def _held_out_rollouts(run: Run, prompts: Sequence, first_row: int) -> list[Rollout | None]:
    """The greedy completions, and the sampled ones where they are asked for."""
    config = run.config
    rollouts = [_generated(run, prompts, greedy=True)]
    if config.eval_num_generations:
        rollouts.append(
            _generated(
                run,
                prompts,
                num_generations=config.eval_num_generations,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=mix_seed(config.seed, first_row),
            )
        )
    return rollouts


def _held_out_values(
    run: Run,
    columns: Mapping[str, Sequence],
    judge: Judge,
    greedy: Rollout,
    sampled: Rollout | None = None,
) -> dict[str, torch.Tensor]:
    """{name: (N,)} of N rows, NaN where a row has no value."""
    rewards = judge(columns, greedy)
    if "eval" not in run.samples:
        run.samples["eval"] = _samples(run, columns, greedy, rewards, judge)
    parts = zip(judge.names, rewards.per_function.T, strict=True)
    values = {
        "reward": rewards.total,
        "completions/mean_length": greedy.completion_mask.sum(1).float().cpu(),
        **{f"rewards/{name}/mean": scores for name, scores in parts},
    }
    if sampled is not None:
        k = run.config.eval_num_generations
        scores = judge(repeated(columns, k), sampled).total.view(-1, k)
        values[f"mean@{k}"] = scores.nanmean(1)
        values[f"pass@{k}"] = pass_at_k(scores >= PASSES, k)
    return values
