"""Curves as PNG files."""

from __future__ import annotations

import builtins
import json

import pytest

from rlcore.errors import UserError
from rlcore.runs.curves import plot_curves, require_matplotlib

pyplot = pytest.importorskip("matplotlib.pyplot")


def metrics(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def runs(tmp_path):
    steps = [{"step": step, "reward": step / 10, "eval/reward": None} for step in (1, 2, 3)]
    steps[1]["eval/reward"] = 0.5
    control = [{"step": step, "reward": 0.1} for step in (1, 2, 3)]
    return {
        "GRPO": metrics(tmp_path / "a.jsonl", *steps),
        "control": metrics(tmp_path / "b.jsonl", *control),
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as they were when they were."""
    figures = []
    original = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: figures.append(figure))
    yield figures
    for figure in figures:
        original(figure)


def test_a_curve_shows_every_run_with_labels_and_legend(runs, tmp_path, drawn):
    out = plot_curves(runs, tmp_path / "new" / "curve.png", metrics=("reward",), title="run")
    assert out.read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    assert axis.get_xlabel() == "optimizer step"
    assert axis.get_ylabel() == "mean reward of a batch"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["GRPO", "control"]
    assert axis.lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3]


def test_measurements_beside_the_log_join_its_line_in_order(runs, tmp_path, drawn):
    extra = {"eval/reward": {"GRPO": [(0, 0.25)]}}
    plot_curves(runs, tmp_path / "curve.png", metrics=("reward", "eval/reward"), extra=extra)
    line = drawn[0].axes[1].lines[0]
    assert line.get_xdata().tolist() == [0, 2]
    assert line.get_ydata().tolist() == [0.25, 0.5]


def test_a_metric_that_no_run_logged_is_refused_and_nothing_written(runs, tmp_path):
    with pytest.raises(UserError, match="no run logged 'nope'"):
        plot_curves(runs, tmp_path / "curve.png", metrics=("nope",))
    assert not (tmp_path / "curve.png").exists()


def test_a_missing_metrics_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        plot_curves({"run": tmp_path / "gone.jsonl"}, tmp_path / "curve.png")


def test_a_missing_matplotlib_is_answered_with_the_way_to_get_it(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match=r"pip install 'rlcore\[report\]'"):
        require_matplotlib()
