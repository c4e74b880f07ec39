"""Evaluation on held-out data by what the policy writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlcore.data.encoding import Example
from rlcore.errors import UserError
from rlcore.runs.samples import Sample
from rlcore.sampling.rollout import Rollout, generate
from rlcore.sampling.scores import pass_at_k
from rlcore.trainers.shared.collect import chosen_samples, repeated
from rlcore.trainers.shared.divergence import stop_together
from rlcore.trainers.shared.judging import Judge
from rlcore.trainers.shared.order import mix_seed, shared_out
from rlcore.trainers.shared.run import Run
from rlcore.trainers.shared.samplers import generated

PASSES = 1.0  # a completion passes where its reward is at least this
SHOWN_TOKENS = 128  # of a completion that is there to be looked at alone
BROKEN = ("a logit over temperature, in sampling,", math.nan)


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
    run.samples["eval"] = _unjudged(prompts, rollout)


def show_rollout(run: Run, prompts: Sequence, rollout: Rollout) -> None:
    """Have some of the completions shown that nobody judged, the first that come."""
    if "eval" not in run.samples and run.accelerator.is_main_process:
        run.samples["eval"] = _unjudged(prompts, rollout)[: run.config.log_completions]


def _unjudged(prompts: Sequence, rollout: Rollout) -> list[Sample]:
    shown = zip(prompts, rollout.completions, rollout.truncated.tolist(), strict=True)
    return [
        Sample(row, prompt, completion, {}, math.nan, truncated)
        for row, (prompt, completion, truncated) in enumerate(shown)
    ]


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
    rollouts = [generated(run, prompts, greedy=True)]
    if config.eval_num_generations:
        rollouts.append(
            generated(
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
        run.samples["eval"] = chosen_samples(run, columns, greedy, rewards, judge)
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
