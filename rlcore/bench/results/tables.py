"""Results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rlcore.bench.cases import Case
from rlcore.bench.results.results import NOT_RUN, STATUSES, Results, Row

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def seconds_text(seconds: float | None) -> str:
    """1.23 ms; "" for None."""
    if seconds is None:
        return ""
    fitting = (entry for entry in _UNITS if seconds >= entry[0])
    unit, name = next(fitting, _UNITS[-1])
    return f"{seconds / unit:.3g} {name}"


def bytes_text(count: int | None) -> str:
    if count is None:
        return ""
    if 0 < count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}" if math.isfinite(error) else str(error)


def best_of_ours(rows: Sequence[Row]) -> Row | None:
    """Our fastest row that is right."""
    ours = [r for r in rows if r.contestant.startswith("rlcore") and r.status == "ok" and r.seconds]
    return min(ours, key=lambda row: row.seconds, default=None)


def best_of_others(rows: Sequence[Row]) -> Row | None:
    others = [r for r in rows if not r.contestant.startswith("rlcore")]
    others = [row for row in others if row.status == "ok" and row.seconds]
    return min(others, key=lambda row: row.seconds, default=None)


def markdown(results: Results) -> str:
    """The whole report: machine, conditions, floors, summary, a table a case, who was not there."""
    return "\n".join(
        [
            *_head(results), "", "### Ours against the fastest other that is right", "",
            *_table(SUMMARY, summary_rows(results)), "", "### Every contestant", "",
            *_cases(results), *_absent(results),
        ]
    ) + "\n"  # fmt: skip


def machine_lines(results: Results) -> list[str]:
    """What a reader must know before any figure, as sentences."""
    machine, floors = results.machine, results.floors
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    rates = ", ".join(f"{d} {r / 1e12:.3g} TFLOP/s" for d, r in floors["matmul_rate"].items())
    lines = [
        f"{machine['device']}, {machine['threads']} of {machine['cpu_cores']} cores, "
        f"{machine['date']}, commit {machine['commit']}.",
        f"Python {machine['python']}, {versions}.",
        f"Measured floors: copy {floors['copy_bandwidth'] / 1e9:.3g} GB/s (bytes read plus "
        f"written), matmul {rates}.",
        *(f"{text[0].upper()}{text[1:]}." for text in results.conditions),
    ]
    if "gpu" in machine:
        gpu = ", ".join(f"{name} {value}" for name, value in machine["gpu"].items())
        lines.insert(1, f"GPU: {gpu}.")
    if not results.finished:
        lines.append("The run was not finished: cases are missing.")
    return lines


def _head(results: Results) -> Iterator[str]:
    yield f"## {results.machine['device']}, {results.machine['date']}"
    yield ""
    yield from machine_lines(results)


SUMMARY = ("case", "ours", "x floor", "fastest other", "its time", "its time over ours")
HEADINGS = ("contestant", "time", "20% to 80%", "x floor", "error", "peak memory", "")


def summary_rows(results: Results) -> Iterator[list[str]]:
    """For each case the fastest of ours and the fastest other, both right."""
    for key in results.cases:
        ours, other = best_of_ours(results.of(key)), best_of_others(results.of(key))
        cells = [label(key)]
        if ours is not None:
            cells += [seconds_text(ours.seconds), _ratio(ours.times_the_floor)]
        if ours is not None and other is not None:
            cells += [other.contestant, seconds_text(other.seconds)]
            cells += [f"{other.seconds / ours.seconds:.2f}"]
        yield cells + ["-"] * (len(SUMMARY) - len(cells))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def label(key: str) -> str:
    """The case as a reader sees it."""
    case = Case.parse(key)
    return f"{case.op}, {case.direction}, {case.dtype}, {sizes(case)}"


def sizes(case: Case) -> str:
    """N 512, H 896, V 32000, a quarter masked; or B 8, T 512."""
    named = [f"{name} {getattr(case, name)}" for name in "NHV" if getattr(case, name)]
    if not case.N:
        named = [f"{name} {getattr(case, name)}" for name in "BTHV" if getattr(case, name)]
    return ", ".join(named + [f"{case.masked:.0%} masked"] * bool(case.masked))


def fastest_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.seconds or math.inf)


def _cases(results: Results) -> Iterator[str]:
    for key in results.cases:
        rows = [row for row in results.of(key) if row.status not in NOT_RUN]
        if rows:
            yield f"**{label(key)}** (floor {seconds_text(rows[0].floor)})"
            yield ""
            yield from _table(HEADINGS, map(row_cells, fastest_first(rows)))
            yield ""


def row_cells(row: Row) -> list[str]:
    """One contestant's cells: name, time, quantiles, times the floor, error, memory, remark."""
    spread = f"{seconds_text(row.low)} to {seconds_text(row.high)}" if row.seconds else ""
    remark = "" if row.status == "ok" else f"{row.status}: {row.note or STATUSES[row.status]}"
    extra = {"host": seconds_text(row.host_seconds)} if row.host_seconds else {}
    if row.status == "ok":
        remark = ", ".join(f"{name} {value}" for name, value in (extra | row.more).items())
    return [
        row.contestant, seconds_text(row.seconds), spread, _ratio(row.times_the_floor),
        error_text(row.error), bytes_text(row.peak_bytes), remark,
    ]  # fmt: skip


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else ""


def absent(results: Results) -> dict[str, list[str]]:
    """{"contestant: why it was not run": cases}."""
    found: dict[str, list[str]] = {}
    for row in results.rows:
        if row.status in NOT_RUN:
            found.setdefault(f"{row.contestant}: {row.note}", []).append(row.case)
    return found


def _absent(results: Results) -> Iterator[str]:
    lines = absent(results)
    if lines:
        yield "### Not run here"
        yield ""
    for reason, cases in lines.items():
        operations = dict.fromkeys(Case.parse(key).op for key in cases)
        yield f"- {reason} ({', '.join(operations)})"
