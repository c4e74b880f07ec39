"""The screens of README, made by the program itself of what `rlcore demo` left.

    python docs/screens/make.py runs/demo docs/screens

They are its GRPO run on the screen, `rlcore eval` of its models, and `rlcore compare` of the run
and its control.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from rlcore.commands.compare import CompareConfig, compare
from rlcore.commands.evaluate import EvalConfig, evaluate_models
from rlcore.runs.display import Display
from rlcore.runs.facts import in_words
from rlcore.runs.reading import read_run
from rlcore.runs.samples import Sample
from rlcore.trainers.grpo import DISPLAYED

WIDTH = 80


def console() -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=WIDTH, record=True, highlight=False
    )


def save(screen: Console, path: Path, title: str) -> None:
    # without rich's fonts, which a browser would fetch
    plain = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = screen.export_svg(title=title, theme=MONOKAI, code_format=plain, unique_id=path.stem)
    path.write_text(svg.replace("Fira Code", "ui-monospace, Menlo, Consolas"), encoding="utf-8")


def training(run: Path, path: Path) -> None:
    """The screen of the run as it stood at three quarters."""
    files, screen = read_run(run), console()
    facts = files.facts
    steps = max(line["step"] for line in files.metrics)
    subtitle = f"{run}  Qwen2 {in_words(facts['parameters'])}, {facts['rows']} rows"
    display = Display(screen, steps, "GRPO", DISPLAYED, subtitle=subtitle)
    shown = [line for line in files.metrics if line["step"] <= 3 * steps // 4]
    display._started -= sum(line.get("step_time", 0.0) for line in shown)
    for line in shown:
        display.update(line["step"], line)
    step = shown[-1]["step"]
    drawn = [c for c in files.completions if c["step"] == step and c["split"] == "train"]
    names = ("prompt", "completion", "rewards", "reward", "truncated")
    display.show_samples(step, [Sample(0, *(each[name] for name in names)) for each in drawn])
    display.show_phase("sampling")
    screen.export_text(clear=True)
    screen.print(display._render())
    save(screen, path, "rlcore train grpo")


def main(demo: Path, output: Path) -> None:
    os.chdir(demo.parent.parent)
    demo = Path(*demo.parts[-2:])
    training(demo / "grpo", output / "train.svg")
    screen = console()
    evaluate_models(
        EvalConfig(
            model=[str(demo / "sft"), str(demo / "grpo" / "best")],
            dataset=str(demo / "task" / "test.jsonl"),
            reward=["arithmetic"],
            num_samples=4,
            max_completion_length=18,
        ),
        screen,
    )
    save(screen, output / "eval.svg", "rlcore eval")
    screen = console()
    compare(CompareConfig(runs=[str(demo / "grpo"), str(demo / "control")]), screen)
    save(screen, output / "compare.svg", "rlcore compare")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
