"""Reports and comparisons of benchmark results."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rlcore.bench.results import plots, report, results, tables
from rlcore.bench.results.compare import CompareConfig, compare
from rlcore.bench.results.results import Results, Row
from rlcore.bench.static import static
from rlcore.cli import main
from rlcore.errors import UserError

MACHINE = {"device": "AMD <EPYC>", "cpu_cores": 2, "threads": 1, "python": "3.11.7"}
MACHINE |= {"versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-11-23"}
FLOORS = {"copy_bandwidth": 1.5e10, "matmul_rate": {"float32": 5e10}}
KEY = "token_logprob/forward/float32/N={},V=32000,B=8,T=2"


def row(contestant: str, seconds: float | None, tokens: int = 16, **changes) -> Row:
    values = dict(
        status="ok", error=1e-7, tolerance=1e-3, floor=1e-3, samples=5, peak_bytes=1 << 26
    )
    values |= {"seconds": seconds, "low": seconds, "high": seconds} if seconds else {}
    return Row(KEY.format(tokens), contestant, **(values | changes))


def made(*rows: Row) -> Results:
    return Results(dict(MACHINE), ["one thread"], dict(FLOORS), list(rows), finished=True)


SAMPLE = made(
    *(row("rlcore torch", 2e-3 * n / 16, n) for n in (16, 32, 64)),
    *(row("trl", 4e-3 * n / 16, n) for n in (16, 32, 64)),
    row("fast & wrong", 1e-3, status="wrong", error=0.5),
    row("verl", None, status="absent", note="needs ray", error=None),
)


def saved(run: Results, path) -> str:
    run.save(path)
    return str(path)


def test_results_survive_their_file(tmp_path):
    assert vars(results.load(saved(SAMPLE, tmp_path / "a" / "r.json"))) == vars(SAMPLE)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no benchmark results of schema 1"),
        ('{"schema": 0}', "holds no benchmark results of schema 1"),
        ('{"schema": 1, "rows": [{"case": "x"}]}', "is not as `rlcore bench` writes it"),
    ],
)
def test_a_file_that_is_no_results_is_refused(tmp_path, text, said):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=said):
        results.load(tmp_path / "r.json")


def test_markdown_has_each_ratio_and_does_not_hide_the_wrong_one():
    text = tables.markdown(SAMPLE)
    case = "token_logprob, forward, float32, N 16, V 32000"
    assert f"| {case} | 2 ms | 2.00 | trl | 4 ms | 2.00 |" in text
    assert "| fast & wrong | 1 ms | 1 ms to 1 ms | 1.00 | 5e-01 | 64 MiB | wrong" in text
    assert "- verl: needs ray (token_logprob)" in text
    assert "copy 15 GB/s" in text and "commit abc" in text


def test_a_case_without_a_right_row_of_ours_claims_nothing():
    run = made(row("rlcore torch", 1e-3, status="wrong"), row("trl", 2e-3))
    assert next(tables.summary_rows(run))[1:] == ["-"] * 5


class Page(HTMLParser):
    """Tags in balance, and what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        named = dict(attrs)
        wanted = [named.get(name) for name in ("src", "href", "xlink:href")]
        self.fetched += [
            value for value in wanted if value and not value.startswith(("#", "data:"))
        ]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_and_escapes_names(tmp_path):
    page = Page()
    text = report.write_report([SAMPLE, SAMPLE], tmp_path).read_text("utf-8")
    page.feed(text)
    assert not page.open and not page.fetched
    assert page.tags.count("html") == 1 and page.tags.count("svg") == 4 and "tr" in page.tags
    assert "AMD &lt;EPYC&gt;" in text and "fast &amp; wrong" in text and "<EPYC>" not in text
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"token_logprob.png", "token_logprob.svg", "token_logprob-N.png"} <= names
    for line in (tmp_path / "report.md").read_text("utf-8").splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("](")[1].rstrip(")")).exists()


def test_the_same_results_draw_the_same_picture(tmp_path):
    drawn = [plots.draw(SAMPLE, tmp_path / name) for name in ("a", "b")]
    for one, other in zip(*(d.values() for d in drawn), strict=True):
        assert one.with_suffix(".svg").read_bytes() == other.with_suffix(".svg").read_bytes()


def test_a_curve_needs_three_cases_that_differ_in_one_size():
    assert [key for key in plots.curves(SAMPLE)] == [("token_logprob", "N")]
    fewer = made(*(r for r in SAMPLE.rows if "N=64" not in r.case))
    assert not plots.curves(fewer)


def changed(run: Results, contestant: str, **changes) -> Results:
    rows = [dataclasses.replace(r, **changes) if r.contestant == contestant else r
            for r in run.rows]  # fmt: skip
    return dataclasses.replace(run, rows=rows)


PAIR = made(row("rlcore torch", 2e-3), row("trl", 4e-3))


@pytest.mark.parametrize(
    ("after", "status", "said"),
    [
        (PAIR, 0, "0 regressions"),
        (changed(PAIR, "rlcore torch", seconds=2.1e-3), 0, "0 regressions"),
        (changed(PAIR, "rlcore torch", seconds=3e-3), 1, "slower"),
        (changed(PAIR, "rlcore torch", seconds=1e-3), 0, "faster"),
        (changed(PAIR, "rlcore torch", peak_bytes=1 << 27), 1, "larger"),
        (changed(PAIR, "rlcore torch", status="wrong"), 1, "worse"),
        (made(row("trl", 4e-3)), 1, "gone"),
        # the whole machine was slower, or the peers were faster alone
        (made(row("rlcore torch", 4e-3), row("trl", 8e-3)), 0, "0 regressions"),
        (made(row("rlcore torch", 2e-3), row("trl", 2e-3)), 1, "slower"),
    ],
)
def test_compare_finds_regressions_relative_to_the_machine(tmp_path, capsys, after, status, said):
    before = saved(PAIR, tmp_path / "before.json")
    assert main(["bench", "compare", before, saved(after, tmp_path / "after.json")]) == status
    assert said in capsys.readouterr().out


def test_compare_judges_peers_when_asked(tmp_path):
    before = saved(PAIR, tmp_path / "before.json")
    after = saved(changed(PAIR, "trl", seconds=8e-3), tmp_path / "after.json")
    assert compare(CompareConfig(before=before, after=after)) == 0
    assert compare(CompareConfig(before=before, after=after, all=True)) == 1


def test_compare_refuses_what_does_not_compare(tmp_path):
    here = saved(PAIR, tmp_path / "a.json")
    other = made(*PAIR.rows)
    other.machine["device"] = "another"
    with pytest.raises(UserError, match="times of different machines"):
        compare(CompareConfig(before=here, after=saved(other, tmp_path / "b.json")))
    elsewhere = made(row("rlcore torch", 1e-3, 64))
    with pytest.raises(UserError, match="no contestant and case is in both"):
        compare(CompareConfig(before=here, after=saved(elsewhere, tmp_path / "c.json")))
    with pytest.raises(UserError, match="slower must be at least 1"):
        compare(CompareConfig(before=here, after=here, slower=0.9))


def test_the_commands_say_what_is_missing(tmp_path, capsys):
    assert main(["bench", "compare", "one.json"]) == 2
    assert "--after" in capsys.readouterr().err
    assert main(["bench", "report"]) == 2
    assert "--results" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main(["bench", "report", "--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out


def test_a_comparison_fits_80_columns_a_case_on_a_line_of_its_own(tmp_path):
    slow = [dataclasses.replace(r, seconds=9e-3, peak_bytes=1 << 27) for r in PAIR.rows[:1]]
    wide = "linear_cross_entropy/forward+backward/bfloat16/N=8192,V=128256,H=4096,B=8,T=1024"
    rows = [dataclasses.replace(r, case=wide) for r in (*PAIR.rows[:1], *slow)]
    before = made(*PAIR.rows, rows[0])
    after = made(*slow, *PAIR.rows[1:], rows[1])
    screen = Console(file=io.StringIO(), width=80)
    config = CompareConfig(
        before=saved(before, tmp_path / "a.json"), after=saved(after, tmp_path / "b.json")
    )
    assert compare(config, screen) == 1
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert wide in lines and all(len(line) <= 80 for line in lines if line != wide)
    place = lines.index(wide)
    assert lines[place + 1].startswith("  slower  rlcore torch  2 ms -> 9 ms (4.50 times)")
    assert lines[place + 2] == "  larger  rlcore torch  64 MiB -> 128 MiB"
    assert lines[-1].endswith("4 regressions")


def test_moved_shows_no_empty_notes_and_those_that_there_are():
    screen = Console(file=io.StringIO(), width=80)
    entry = {"op": "token_logprob", "contestant": "rlcore triton", "reads": 2.0, "writes": 1.0}
    other = {"contestant": "fla", "note": "launched no kernel here", "reads": 0.0, "writes": 0.0}
    static._print(screen, "moved", [entry | {"note": ""}, entry | other])
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert "note" not in lines[1] and "  fla: launched no kernel here" in lines
    assert all(len(line) <= 80 for line in lines)
