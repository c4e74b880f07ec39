"""`rlcore bench report RESULTS.json ...`: Markdown tables, plots, and one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlcore.bench.cases import Case
from rlcore.bench.results import plots, tables
from rlcore.bench.results.results import NOT_RUN, Results, Row, load
from rlcore.errors import UserError
from rlcore.runs.checked import Checked

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --ours: #0072B2; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
td:first-child, td:last-child { white-space: normal; }
tr.ours td:first-child { color: var(--ours); font-weight: 600; }
tr.wrong, tr.failed { opacity: .75; }
tr.wrong td:last-child, tr.failed td:last-child { color: #D55E00; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { max-width: 100%; height: auto; }
ul { padding-left: 1.2rem; }
"""


@dataclass
class ReportConfig(Checked):
    """Report"""

    # JSON files that `rlcore bench` wrote
    results: list[str]
    # directory for report.md, report.html and plots/; default: the first file's name, less .json
    output_dir: str | None = None


def report(config: ReportConfig) -> int:
    """Write the report of all files; prints where. Raises UserError where a file is no results."""
    if not config.results:
        raise UserError("`rlcore bench report` needs at least one results file")
    runs = [load(path) for path in config.results]
    if not any(run.rows for run in runs):
        raise UserError("the results hold no rows: nothing to report")
    directory = Path(config.output_dir or Path(config.results[0]).with_suffix(""))
    page = write_report(runs, directory)
    print(f"{directory}/report.md, report.html and plots/ are written; open {page}")
    return 0


def write_report(runs: list[Results], directory: Path) -> Path:
    """report.md, report.html (which needs no other file) and plots/*.png and .svg."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [plots.draw(run, directory / "plots" / f"{i}" if i else directory / "plots")
             for i, run in enumerate(runs)]  # fmt: skip
    text = [tables.markdown(run) + _images(figures, directory)
            for run, figures in zip(runs, drawn, strict=True)]  # fmt: skip
    (directory / "report.md").write_text("\n".join(text), "utf-8")
    page = directory / "report.html"
    page.write_text("\n".join(_page(runs, drawn)) + "\n", "utf-8")
    return page


def _images(figures: dict[str, Path], directory: Path) -> str:
    lines = (f"![{title}]({png.relative_to(directory)})" for title, png in figures.items())
    return "\n" + "\n".join(lines) + "\n"


def _page(runs: list[Results], drawn: list[dict[str, Path]]) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>rlcore benchmarks</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}</style></head><body><h1>rlcore benchmarks</h1>"
    for run, figures in zip(runs, drawn, strict=True):
        yield from _section(run, figures)
    yield "</body></html>"


def _section(run: Results, figures: dict[str, Path]) -> Iterator[str]:
    yield f"<h2>{_text(run.machine['device'])}, {_text(run.machine['date'])}</h2>"
    yield _list(tables.machine_lines(run))
    yield "<h3>Ours against the fastest other that is right</h3>"
    yield from _table(tables.SUMMARY, ((cells, "") for cells in tables.summary_rows(run)))
    for title, png in figures.items():
        svg = png.with_suffix(".svg").read_text("utf-8")
        # what stands before <svg is not allowed inside a page
        yield f"<figure aria-label='{_text(title)}'>{svg[svg.index('<svg') :]}</figure>"
    yield "<h2>Every contestant</h2>"
    for key in run.cases:
        rows = [row for row in run.of(key) if row.status not in NOT_RUN]
        if rows:
            yield f"<h3>{_text(tables.label(key))}</h3>"
            yield f"<p>floor {tables.seconds_text(rows[0].floor)}</p>"
            yield from _table(tables.HEADINGS, ((tables.row_cells(r), _class(r))
                                                for r in tables.fastest_first(rows)))  # fmt: skip
    missing = tables.absent(run)
    if missing:
        yield "<h2>Not run here</h2>"
        yield _list(f"{reason} ({', '.join(dict.fromkeys(Case.parse(k).op for k in keys))})"
                    for reason, keys in missing.items())  # fmt: skip


def _class(row: Row) -> str:
    return row.status if row.status != "ok" else "ours" if row.contestant[:6] == "rlcore" else ""


def _table(headings, rows) -> Iterator[str]:
    yield '<div class="wide"><table><thead><tr>'
    yield "".join(f"<th>{_text(heading)}</th>" for heading in headings) + "</tr></thead><tbody>"
    for cells, kind in rows:
        inside = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        yield f'<tr class="{kind}">{inside}</tr>'
    yield "</tbody></table></div>"


def _list(lines) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _text(value: object) -> str:
    return html.escape(str(value))
