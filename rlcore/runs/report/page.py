"""Runs as one self-contained HTML page: curves, samples, options, data, warnings, versions.

page.html holds the page's style and program; here its data is gathered and put into it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlcore.runs.atomic import staged_file
from rlcore.runs.reading import DECISIVE, RunFiles
from rlcore.runs.warnings import Warnings

PLACE = "/*DATA*/"
# of a metric, so that a long run stays a page that a browser shows at once
MOST_POINTS = 2000
MOST_SAMPLES = 3000


def write_page(runs: Sequence[RunFiles], path: str | Path) -> Path:
    """Write the page of one or several runs; the file is whole or absent.

    Raises:
        UserError: it cannot be written.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps({"runs": [_run(run) for run in runs]}, ensure_ascii=False)
    # nothing in it may end the script that it stands in
    page = template.replace(PLACE, data.replace("<", "\\u003c"))
    with staged_file(Path(path)) as staging:
        staging.write_text(page, encoding="utf-8")
    return Path(path)


def _run(run: RunFiles) -> dict[str, Any]:
    names = sorted(run.names, key=lambda name: (_rank(name), run.names.index(name)))
    courses = {name: _thinned(run.course(name), MOST_POINTS) for name in names}
    return {
        "name": str(run.directory),
        "trainer": run.trainer.removesuffix("Config"),
        "options": {name: _text(value) for name, value in run.options.items()},
        "facts": dict(run.facts),
        "warnings": list(warnings_of(run).values()),
        "metrics": {name: course for name, course in courses.items() if course},
        "completions": _thinned(run.completions, MOST_SAMPLES),
    }


def _rank(name: str) -> int:
    """What one decides by comes first, then what else was held out, then the rest."""
    if name in DECISIVE:
        return DECISIVE.index(name)
    return len(DECISIVE) + (not name.startswith("eval/"))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the last."""
    stride = -(-len(items) // most) or 1
    return list(items[::-1][::stride][::-1])


def warnings_of(run: RunFiles) -> dict[str, str]:
    """What a run's metrics warned of at its end."""
    warnings = Warnings()
    for line in run.metrics:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        warnings.follow(numbers)
    return warnings.active
