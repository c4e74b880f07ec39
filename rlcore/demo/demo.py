"""`rlcore demo`: a small language model learns word problems by GRPO, with nothing to download.

Made on the spot: problems, tokenizer and a model with random weights. Then the ordinary trainers:
supervised warm-up, GRPO on the verifier's reward, and the same GRPO on that reward shuffled, which
has nothing to learn from and can only drift. Held-out accuracy is measured before and after each.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlcore.errors import UserError
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count, Seed
from rlcore.runs.run_record import note_start, read_record

CURVE_LABELS = {"grpo": "GRPO", "control": "shuffled reward (control)"}
SHUFFLED = "rlcore.demo.arithmetic:shuffled"
SAMPLES = 3


@dataclass
class DemoConfig(Checked):
    """Options of the demo."""

    seed: Seed = 0  # of the problems, the weights and the sampling
    output_dir: str = "runs/demo"  # where everything goes; an earlier demo there is replaced
    # instead: every algorithm from one start with equal samples, in output_dir/all; what is there
    # already is not done again
    all: bool = False
    seeds: Count = 3  # with --all: so many, from --seed on; eight minutes each


@dataclass(frozen=True)
class Exam:
    """What every model is measured on: the held-out rows, read with this tokenizer."""

    tokenizer: Any
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Score:
    """Held-out accuracy of one model, and what it writes for the first few problems."""

    greedy: float
    sampled: float
    completions: list[str]


def demo(config: DemoConfig) -> None:
    """The command: GRPO and its control, or with `all` the whole survey."""
    if not config.all:
        run_demo(config)
        return
    directory = _take_directory(Path(config.output_dir))
    console = Console(highlight=False)
    console.print(
        "PG, TRPO, PPO, GRPO, DPO: from one start, with equal samples, on a verifier's reward, a\n"
        f"reward model's, and preference pairs; seeds: {config.seeds}. Nothing is downloaded.\n"
    )
    with console.status("loading torch and transformers"):
        from rlcore.demo.survey import run_survey

    run_survey(directory / "all", range(config.seed, config.seed + config.seeds), console=console)


def run_demo(config: DemoConfig, *, console: Console | None = None) -> dict[str, Score]:
    """Run it all, print the table, write curve.png and results.json; returns the three scores."""
    console = console or Console(highlight=False)
    started = time.monotonic()
    directory = _take_directory(Path(config.output_dir))
    console.print(
        "A language model of 0.34M parameters, made here and now, learns word problems.\n"
        "Two cores need about four minutes. Nothing is downloaded.\n"
    )
    console.print(_heading(1, "making problems, tokenizer and a model with random weights"))
    with console.status("loading torch and transformers"):
        # imported here, so that the lines above stand there at once
        from rlcore.demo import recipes
        from rlcore.trainers.grpo import train_grpo
        from rlcore.trainers.sft import train_sft

        task, exam = _make_task(directory / "task", config.seed)
    example = exam.rows[0]["prompt"]
    console.print(f"  {len(exam.rows)} are held out, such as: {example}\n", soft_wrap=True)

    console.print(_heading(2, "supervised warm-up on imperfect demonstrations"))
    sft = train_sft(_replacing(recipes.sft_config(task, directory / "sft", config.seed)))
    scores = {"sft": _score(console, sft.model, exam)}

    console.print(_heading(3, "GRPO on the verifier's reward"))
    grpo_config = recipes.grpo_config(task, sft.output_dir, directory / "grpo", config.seed)
    grpo = train_grpo(_replacing(grpo_config))
    scores["grpo"] = _score(console, grpo.model, exam)

    console.print(_heading(4, "the control: the same rewards, dealt out at random"))
    changes = {"output_dir": str(directory / "control"), "reward": [SHUFFLED]}
    control = train_grpo(_replacing(grpo_config, **changes))
    scores["control"] = _score(console, control.model, exam)

    _write_results(directory, config.seed, scores)
    _print_scores(console, scores, len(exam.rows))
    _print_samples(console, exam.rows, scores)
    _print_places(console, directory, time.monotonic() - started)
    return scores


def _make_task(directory: Path, seed: int) -> tuple[Any, Exam]:
    from rlcore.demo.arithmetic import make_task
    from rlcore.models.loading import load_tokenizer
    from rlcore.runs.curves import require_matplotlib

    # asked now, not after the training that it is to draw
    require_matplotlib()
    task = make_task(directory, seed)
    lines = task.test.read_text(encoding="utf-8").splitlines()
    return task, Exam(load_tokenizer(str(task.model)), [json.loads(line) for line in lines])


def _take_directory(directory: Path) -> Path:
    """A new or empty directory, or an earlier demo's; nothing else is written into."""
    record = read_record(directory)
    ours = record is not None and record.trainer == DemoConfig.__name__
    if directory.is_dir() and any(directory.iterdir()) and not ours:
        raise UserError(f"{directory} is not empty and holds no demo: choose another --output-dir")
    directory.mkdir(parents=True, exist_ok=True)
    note_start(directory, DemoConfig.__name__, {})
    return directory


def _replacing(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, overwrite_output_dir=True, **changes)


def _heading(number: int, text: str) -> Text:
    return Text.assemble((f"{number}/4 ", "bold cyan"), (text, "bold"))


def _score(console: Console, model: Any, exam: Exam) -> Score:
    from rlcore.demo.arithmetic import MAX_COMPLETION_LENGTH, accuracy
    from rlcore.sampling.rollout import generate

    first = [row["prompt"] for row in exam.rows[:SAMPLES]]
    with console.status("measuring held-out accuracy"):
        shown = generate(
            model, exam.tokenizer, first, max_new_tokens=MAX_COMPLETION_LENGTH, greedy=True
        )
        score = Score(
            greedy=accuracy(model, exam.tokenizer, exam.rows, greedy=True),
            sampled=accuracy(model, exam.tokenizer, exam.rows, greedy=False),
            completions=shown.completions,
        )
    console.print(f"  held out: {score.greedy:.3f} greedy, {score.sampled:.3f} sampled\n")
    return score


def _write_results(directory: Path, seed: int, scores: dict[str, Score]) -> None:
    """The accuracies as results.json, the two runs' curves as curve.png."""
    from rlcore.runs.curves import plot_curves

    results = {"seed": seed} | {
        name: {"greedy": score.greedy, "sampled": score.sampled} for name, score in scores.items()
    }
    text = json.dumps(results, indent=1) + "\n"
    (directory / "results.json").write_text(text, encoding="utf-8")
    plot_curves(
        {label: directory / run / "metrics.jsonl" for run, label in CURVE_LABELS.items()},
        directory / "curve.png",
        metrics=("reward", "eval/reward"),
        labels={
            "reward": "share of the batch's samples right",
            "eval/reward": "held-out accuracy, greedy",
        },
        title=f"GRPO on two-step word problems, seed {seed}",
    )


def _print_scores(console: Console, scores: dict[str, Score], count: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"accuracy on {count} held-out problems")
    for column in ("greedy", "sampled"):
        table.add_column(column, justify="right")
    names = {
        "sft": "before: supervised only",
        "grpo": "after GRPO",
        "control": "after GRPO, reward shuffled (control)",
    }
    for name, label in names.items():
        score = scores[name]
        style = "bold green" if name == "grpo" else ""
        table.add_row(label, f"{score.greedy:.3f}", f"{score.sampled:.3f}", style=style)
    console.print(table)


def _print_samples(console: Console, rows: list[dict[str, str]], scores: dict[str, Score]) -> None:
    from rlcore.demo.arithmetic import correct

    console.print("\nwhat the model writes, greedily")
    for index, row in enumerate(rows[:SAMPLES]):
        console.print(f"  {row['prompt']}", style="bold")
        for name, label in (("sft", "before"), ("grpo", "after ")):
            completion = scores[name].completions[index]
            right = correct([row["prompt"]], [completion], [row["answer"]])[0] == 1.0
            mark = ("right", "green") if right else ("wrong", "red")
            console.print(Text.assemble(f"    {label} {completion.strip():<24}", mark))


def _print_places(console: Console, directory: Path, seconds: float) -> None:
    places = {
        "curve": directory / "curve.png",
        "trained model": directory / "grpo",
        "metrics": directory / "grpo" / "metrics.jsonl",
        "problems": directory / "task",
        "accuracies": directory / "results.json",
    }
    console.print(f"\ndone in {seconds:.0f} s; everything is in {directory}")
    for name, path in places.items():
        console.print(f"  {name:<14} {path}", soft_wrap=True)
