"""Results as JSON: one file a run, one row a contestant in a case."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcore.bench.cases import Case
from rlcore.errors import UserError

SCHEMA = 1
STATUSES = {
    "ok": "within the tolerance",
    "wrong": "its error is beyond the tolerance; its time is not comparable",
    "failed": "it raised an error",
    "absent": "not installed",
    "unable": "cannot run this case here",
}
NOT_RUN = ("absent", "unable")


@dataclass(frozen=True)
class Row:
    """One contestant in one case.

    Args:
        case: the case's key.
        status: a key of STATUSES; `note` says more.
        error: largest RMS error of an output or gradient over the truth's RMS; None: not run.
        seconds, low, high: of one call: median, 20% and 80% quantiles, over `samples` samples.
        floor: the least seconds that the case can take on this machine.
        peak_bytes: memory above the inputs at its highest, results included.
        host_seconds: what the host needs to issue the call, where it was measured.
    """

    case: str
    contestant: str
    status: str
    note: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    floor: float | None = None
    peak_bytes: int | None = None
    host_seconds: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def times_the_floor(self) -> float | None:
        return self.seconds / self.floor if self.seconds and self.floor else None


@dataclass
class Results:
    """A run: what it was made on, under which conditions, the floors, and the rows."""

    machine: dict[str, Any]
    conditions: list[str]
    floors: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    finished: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "", {})}
            for row in self.rows
        ]
        values = {"schema": SCHEMA, **vars(self), "rows": rows}
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        os.replace(partial, path)


def load(path: str | Path) -> Results:
    """The results in a file. Raises UserError where it is no such file, or of another schema."""
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise UserError(f"{path} holds no benchmark results of schema {SCHEMA}: run `rlcore bench`")
    try:
        rows = [Row(**row) for row in values.pop("rows")]
        results = Results(rows=rows, **values)
        _check(results)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not as `rlcore bench` writes it: {error}") from error
    return results


def _check(results: Results) -> None:
    for row in results.rows:
        Case.parse(row.case)
        if row.status not in STATUSES:
            raise ValueError(f"unknown status {row.status!r}")
