"""`rlcore report`: runs as one page of HTML, to be read without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlcore.errors import UserError
from rlcore.runs.checked import Checked
from rlcore.runs.reading import read_run
from rlcore.runs.report.page import write_page


@dataclass(kw_only=True)
class RunReportConfig(Checked):
    """Report."""

    runs: list[str]  # output directories of training runs, finished or not
    output: str = "report.html"  # the page; one that is there is replaced


def report(config: RunReportConfig) -> None:
    """Write the page.

    Raises:
        UserError: a directory without a run, or a page that cannot be written.
    """
    if not config.runs:
        raise UserError("runs names no run: give the output directories of one or more")
    if Path(config.output).is_dir():
        raise UserError(f"output {config.output} is a directory: name a file, as report.html")
    runs = [read_run(directory) for directory in config.runs]
    print(f"the report is {write_page(runs, config.output)}")
