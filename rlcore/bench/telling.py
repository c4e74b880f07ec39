"""What `rlcore bench` says while it runs: where it is, what a case gave, what all will cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from rich.console import Console
from rich.table import Table

from rlcore.bench.cases import Case
from rlcore.bench.contestants import steps
from rlcore.bench.contestants.rows import contestants
from rlcore.bench.operations import OPERATIONS
from rlcore.bench.results.results import NOT_RUN, Row
from rlcore.bench.results.tables import bytes_text, fastest_first, row_cells

GPU_SECONDS = 1.0  # a contestant in a case: 300 ms of calls, a warm-up, and its check


def progress(number: int, count: int, left: int, measured: int, passed: float) -> str:
    """case 8 of 39, about 4 min left: as long a case as those before took."""
    place = f"case {number + 1} of {count}"
    return f"{place}, about {minutes(passed / measured * left)} left" if measured else place


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def print_cost(
    console: Console,
    cases: Sequence[Case],
    wanted: Collection[str],
    device: torch.device,
    case_seconds: float,
) -> None:
    """Each case, then how long all may take and how much memory the largest logits want.

    Args:
        wanted: names of contestants, with spaces; empty: all that run here.
    """
    for case in cases:
        console.print(case.key, highlight=False, soft_wrap=True)
    count = sum(len(_entrants(case, wanted, device)) for case in cases)
    if device.type == "cpu":
        # the rounds stop at case_seconds; the check of each contestant and its memory come besides
        most = minutes(case_seconds * len(cases))
        time_taken = f"at most about {most} of rounds, and a check of each contestant"
    else:
        time_taken = f"about {minutes(count * GPU_SECONDS)}"
    sizes = [
        (case.N or case.B * case.T) * case.V * getattr(torch, case.dtype).itemsize for case in cases
    ]
    widest = max(sizes, default=0)
    memory = f"; the largest logits are {bytes_text(widest)}" if widest else ""
    console.print(
        f"{len(cases)} cases, {count} times of contestants: {time_taken}{memory}", highlight=False
    )


def _entrants(case: Case, wanted: Collection[str], device: torch.device) -> list[str]:
    """The contestants of a case that are wanted and do not refuse it from the start."""
    if case.op not in OPERATIONS:
        able = list(steps.CONTESTANTS)
    else:
        able = [n for n, each in contestants(case.op).items() if each.unable(case, device) is None]
    return [name for name in able if not wanted or name.replace("-", " ") in wanted]


def print_case(console: Console, case: Case, rows: Sequence[Row]) -> None:
    """A table of those that ran, the fastest first; below it remarks, and who did not run."""
    console.print(f"[bold]{case.key}[/bold]", highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("contestant", "time", "x floor", "error", "peak"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    remarks = []
    for row in fastest_first(row for row in rows if row.status not in NOT_RUN):
        name, seconds, _, ratio, error, peak, remark = row_cells(row)
        table.add_row(name, seconds, ratio, error, peak)
        remarks += [f"{name}: {remark}"] if remark else []
    console.print(table)
    left_out = [f"{row.contestant} ({row.note})" for row in rows if row.status in NOT_RUN]
    remarks += [f"not run: {', '.join(left_out)}"] if left_out else []
    for remark in remarks:
        console.print(remark, style="dim", highlight=False, markup=False)
    console.print()
