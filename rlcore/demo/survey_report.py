"""What `rlcore demo --all` leaves: the table, survey.md, results.json and survey.png."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from rlcore.runs.curves import plot_lines

if TYPE_CHECKING:
    from rlcore.demo.survey import Measurement, Method, Outcome


RESULTS_FILE, TABLE_FILE, FIGURE_FILE = "results.json", "survey.md", "survey.png"
HEADINGS = ("", "learns from", "greedy", "sampled", "KL", "samples", "seconds")
TEXT_COLUMNS = 2
# accuracies of README's table, greedy and sampled: the least and the most of its three seeds
PUBLISHED = {
    ("PG", "verifier"): ((0.973, 0.990), (0.904, 0.947)),
    ("TRPO", "verifier"): ((0.969, 0.996), (0.959, 0.986)),
    ("PPO-penalty", "verifier"): ((0.977, 0.986), (0.924, 0.955)),
    ("PPO-clip", "verifier"): ((0.973, 0.990), (0.920, 0.949)),
    ("GRPO", "verifier"): ((0.977, 0.992), (0.766, 0.832)),
    ("PPO-clip", "reward model"): ((0.963, 0.988), (0.908, 0.947)),
    ("GRPO", "reward model"): ((0.977, 0.996), (0.854, 0.900)),
    ("DPO", "pairs"): ((0.959, 0.990), (0.922, 0.949)),
}


@dataclasses.dataclass(frozen=True)
class Survey:
    """Every run of every method, and how often each seed's reward model was right."""

    seeds: Sequence[int]
    methods: Mapping[str, Method]
    outcomes: Mapping[str, Sequence[Outcome]]
    reward_model_accuracies: Sequence[float]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells under HEADINGS: medians over the seeds, and of accuracies the range."""
        starts = [outcome.curve[0] for outcome in next(iter(self.outcomes.values()))]
        rows = [("before", "", *_accuracies(starts), "", "", "")]
        for name, method in self.methods.items():
            runs = self.outcomes[name]
            ends = [run.curve[-1] for run in runs]
            kl = statistics.median(end.kl for end in ends)
            seconds = statistics.median(run.seconds for run in runs)
            numbers = (f"{kl:.2f}", f"{ends[0].samples:.0f}", f"{seconds:.0f}")
            rows.append((method.label, method.judge, *_accuracies(ends), *numbers))
        return rows

    @property
    def legend(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        many = ": medians (and ranges)" if len(self.seeds) > 1 else ""
        return (
            f"Seed(s) {seeds}{many}. Accuracy on held-out problems; KL(after || before) of a "
            "completion in nats; seconds of training. The reward model is right on "
            f"{_spread(self.reward_model_accuracies)} of held-out pairs; the pairs, which DPO "
            "learns from too, took as many samples of the start."
        )


def _accuracies(measured: Sequence[Measurement]) -> tuple[str, str]:
    return _spread([m.greedy for m in measured]), _spread([m.sampled for m in measured])


def _spread(values: Sequence[float]) -> str:
    median = f"{statistics.median(values):.3f}"
    least, most = (f"{value:.3f}".removeprefix("0") for value in (min(values), max(values)))
    return f"{median} ({least}-{most})" if len(values) > 1 else median


def beside(method: Method, end: Measurement) -> list[str]:
    """Greedy and sampled accuracy beside README's ranges: 0.986 (.977-.992), 0.700 (.766-.832)!

    An exclamation mark stands after a range that the number is outside.
    """
    known = PUBLISHED.get((method.label, method.judge), (None, None))
    cells = []
    for value, limits in zip((end.greedy, end.sampled), known, strict=True):
        cell = f"{value:.3f}"
        if limits is not None:
            low, high = (f"{limit:.3f}".removeprefix("0") for limit in limits)
            cell += f" ({low}-{high})" + "!" * _is_outside(value, limits)
        cells.append(cell)
    return cells


def _is_outside(value: float, limits: tuple[float, float]) -> bool:
    return not limits[0] <= round(value, 3) <= limits[1]


def came_out(number: int, count: int, method: Method, end: Measurement) -> str:
    """5 of 8: GRPO on the verifier: greedy 0.986 (.977-.992), sampled 0.770 (.766-.832)."""
    greedy, sampled = beside(method, end)
    place = f"{number} of {count}: {method.label} on the {method.judge}"
    return f"{place}: greedy {greedy}, sampled {sampled}"


def against_readme(survey: Survey) -> str:
    """The methods whose medians are outside README's ranges, a line each."""
    lines = []
    for name, method in survey.methods.items():
        ends = [run.curve[-1] for run in survey.outcomes[name]]
        medians = {
            what: statistics.median(getattr(end, what) for end in ends)
            for what in ("greedy", "sampled")
        }
        greedy, sampled = beside(method, dataclasses.replace(ends[0], **medians))
        if "!" in greedy + sampled:
            lines.append(f"  {method.label}, {method.judge}: greedy {greedy}, sampled {sampled}")
    if not lines:
        return "All accuracies are within README's ranges."
    return "\n".join(
        [
            "Outside README's ranges (seeds 0 to 2, one processor; another goes its own way):",
            *lines,
        ]
    )


def show(console: Console, survey: Survey) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < TEXT_COLUMNS else "right")
    for row in survey.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(f"\n{survey.legend}")
    console.print(f"\n{against_readme(survey)}")


def write(directory: Path, survey: Survey) -> None:
    """results.json with every measurement, survey.md, and survey.png with the medians' curves."""
    results = {
        "seeds": list(survey.seeds),
        "reward_model_pair_accuracy": list(survey.reward_model_accuracies),
        "methods": {
            name: [dataclasses.asdict(run) for run in runs]
            for name, runs in survey.outcomes.items()
        },
    }
    text = json.dumps(results, indent=1) + "\n"
    (directory / RESULTS_FILE).write_text(text, encoding="utf-8")
    (directory / TABLE_FILE).write_text(_markdown(survey), encoding="utf-8")
    _draw(survey, directory / FIGURE_FILE)


def _markdown(survey: Survey) -> str:
    ruler = ["---" if place < TEXT_COLUMNS else "---:" for place in range(len(HEADINGS))]
    lines = [" | ".join(cells) for cells in (HEADINGS, ruler, *survey.rows)]
    table = "".join(f"| {line} |\n" for line in lines)
    return f"{table}\n{survey.legend}\n"


def _draw(survey: Survey, path: Path) -> None:
    curves = {
        f"{survey.methods[name].label}, {survey.methods[name].judge}": _median(runs)
        for name, runs in survey.outcomes.items()
    }
    accuracy = "held-out accuracy, sampled"
    plot_lines(
        {
            ("samples", accuracy): {
                label: [(m.samples, m.sampled) for m in curve] for label, curve in curves.items()
            },
            ("KL from the start (nats a completion)", accuracy): {
                label: [(m.kl, m.sampled) for m in curve] for label, curve in curves.items()
            },
        },
        path,
        title=f"two-step word problems, {len(survey.seeds)} seed(s), medians",
    )


def _median(runs: Sequence[Outcome]) -> list[Measurement]:
    """The curve of medians; every run of a method is measured as often."""
    points = zip(*(run.curve for run in runs), strict=True)
    names = ("samples", "greedy", "sampled", "kl")
    return [
        dataclasses.replace(
            group[0],
            **{name: statistics.median(getattr(point, name) for point in group) for name in names},
        )
        for group in points
    ]
