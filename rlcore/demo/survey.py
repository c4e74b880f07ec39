"""`rlcore demo --all`: every algorithm on the embedded task, from one start, with equal samples.

For each seed a supervised warm start, preference pairs that it sampled, and a reward model are
made once. Then every method trains from that start and leaves checkpoints, which are measured on
held-out problems: accuracy, and the KL divergence from the start. What is done is not done again,
and a run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import rlcore as rl
from rlcore.demo import arithmetic as task
from rlcore.demo import recipes, survey_report
from rlcore.demo.filling import Filling
from rlcore.demo.survey_report import Survey
from rlcore.models.forward import completion_logits
from rlcore.models.loading import load_reference, load_tokenizer
from rlcore.runs.atomic import staged
from rlcore.runs.checkpoint import checkpoints, last_checkpoint
from rlcore.runs.curves import require_matplotlib
from rlcore.runs.output_dir import METRICS_FILE
from rlcore.runs.tracking import read_metrics
from rlcore.sampling.rollout import generate
from rlcore.trainers.dpo import train_dpo
from rlcore.trainers.grpo import train_grpo
from rlcore.trainers.pg import train_pg
from rlcore.trainers.ppo import train_ppo
from rlcore.trainers.reward_model import train_reward_model
from rlcore.trainers.sft import train_sft
from rlcore.trainers.trpo import train_trpo

SAMPLES = 5120  # completions that every method learns from
MEASUREMENTS = 5  # of each run
KL_ROWS = 256  # completions that a KL is measured on


@dataclass(frozen=True)
class Start:
    """What every method of one seed starts from."""

    paths: task.TaskPaths
    sft: Path
    pairs: task.PairPaths
    reward_model: Path


@dataclass(frozen=True)
class Method:
    """One row of the table: a trainer, its recipe, and what tells it right from wrong."""

    label: str
    judge: str
    train: Callable[..., Any]  # a config -> Result
    recipe: Callable[[Start, Path, int], Any]  # (start, output_dir, seed) -> config


@dataclass(frozen=True)
class Measurement:
    """A model somewhere along its run, on the held-out problems."""

    samples: float  # completions that it has learned from
    greedy: float  # accuracy
    sampled: float  # accuracy
    kl: float  # KL(model || start) of a completion, in nats


@dataclass(frozen=True)
class Outcome:
    """One run of one method: its measurements, the start's first, and the seconds it trained."""

    curve: tuple[Measurement, ...]
    seconds: float


def _on_prompts(make: Callable[..., Any], **options: Any) -> Callable[[Start, Path, int], Any]:
    def recipe(start: Start, output_dir: Path, seed: int) -> Any:
        return make(start.paths, start.sft, output_dir, seed, **options)

    return recipe


def _on_pairs(start: Start, output_dir: Path, seed: int) -> Any:
    return recipes.dpo_config(start.pairs, start.sft, output_dir, seed)


def _on_reward_model(make: Callable[..., Any]) -> Callable[[Start, Path, int], Any]:
    def recipe(start: Start, output_dir: Path, seed: int) -> Any:
        return make(start.paths, start.sft, start.reward_model, output_dir, seed)

    return recipe


VERIFIER, MODEL = "verifier", "reward model"
METHODS = {
    "pg": Method("PG", VERIFIER, train_pg, _on_prompts(recipes.pg_config)),
    "trpo": Method("TRPO", VERIFIER, train_trpo, _on_prompts(recipes.trpo_config)),
    "ppo_penalty": Method(
        "PPO-penalty", VERIFIER, train_ppo, _on_prompts(recipes.ppo_config, kl_mode="penalty")
    ),
    "ppo_clip": Method("PPO-clip", VERIFIER, train_ppo, _on_prompts(recipes.ppo_config)),
    "grpo": Method("GRPO", VERIFIER, train_grpo, _on_prompts(recipes.grpo_config)),
    "ppo_reward_model": Method(
        "PPO-clip", MODEL, train_ppo, _on_reward_model(recipes.ppo_reward_model_config)
    ),
    "grpo_reward_model": Method(
        "GRPO", MODEL, train_grpo, _on_reward_model(recipes.grpo_reward_model_config)
    ),
    "dpo": Method("DPO", "pairs", train_dpo, _on_pairs),
}


def run_survey(
    directory: str | Path, seeds: range, *, console: Console | None = None
) -> dict[str, list[Outcome]]:
    """Run every stage that is not done yet; print the table and leave it with its figure.

    Returns:
        {method: an Outcome for each seed}.
    """
    console = console or Console(highlight=False)
    require_matplotlib()  # asked now, not after the training that it is to draw
    directory = Path(directory)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in METHODS}
    accuracies = []
    with Filling(console, METHODS) as filling:
        for seed in seeds:
            home = directory / f"seed{seed}"
            filling.seed(seed)
            start, accuracy = _make_start(home, seed, filling.given)
            accuracies.append(accuracy)
            for name, method in METHODS.items():
                filling.begin(name)
                outcome = _run_method(method, home / name, start, seed, filling.given)
                outcomes[name].append(outcome)
                filling.end(name, outcome.curve[-1])
    survey = Survey(seeds, METHODS, outcomes, accuracies)
    survey_report.write(directory, survey)
    survey_report.show(console, survey)
    console.print(
        f"\neverything is in {directory}: survey.md, survey.png, results.json, a directory a run"
    )
    return outcomes


def _make_start(home: Path, seed: int, given: Mapping[str, Any]) -> tuple[Start, float]:
    """The warm start, its pairs, the reward model, and that model's accuracy on held-out pairs."""
    if not (home / "task").is_dir():
        with staged(home / "task") as directory:
            task.make_task(directory, seed)
    paths = task.task_paths(home / "task")
    sft = _trained(train_sft, recipes.sft_config(paths, home / "sft", seed), given)
    if not (home / "pairs").is_dir():
        with staged(home / "pairs") as directory:
            task.make_pairs(paths, sft, directory, seed)
    pairs = task.pair_paths(home / "pairs")
    config = recipes.reward_model_config(pairs, sft, home / "reward_model", seed)
    start = Start(paths, sft, pairs, _trained(train_reward_model, config, given))
    last = read_metrics(start.reward_model / METRICS_FILE)[-1]
    return start, last["eval/accuracy"]


def _trained(train: Callable[..., Any], config: Any, given: Mapping[str, Any]) -> Path:
    """The model in the config's output directory, trained now unless it is there whole."""
    directory = Path(config.output_dir)
    if not (directory / "config.json").exists():
        resumed = last_checkpoint(directory) is not None
        config = dataclasses.replace(config, resume=resumed, overwrite_output_dir=not resumed)
        train(config, **given)
    return directory


def _run_method(
    method: Method, directory: Path, start: Start, seed: int, given: Mapping[str, Any]
) -> Outcome:
    done = directory / "outcome.json"
    if done.exists():
        return _read_outcome(done)
    config = method.recipe(start, directory, seed)
    steps = _count_steps(config)
    every = max(1, steps // MEASUREMENTS)
    # it is measured here, by itself
    config = dataclasses.replace(config, save_steps=every, eval_dataset=None, eval_steps=0)
    _trained(method.train, config, given)
    # where the steps do not divide evenly there is one more, near the end
    models = [(0, start.sft), *checkpoints(directory)[: MEASUREMENTS - 1]]
    measure = partial(_measure, start=start)
    curve = [measure(model, samples=SAMPLES * step / steps) for step, model in models]
    curve.append(measure(directory, samples=SAMPLES))
    seconds = sum(line.get("step_time", 0.0) for line in read_metrics(directory / METRICS_FILE))
    outcome = Outcome(tuple(curve), seconds)
    partly = done.with_suffix(".partial")
    partly.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n", encoding="utf-8")
    partly.replace(done)
    return outcome


def _read_outcome(path: Path) -> Outcome:
    read = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(tuple(Measurement(**point) for point in read["curve"]), read["seconds"])


def _count_steps(config: Any) -> int:
    if config.max_steps > 0:
        return config.max_steps
    rows = len(Path(config.dataset).read_text(encoding="utf-8").splitlines())
    return -(-rows // config.per_device_train_batch_size)


def _measure(directory: Path, samples: float, start: Start) -> Measurement:
    lines = start.paths.test.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model, tokenizer = load_reference(str(directory)), load_tokenizer(str(start.sft))
    return Measurement(
        samples=samples,
        greedy=task.accuracy(model, tokenizer, rows, greedy=True),
        sampled=task.accuracy(model, tokenizer, rows, greedy=False),
        kl=_kl(model, load_reference(str(start.sft)), tokenizer, rows[:KL_ROWS]),
    )


@torch.no_grad()
def _kl(model: Any, other: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """KL(model || other) of a completion: summed over its tokens, the mean of sampled ones."""
    sampled = generate(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=task.MAX_COMPLETION_LENGTH,
    )
    batch = (sampled.input_ids, sampled.attention_mask, sampled.completion_ids.shape[1])
    kl = rl.categorical_kl(
        completion_logits(model, *batch),
        completion_logits(other, *batch),
        mask=sampled.completion_mask,
    )
    return kl.sum(1).mean().item()
