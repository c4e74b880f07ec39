"""The progress display: live in a terminal, one plain line a step where stderr goes elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from rlcore.runs.figures import bars_for, clock, higher_is_better, short, trend
from rlcore.runs.samples import Sample

_LABELS = {
    "tokens_per_second": "tokens/s",
    "learning_rate": "lr",
    "eval/reward": "held-out reward",
    "eval/loss": "held-out loss",
}
# shown where they are logged, on a line of their own
_HELD_OUT = ("eval/reward", "eval/loss")
_DRAWN_A_SECOND = 4
# plain lines come no closer than this, the first and the last excepted
_SECONDS_BETWEEN_LINES = 1.0


_loading: Status | None = None  # at most one, until a display takes its place


@contextlib.contextmanager
def loading(text: str) -> Iterator[None]:
    """Say on a terminal what takes its time, until the block ends or a Display starts."""
    global _loading
    console = Console(stderr=True)
    if console.is_terminal:
        _loading = console.status(text)
        _loading.start()
    try:
        yield
    finally:
        _end_loading()


_is_quiet = False  # while another screen shows what runs do


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Runs that start within show nothing, because the caller does."""
    global _is_quiet
    before, _is_quiet = _is_quiet, True
    try:
        yield
    finally:
        _is_quiet = before


def _end_loading() -> None:
    global _loading
    if _loading is not None:
        _loading.stop()
        _loading = None


class Display:
    """Shows steps and metrics on `console`: a live block on a terminal, plain lines elsewhere."""

    def __init__(
        self,
        console: Console | None,
        total_steps: int,
        description: str,
        columns: tuple[str, ...],
        start_step: int = 0,
        subtitle: str = "",
    ):
        self._console = console or Console(stderr=True)
        if _is_quiet:
            self._console = Console(quiet=True, force_terminal=False)
        self._total = total_steps
        self._description, self._subtitle = description, subtitle
        self._phase = ""  # what the run does now
        self._columns = tuple(dict.fromkeys([*columns, *_HELD_OUT]))
        self._held_out: dict[str, list[tuple[int, float]]] = {}  # (step, value) by name
        self._samples: tuple[int, list[Sample]] = (0, [])
        self._warnings: Mapping[str, str] = {}
        self._said: set[str] = set()  # warnings that have been plain lines, once each
        self._start_step = self._step = start_step
        self._started = self._updated = time.monotonic()
        self._metrics: Mapping[str, float] = {}
        self._course: list[float] = []  # of the first column
        self._live: Live | None = None
        self._printed = self._drawn = -math.inf

    @property
    def is_live(self) -> bool:
        """Whether it is a block on a terminal, not lines."""
        return self._live is not None

    def start(self) -> None:
        _end_loading()
        self._started = self._updated = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=_DRAWN_A_SECOND,
            )
            self._live.start()

    def stop(self) -> None:
        self._phase = ""
        if self._live:
            self._live.stop()

    def update(
        self, step: int, metrics: Mapping[str, float], warnings: Mapping[str, str] | None = None
    ) -> None:
        self._warnings = warnings or {}
        for name, sentence in self._warnings.items() if self._live is None else ():
            if name not in self._said:
                self.message(f"warning: {sentence}")
            self._said.add(name)
        self._step, self._updated = step, time.monotonic()
        self._take(step, metrics)
        if self._live:
            self._draw()
        elif self._is_due(step, metrics):
            self._printed = self._updated
            self._print_line(metrics)

    def _draw(self) -> None:
        """Draw at once, unless that was done a moment ago: rich draws again soon by itself."""
        if time.monotonic() - self._drawn >= 1 / _DRAWN_A_SECOND:
            self._live.refresh()
            self._drawn = time.monotonic()

    def recall(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Take what a resumed run had measured before, a line with its "step" each."""
        for line in lines:
            self._take(line["step"], {name: v for name, v in line.items() if name != "step"})

    def _take(self, step: int, metrics: Mapping[str, float]) -> None:
        for name in _HELD_OUT:
            if name in metrics and math.isfinite(metrics[name]):
                self._held_out.setdefault(name, []).append((step, metrics[name]))
        # a step that logs only some of the columns leaves the others standing
        self._metrics = {**self._metrics, **metrics}
        if self._columns[0] in metrics:
            self._course.append(metrics[self._columns[0]])

    def _is_due(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a plain line is printed: never is one with a held-out value left out."""
        evaluated = any(name in metrics for name in _HELD_OUT)
        late = self._updated - self._printed >= _SECONDS_BETWEEN_LINES
        return late or evaluated or step >= self._total

    def show_phase(self, name: str) -> None:
        """Name what the run does from now on; seen when the screen is next drawn."""
        self._phase = name

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show the first two from now on; on a terminal alone."""
        self._samples = step, list(samples[:2])
        if self._live:
            self._draw()

    def held_out_course(self) -> str | None:
        """Start, end and best of what was held out, in a sentence; None without two values."""
        for name, values in self._held_out.items():
            if len(values) < 2:
                continue
            (_, first), (_, last), (best_step, best) = values[0], values[-1], _best(name, values)
            course = (
                f"{_LABELS[name]}: {short(first)} at the start, {short(last)} at the end, best "
            )
            course += f"{short(best)} at step {best_step}"
            rose = last > first if higher_is_better(name) else last < first
            return course if rose else f"{course}: nothing was learned by this measure"
        return None

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _remaining(self) -> float | None:
        done = self._step - self._start_step
        if done <= 0:
            return None
        seconds_per_step = (self._updated - self._started) / done
        since_update = time.monotonic() - self._updated
        return seconds_per_step * (self._total - self._step) - since_update

    def _print_line(self, metrics: Mapping[str, float]) -> None:
        shown = [name for name in self._columns if name in metrics] or list(metrics)[:4]
        cells = [f"{_LABELS.get(name, name)} {short(metrics[name])}" for name in shown]
        width = len(str(self._total))
        head = f"{self._description} {self._step:>{width}}/{self._total}"
        self.message("  ".join([head, *cells, f"eta {clock(self._remaining())}"]))

    def _render(self) -> Group:
        elapsed = time.monotonic() - self._started
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(self._description, style="bold")
        title.append(f"  {self._subtitle}", style="dim")
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        for _ in range(2):
            head.add_column(no_wrap=True, justify="right")
        waiting = self._step == self._start_step
        bar = ProgressBar(
            total=max(self._total, 1), completed=self._step, pulse=waiting, animation_time=elapsed
        )
        left = "" if self._step >= self._total else f", {clock(self._remaining())} left"
        head.add_row(
            bar,
            Text.assemble(f"{self._step}/{self._total} ", (f"{clock(elapsed)}{left}", "dim")),
            Text(self._phase, style="cyan"),
        )
        lines = [title, head, *self._held_out_lines(), self._metric_line(), *self._sample_lines()]
        return Group(
            *lines, *(Text(f"! {each}", style="yellow") for each in self._warnings.values())
        )

    def _held_out_lines(self) -> list[Text]:
        """The number that one decides by comes first, with where it began and was best."""
        lines = []
        for name, values in self._held_out.items():
            (_, first), (_, last), (best_step, best) = values[0], values[-1], _best(name, values)
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{_LABELS[name]} ", style="dim")
            line.append(short(last), style="bold")
            line.append(
                f" {trend([value for _, value in values], bars_for(self._console))}", style="green"
            )
            line.append(f"  start {short(first)}  best {short(best)} @{best_step}", style="dim")
            lines.append(line)
        return lines

    def _metric_line(self) -> Text:
        """As many of the columns as the width has room for, whole ones."""
        line = Text(no_wrap=True, overflow="ellipsis")
        for name in self._columns:
            if name not in self._metrics or name in _HELD_OUT:
                continue
            cell = Text("  " if line else "")
            cell.append(f"{_LABELS.get(name, name)} ", style="dim")
            cell.append(short(self._metrics[name]), style="bold")
            if name == self._columns[0]:
                cell.append(" " + trend(self._course, bars_for(self._console)), style="green")
            if line.cell_len + cell.cell_len <= self._console.width:
                line.append_text(cell)
        return line if line else Text("waiting for the first step", style="dim")

    def _sample_lines(self) -> list[Text]:
        """The completions beneath their prompt, or each behind its own."""
        step, samples = self._samples
        if not samples:
            return []
        prompts = [_one_line(sample.prompt) for sample in samples]
        is_one = len(samples) > 1 and len(set(prompts)) == 1
        head = f"step {step}, of one prompt: {prompts[0]}" if is_one else f"step {step}"
        lines = [Text(head, style="dim")]
        for sample, prompt in zip(samples, prompts, strict=True):
            judged = math.isfinite(sample.reward)
            line = Text("  ")
            line.append(f"{short(sample.reward) if judged else '':>6} ", style="bold")
            if not is_one:
                room = max(self._console.width // 2 - 10, 8)
                line.append(f"{prompt if len(prompt) <= room else f'…{prompt[-room:]}'} → ", "dim")
            line.append(_one_line(sample.completion))
            lines.append(line)
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return lines


def _best(name: str, values: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """(step, value) of the best; the earliest of equal ones."""
    sign = 1 if higher_is_better(name) else -1
    return max(values, key=lambda pair: (sign * pair[1], -pair[0]))


def _one_line(text: Any) -> str:
    """A text, or the last of some messages, on one line."""
    if not isinstance(text, str):
        text = text[-1]["content"] if text else ""
    return " ".join(str(text).split())
