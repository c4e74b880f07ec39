"""The table of `rlcore demo --all` while it fills: live on a terminal, a line a run elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlcore.demo.survey_report import beside, came_out
from rlcore.runs.display import quiet

if TYPE_CHECKING:
    from rlcore.demo.survey import Measurement, Method

HEADINGS = ("", "learns from", "greedy (README)", "sampled (README)", "KL")


class Filling:
    """A context manager; also a callback of the run that is on, whose steps it shows."""

    def __init__(self, console: Console, methods: Mapping[str, Method]):
        self._console, self._methods = console, methods
        self._is_live = console.is_terminal
        self._seed, self._what = 0, ""
        self._now: str | None = None  # the method that trains
        self._told = ""  # how far it is
        self._ends: dict[str, Measurement] = {}  # of this seed's methods
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Filling:
        if self._is_live:
            # the runs' own screens would tear it
            self._held.enter_context(quiet())
            live = Live(get_renderable=self._render, console=self._console, transient=True)
            self._held.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def given(self) -> dict[str, Any]:
        """What a trainer is given besides its config, to be heard here."""
        return {"callbacks": self} if self._is_live else {}

    def seed(self, seed: int) -> None:
        """A seed begins, with what all its methods start from."""
        self._seed, self._ends = seed, {}
        self._say("problems, warm start, pairs, reward model")

    def begin(self, name: str) -> None:
        """A method's run begins."""
        self._now = name
        method, place = self._methods[name], len(self._ends) + 1
        self._say(f"{place} of {len(self._methods)}: {method.label} on the {method.judge}")

    def end(self, name: str, end: Measurement) -> None:
        """It has ended, and was measured."""
        self._ends[name], self._now = end, None
        if not self._is_live:
            told = came_out(len(self._ends), len(self._methods), self._methods[name], end)
            self._console.print(told, soft_wrap=True)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Of the run that is on: see `rlcore.trainers.Callback`."""
        name = next((each for each in ("reward", "loss") if each in metrics), None)
        self._told = f"step {step}" + (f", {name} {metrics[name]:.3f}" if name else "")

    def _say(self, what: str) -> None:
        self._what, self._told = what, ""
        if not self._is_live:
            self._console.rule(f"seed {self._seed}, {what}", align="left")

    def _render(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if place < 2 else "right")
        for name, method in self._methods.items():
            end = self._ends.get(name)
            cells = ["training" if name == self._now else "", "", ""]
            if end is not None:
                cells = [*beside(method, end), f"{end.kl:.2f}"]
            table.add_row(method.label, method.judge, *cells)
        where = f"seed {self._seed}, {self._what}"
        return Group(Text(where, style="bold"), Text(self._told, style="dim"), table)
