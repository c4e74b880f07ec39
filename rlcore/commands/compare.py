"""`rlcore compare`: runs beside each other: options that differ, held-out values, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlcore.errors import UserError, unknown_name
from rlcore.runs.checked import Checked
from rlcore.runs.figures import bars_for, short
from rlcore.runs.reading import RunFiles, decisive_metric, read_run

# what no two runs have alike, and nothing is learned from
OWN = {"output_dir", "overwrite_output_dir", "resume"}
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


@dataclass(kw_only=True)
class CompareConfig(Checked):
    """Comparison."""

    runs: list[str]  # output directories of training runs
    metric: list[str] | None = None  # metrics to draw; None: the held-out value, or the reward


def compare(config: CompareConfig, console: Console | None = None) -> None:
    """Print what the runs do not have in common.

    Raises:
        UserError: a directory without a run, or a metric that no run has.
    """
    if not config.runs:
        raise UserError("runs names no run: give the output directories of one or more")
    runs = [read_run(directory) for directory in config.runs]
    console = console or Console(highlight=False)
    names = _names(runs)
    console.print(_options(runs, names))
    console.print()
    console.print(_held_out(runs, names))
    for metric in _metrics(config, runs):
        console.print()
        for line in _curves(runs, names, metric, console):
            console.print(line)


def _names(runs: Sequence[RunFiles]) -> list[Text]:
    """Each run's directory in its colour."""
    return [
        Text(str(run.directory), style=COLOURS[number % len(COLOURS)])
        for number, run in enumerate(runs)
    ]


def _grid(title: str, names: Sequence[Text]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _options(runs: Sequence[RunFiles], names: Sequence[Text]) -> Table | Text:
    known = dict.fromkeys(name for run in runs for name in run.options if name not in OWN)
    table = _grid("options that differ", names)
    if len({run.trainer for run in runs}) > 1:
        table.add_row("trainer", *(run.trainer.removesuffix("Config") for run in runs))
    for name in known:
        values = [_value(run, name) for run in runs]
        if len(set(values)) > 1:
            table.add_row(name, *(Text(value) for value in values))
    return table if table.row_count else Text("the runs have the same options")


def _value(run: RunFiles, name: str) -> str:
    if name not in run.options:
        return "-"
    value = run.options[name]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _held_out(runs: Sequence[RunFiles], names: Sequence[Text]) -> Table | Text:
    """Start, last and best of what was held out; the last line's main metrics of training."""
    known = dict.fromkeys(name for run in runs for name in run.names)
    shown = [name for name in known if name.startswith("eval/") and name.count("/") == 1]
    shown = shown or [name for name in ("reward", "loss") if name in known]
    table = _grid("start, last, best @step", names)
    table.add_row("steps", *(str(max(line["step"] for line in run.metrics)) for run in runs))
    for name in shown:
        table.add_row(name, *(_course(run, name) for run in runs))
    return table


def _course(run: RunFiles, name: str) -> str:
    course = run.course(name)
    if not course:
        return "-"
    step, best = run.best(name)
    return f"{short(course[0][1])}, {short(course[-1][1])}, {short(best)} @{step}"


def _metrics(config: CompareConfig, runs: Sequence[RunFiles]) -> list[str]:
    known = dict.fromkeys(name for run in runs for name in run.names)
    for name in config.metric or ():
        if name not in known:
            raise unknown_name("metric", name, known)
    found = decisive_metric(runs)
    return config.metric or ([] if found is None else [found])


def _curves(
    runs: Sequence[RunFiles], names: Sequence[Text], metric: str, console: Console
) -> list[Text]:
    """One metric of every run over the same steps and on the same scale, a run above the next."""
    courses = [run.course(metric) for run in runs]
    values = [value for course in courses for _, value in course]
    steps = [step for course in courses for step, _ in course]
    if not values:
        return [Text(f"{metric}: no run has a value of it")]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    width = max(console.width - 2, 20)
    lines = [Text(f"{metric}, from {short(low)} to {short(high)}; steps {first} to {last}", "bold")]
    for name, course in zip(names, courses, strict=True):
        lines += [name, _curve(course, (first, last), (low, high), width, console, name.style)]
    return lines


def _curve(
    course: Sequence[tuple[int, float]],
    steps: tuple[int, int],
    scale: tuple[float, float],
    width: int,
    console: Console,
    style: str,
) -> Text:
    """A bar a column: the mean of the values whose steps fall into it, or the one before."""
    bars = bars_for(console)
    places: dict[int, list[float]] = {}
    for step, value in course:
        share = (step - steps[0]) / max(steps[1] - steps[0], 1)
        places.setdefault(min(math.floor(share * width), width - 1), []).append(value)
    line, last = Text("  "), None
    end = max(places, default=-1)
    for column in range(end + 1):
        if column in places:
            mean = sum(places[column]) / len(places[column])
            share = (mean - scale[0]) / (scale[1] - scale[0]) if scale[1] > scale[0] else 0.0
            last = bars[round(share * (len(bars) - 1))]
        line.append(last or " ", style=style)
    return line
