"""Results as pictures: times over the floor by operation, and curves in N and V."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlcore.bench.cases import Case
from rlcore.bench.results.results import Results, Row
from rlcore.bench.results.tables import sizes
from rlcore.runs.curves import load_pyplot

# colour-blind safe; a contestant has the same colour in every picture
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#000000")
MARKERS = "osD^vP*X"
FEWEST_POINTS = 3


def draw(run: Results, directory: Path) -> dict[str, Path]:
    """Draws every picture as PNG and SVG; returns {title: path of the PNG}."""
    pyplot = load_pyplot()
    pyplot.rcParams["svg.hashsalt"] = "rlcore"  # the same results give the same file
    directory.mkdir(parents=True, exist_ok=True)
    style = _styles(run)
    made = {}
    for op, rows in _by_operation(run).items():
        title = f"{op}: time over the floor"
        made[title] = _save(_bars(pyplot, title, rows, style), directory / f"{op}")
    for (op, size), cases in curves(run).items():
        title = f"{op}: time by {size}"
        made[title] = _save(_curve(pyplot, title, size, cases, style), directory / f"{op}-{size}")
    return made


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=130)
    pyplot.close(figure)
    return path.with_suffix(".png")


def _styles(run: Results) -> dict[str, tuple[str, str]]:
    timed = dict.fromkeys(row.contestant for row in run.rows if row.seconds)
    ours_first = sorted(timed, key=lambda name: not name.startswith("rlcore"))
    return {
        name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(ours_first)
    }


def _by_operation(run: Results) -> dict[str, list[Row]]:
    """The timed rows of each operation, without cases that only serve a curve."""
    found = defaultdict(list)
    for row in run.rows:
        if row.seconds and row.floor:
            found[Case.parse(row.case).op].append(row)
    return found


def curves(run: Results) -> dict[tuple[str, str], list[tuple[Case, list[Row]]]]:
    """{(operation, size): cases in order} where cases differ in that size alone."""
    found: dict[tuple, list] = defaultdict(list)
    for key in run.cases:
        case = Case.parse(key)
        for size in ("N", "V"):
            if getattr(case, size):
                # sequences are as many, so their length goes with N
                rest = dataclasses.replace(case, **{size: 0}, T=0 if size == "N" else case.T)
                found[case.op, size, rest].append((case, run.of(key)))
    longest: dict[tuple[str, str], list] = {}
    for (op, size, _), cases in found.items():
        if len(cases) >= max(FEWEST_POINTS, len(longest.get((op, size), ())) + 1):
            longest[op, size] = sorted(cases, key=lambda item: getattr(item[0], size))
    return longest


def _bars(pyplot: Any, title: str, rows: list[Row], style: dict) -> Any:
    keys = list(dict.fromkeys(row.case for row in rows))
    lines = sum(1 for _ in rows) + len(keys)
    figure, axis = pyplot.subplots(figsize=(8, 0.9 + 0.24 * lines), layout="constrained")
    place, ticks = 0.0, []
    for key in keys:
        mine = sorted((r for r in rows if r.case == key), key=lambda row: row.seconds)
        case = Case.parse(key)
        ticks.append((place + (len(mine) - 1) / 2, f"{case.direction}\n{case.dtype}\n"
                      f"{sizes(case)}"))  # fmt: skip
        for row in mine:
            ratio = row.times_the_floor
            axis.barh(place, ratio, color=style[row.contestant][0], height=0.85,
                      hatch=None if row.status == "ok" else "///")  # fmt: skip
            wrong = "" if row.status == "ok" else f" ({row.status})"
            axis.annotate(f"{row.contestant}{wrong} {ratio:.3g}", (ratio, place), xytext=(4, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
            place += 1
        place += 1
    axis.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axis.set_xscale("log")
    high = max(row.times_the_floor for row in rows)
    axis.set_xlim(min(0.8, *(row.times_the_floor for row in rows)) * 0.9, high**1.25 * 2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("times the measured floor (log scale; 1 is what the machine can do)")
    _finish(axis, title)
    axis.invert_yaxis()
    return figure


def _curve(pyplot: Any, title: str, size: str, cases: list, style: dict) -> Any:
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, (color, marker) in style.items():
        points = [
            (getattr(case, size), row.seconds * 1e3)
            for case, rows in cases
            for row in rows
            if row.contestant == name and row.seconds
        ]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, ms=5, label=name)
    floor = [(getattr(case, size), rows[0].floor * 1e3) for case, rows in cases if rows[0].floor]
    axis.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
    axis.set_xscale("log", base=2 if size == "N" else 10)
    axis.set_yscale("log")
    ticks = sorted({getattr(case, size) for case, _ in cases})
    axis.set_xticks(ticks, [str(value) for value in ticks])
    axis.minorticks_off()
    axis.set_xlabel({"N": "tokens N", "V": "vocabulary V"}[size])
    axis.set_ylabel("milliseconds (log scale)")
    axis.legend(frameon=False, fontsize=8)
    case = cases[0][0]
    fixed = ", ".join(f"{n} {getattr(case, n)}" for n in "NHV" if n != size and getattr(case, n))
    _finish(axis, f"{title} ({case.dtype}, {case.direction}, {fixed})")
    return figure


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
