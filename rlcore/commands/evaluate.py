"""`rlcore eval`: how well models answer held-out prompts, with confidence intervals.

Each prompt is answered once greedily, and `num_samples` times at `temperature`:

    greedy   the mean reward of the greedy answers
    mean@k   the mean reward of the k samples of a prompt
    pass@k   the chance that at least one of k samples passes: has a reward of `pass_reward`

The intervals hold 95%, over prompts. From the second model on the difference to the first is
given, prompt by prompt.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlcore.errors import UserError
from rlcore.models.limits import check_extent
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.atomic import staged_file
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count, Natural, Positive, Seed, Share
from rlcore.runs.samples import Sample, as_line
from rlcore.sampling.rollout import check_sampling, generate
from rlcore.sampling.scores import Estimate, estimate, pass_at_k
from rlcore.trainers.options.load import LoadConfig, check_load_config
from rlcore.trainers.options.reward import RewardConfig
from rlcore.trainers.shared.collect import as_samples, repeated
from rlcore.trainers.shared.judging import Judge, make_judge
from rlcore.trainers.shared.loading import load_prompt_rows
from rlcore.trainers.shared.order import mix_seed, split


@dataclass(kw_only=True)
class EvalConfig(RewardConfig, LoadConfig, Checked):
    """Evaluation."""

    model: list[str]  # directories or hub names: models, checkpoints, adapters
    # held-out prompts, like a trainer's eval_dataset; of several splits the held-out one
    dataset: str | list[str]
    prompt_column: str = "prompt"  # what the column of the prompts is called in the data
    num_samples: Natural = 0  # k: sampled answers a prompt, for mean@k and pass@k; 0: greedy alone
    pass_at: list[Count] = field(default_factory=list)  # the k of pass@k; none: num_samples
    pass_reward: float = 1.0  # an answer passes where its reward is at least this
    batch_size: Count = 32  # prompts at a time
    limit: Count | None = None  # prompts at most; None: all
    output: str | None = None  # a .jsonl file for every answer

    # Sampling

    temperature: Positive = 1.0  # of the samples
    top_p: Share = 1.0  # sample from the likeliest tokens of this mass
    top_k: Natural = 0  # sample from this many of the likeliest tokens; 0: all
    max_prompt_length: Count | None = None  # of longer prompts the last tokens stay; None: all
    max_completion_length: Count = 512  # new tokens at most
    seed: Seed = 0  # of the samples


@dataclass(frozen=True)
class Evaluation:
    """What one model got."""

    model: str
    prompts: int
    scores: Mapping[str, torch.Tensor]  # {"greedy", "mean@4", "pass@1", ...: (P,) float64}
    mean_length: float  # tokens of a greedy answer
    truncated: float  # share of the greedy answers without an end

    @property
    def estimates(self) -> dict[str, Estimate]:
        """{name: mean and interval}"""
        return {name: estimate(values) for name, values in self.scores.items()}


def evaluate_models(config: EvalConfig, console: Console | None = None) -> list[Evaluation]:
    """Answer `config.dataset` with every model, print the table, write the answers.

    Raises:
        UserError: options, data, rewards or a model that do not work.
    """
    judge = make_judge(config)
    _check(config, judge)
    evaluations = []
    with _answers(config.output) as write:
        for name in config.model:
            evaluations.append(_evaluate(config, judge, name, write))
    print_table(evaluations, console or Console(highlight=False))
    if config.output is not None:
        print(f"every answer is in {config.output}")
    return evaluations


def _check(config: EvalConfig, judge: Judge) -> None:
    check_load_config(config)
    if not config.model:
        raise UserError("model names no model: give --model DIR [DIR ...]")
    if not judge.functions:
        raise UserError(
            "no reward: give --reward NAME, --reward package.module:function or --reward-model DIR"
        )
    if config.reward_weights is not None and len(config.reward_weights) != len(judge.functions):
        raise UserError(
            f"reward_weights has {len(config.reward_weights)} entries for "
            f"{len(judge.functions)} rewards"
        )
    for k in config.pass_at:
        if not 1 <= k <= config.num_samples:
            raise UserError(
                f"pass_at {k} must be from 1 to num_samples, which is {config.num_samples}: more "
                "samples, or a smaller k"
            )
    if config.output is None:
        return
    path = Path(config.output)
    if path.exists():
        raise UserError(f"output {path} exists: choose another, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"output {path}: there is no directory {path.absolute().parent}")


@contextlib.contextmanager
def _answers(path: str | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes one answer; the file is whole or absent."""
    if path is None:
        yield lambda answer: None
        return
    with staged_file(Path(path)) as staging, staging.open("w", encoding="utf-8") as file:
        yield lambda answer: file.write(as_line(answer) + "\n")
        file.flush()


def _evaluate(config: EvalConfig, judge: Judge, name: str, write: Any) -> Evaluation:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(name, **config.reading)
    judge.prepare(tokenizer, device)
    rows = load_prompt_rows(config, tokenizer, judge, config.dataset, held_out=True)
    for note in rows.notes:
        print(note, file=sys.stderr)
    model = load_policy(name, dropout=False, **config.loading).to(device).eval()
    check_sampling(model)
    check_extent(model, rows.extent, tokenizer, config.max_completion_length)
    count = min(len(rows), config.limit or len(rows))
    batches = split(range(count), config.batch_size)
    answers: dict[str, list[list[Sample]]] = {"greedy": [], "sampled": []}
    lengths, cut = [], []
    for number, batch in _shown(batches, name):
        columns = rows[list(batch)]
        for kind, options in _ways(config, number):
            rollout = _generated(config, model, tokenizer, columns["prompt"], name, **options)
            times = len(rollout.completions) // len(batch)
            rewards = judge(repeated(columns, times), rollout)
            groups = as_samples(judge, columns, rollout, rewards)
            answers[kind] += groups
            for row, group in zip(batch, groups, strict=True):
                for sample in group:
                    write({"model": name, "row": row, "kind": kind, **_told(sample)})
            if kind == "greedy":
                lengths += rollout.completion_mask.sum(1).tolist()
                cut += rollout.truncated.tolist()
    scores = _scores(config, answers)
    return Evaluation(name, count, scores, sum(lengths) / count, sum(cut) / count)


def _ways(config: EvalConfig, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind of answer, options of `generate`) for a batch."""
    yield "greedy", {"greedy": True}
    if config.num_samples:
        yield (
            "sampled",
            {
                "num_generations": config.num_samples,
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k,
                "seed": mix_seed(config.seed, number),
            },
        )


def _generated(config: EvalConfig, model: Any, tokenizer: Any, prompts: Any, name: str, **options):
    try:
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.max_completion_length,
            max_prompt_length=config.max_prompt_length,
            **options,
        )
    except FloatingPointError as error:
        raise UserError(f"model {name!r}: {error}") from error


def _told(sample: Sample) -> dict[str, Any]:
    told = asdict(sample)
    del told["row"], told["advantage"]
    return told


def _shown(batches: Sequence[Any], name: str) -> Iterator[tuple[int, Any]]:
    """The batches, numbered, with a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        yield from enumerate(progress.track(batches, description=name[-40:]))


def _scores(
    config: EvalConfig, answers: Mapping[str, list[list[Sample]]]
) -> dict[str, torch.Tensor]:
    def rewards(kind: str) -> torch.Tensor:
        found = [[sample.reward for sample in group] for group in answers[kind]]
        return torch.tensor(found, dtype=torch.float64)

    scores = {"greedy": rewards("greedy")[:, 0]}
    if k := config.num_samples:
        sampled = rewards("sampled")
        scores[f"mean@{k}"] = sampled.nanmean(1)
        for each in config.pass_at or [k]:
            scores[f"pass@{each}"] = pass_at_k(sampled >= config.pass_reward, each)
    return scores


def print_table(evaluations: Sequence[Evaluation], console: Console) -> None:
    """One row a model; below it, from the second on, the difference to the first."""
    first = evaluations[0]
    # two columns that tell less stay out where there is no room for them
    has_room = console.width >= 36 + 16 * len(first.scores)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold", min_width=14)
    for name in first.scores:
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "cut off") if has_room else ():
        table.add_column(name, justify="right", no_wrap=True)
    for each in evaluations:
        cells = [_cell(value) for value in each.estimates.values()]
        lengths = [f"{each.mean_length:.1f}", f"{each.truncated:.0%}"] if has_room else []
        table.add_row(Text(each.model), *cells, *lengths)
        if each is not first:
            differences = [estimate(each.scores[n] - first.scores[n], True) for n in first.scores]
            cells = [_cell(value, signed=True) for value in differences]
            table.add_row(Text("minus the first", style="dim"), *cells)
    console.print(table)
    console.print(f"{first.prompts} prompts; in brackets 95% intervals over prompts", style="dim")


def _cell(value: Estimate, signed: bool = False) -> Text:
    sign = "+" if signed else ""
    bounds = f"\n[{value.low:{sign}.2f}, {value.high:{sign}.2f}]"
    return Text.assemble((f"{value.mean:{sign}.3f}", "bold"), (bounds, "dim"))
