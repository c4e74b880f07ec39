"""`rlcore bench compare BEFORE AFTER`: what got slower, larger or wrong between two results."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table

from rlcore.bench.results.results import Results, Row, load
from rlcore.bench.results.tables import bytes_text, seconds_text
from rlcore.errors import UserError
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Range

Ratio = Annotated[float, Range(1)]


@dataclass
class CompareConfig(Checked):
    """Compare"""

    # the results to compare with
    before: str
    # the results to judge
    after: str
    # a time is a regression beyond so many times the one before
    slower: Ratio = 1.1
    # a peak of memory is one beyond so many times the one before
    larger: Ratio = 1.1
    # judge every contestant, not rlcore's alone
    all: bool = False


@dataclass(frozen=True)
class Change:
    """One contestant in one case: `kind` is "slower", "faster", "larger", "worse" or "gone"."""

    kind: str
    row: Row
    before: Row

    @property
    def text(self) -> str:
        if self.kind == "larger":
            return f"{bytes_text(self.before.peak_bytes)} -> {bytes_text(self.row.peak_bytes)}"
        if self.kind in ("worse", "gone"):
            return f"{self.before.status} -> {self.row.status}"
        old, new = seconds_text(self.before.seconds), seconds_text(self.row.seconds)
        return f"{old} -> {new} ({self.row.seconds / self.before.seconds:.2f} times)"


REGRESSIONS = ("slower", "larger", "worse", "gone")


def compare(config: CompareConfig, console: Console | None = None) -> int:
    """Print what changed; the exit status is 1 where something of it is a regression.

    Raises UserError where a file cannot be read, the machines differ, or no row is in both.
    """
    before, after = load(config.before), load(config.after)
    devices = before.machine["device"], after.machine["device"]
    if devices[0] != devices[1]:
        raise UserError(f"times of different machines do not compare: {' and '.join(devices)}")
    found, shared = changes(before, after, config)
    if not shared:
        raise UserError("no contestant and case is in both files")
    console = console or Console()
    for case in dict.fromkeys(change.row.case for change in found):
        _print_case(console, case, [change for change in found if change.row.case == case])
    regressions = sum(change.kind in REGRESSIONS for change in found)
    console.print(f"{shared} compared, {regressions} regressions", highlight=False)
    return int(regressions > 0)


def _print_case(console: Console, case: str, found: Sequence[Change]) -> None:
    """A case is a line of its own: 80 columns hold what changed in it."""
    console.print(case, style="bold", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for change in found:
        table.add_row(f"  {change.kind}", change.row.contestant, change.text)
    console.print(table)


def changes(before: Results, after: Results, config: CompareConfig) -> tuple[list[Change], int]:
    """(changes, regressions first; how many rows were compared).

    A time is taken relative to the drift of the case: by how much the contestants that are not
    judged got slower (their median), which is the machine's doing and not ours.
    """
    old = {(row.case, row.contestant): row for row in before.rows}
    found, shared = [], 0
    for row in after.rows:
        past = old.get((row.case, row.contestant))
        if past is None or not (config.all or row.contestant.startswith("rlcore")):
            continue
        shared += 1
        drift = 1.0 if config.all else _drift(before, after, row.case)
        found += [Change(kind, row, past) for kind in _kinds(past, row, drift, config)]
    present = {(row.case, row.contestant) for row in after.rows}
    for key, past in old.items():
        ours = config.all or past.contestant.startswith("rlcore")
        if key not in present and ours and past.case in after.cases:
            gone = dataclasses.replace(past, status="absent", seconds=None)
            found.append(Change("gone", gone, past))
            shared += 1
    return sorted(found, key=lambda change: change.kind not in REGRESSIONS), shared


def _drift(before: Results, after: Results, case: str) -> float:
    """By how much the peers' times in a case grew, the median; 1 where none was timed twice."""
    old = {row.contestant: row.seconds for row in before.of(case)}
    ratios = [
        row.seconds / old[row.contestant]
        for row in after.of(case)
        if not row.contestant.startswith("rlcore") and row.seconds and old.get(row.contestant)
    ]
    return statistics.median(ratios) if ratios else 1.0


def _kinds(past: Row, row: Row, drift: float, config: CompareConfig) -> list[str]:
    if past.status == "ok" and row.status != "ok":
        return ["worse"]
    kinds = []
    if past.seconds and row.seconds:
        ratio = row.seconds / past.seconds / drift
        kinds += ["slower"] * (ratio > config.slower) + ["faster"] * (ratio < 1 / config.slower)
    if past.peak_bytes and row.peak_bytes and row.peak_bytes > config.larger * past.peak_bytes:
        kinds.append("larger")
    return kinds
