"""The metrics file and the progress display."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from rlcore.errors import UserError
from rlcore.runs.figures import clock, short, trend
from rlcore.runs.tracking import Tracker, read_metrics


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def test_each_log_is_one_strict_json_line_that_is_there_at_once(tmp_path):
    with Tracker(tmp_path, 2, "run", console=console()) as tracker:
        tracker.log(1, {"reward": 0.5, "loss": math.nan, "kl": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    row = json.loads(lines[0], parse_constant=refuse)
    assert row == {"step": 1, "reward": 0.5, "loss": None, "kl": None}


def test_a_process_that_is_not_the_main_one_writes_and_shows_nothing(tmp_path):
    screen = console()
    with Tracker(tmp_path / "run", 1, "run", enabled=False, console=screen) as tracker:
        tracker.log(1, {"reward": 0.5})
        tracker.message("hello")
    assert not (tmp_path / "run").exists()
    assert screen.file.getvalue() == ""


def test_a_pipe_gets_plain_lines(tmp_path):
    screen = console()
    columns = ("reward", "kl", "tokens_per_second")
    with Tracker(tmp_path, 40, "GRPO", columns=columns, console=screen) as tracker:
        tracker.log(3, {"reward": 0.5123, "kl": 2e-5, "tokens_per_second": 5123.0, "other": 1.0})
        tracker.message("checkpoint saved")
    first, second = screen.file.getvalue().splitlines()
    assert first.startswith("GRPO  3/40  reward 0.512  kl 2.0e-05  tokens/s 5.1k  eta ")
    assert second == "checkpoint saved"
    assert "\x1b" not in first


def test_a_pipe_is_not_flooded_and_still_gets_the_first_and_the_last_line(tmp_path):
    screen = console()
    with Tracker(tmp_path, 500, "SFT", columns=("loss",), console=screen) as tracker:
        for step in range(1, 501):
            tracker.log(step, {"loss": 1.0})
    lines = screen.file.getvalue().splitlines()
    assert 2 <= len(lines) < 50
    assert (lines[0][:9], lines[-1][:11]) == ("SFT   1/5", "SFT 500/500")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 500


def test_a_pipe_gets_every_held_out_value_however_close_they_come(tmp_path):
    screen = console()
    with Tracker(tmp_path, 500, "SFT", columns=("loss",), console=screen) as tracker:
        for step in range(1, 500):
            tracker.log(step, {"loss": 1.0})
            if step % 50 == 0:
                tracker.log(step, {"eval/loss": step / 100})
    lines = screen.file.getvalue().splitlines()
    held_out = [line for line in lines if line.startswith("SFT") and "held-out" in line]
    assert [line.split()[1] for line in held_out] == [f"{step}/500" for step in range(50, 500, 50)]
    assert "held-out loss 1.500" in held_out[2]


def test_a_terminal_gets_a_live_block_with_bar_and_values(tmp_path):
    screen = console(terminal=True)
    with Tracker(tmp_path, 4, "GRPO", columns=("reward",), console=screen) as tracker:
        tracker.log(1, {"reward": 0.25})
        tracker.log(2, {"reward": 0.75})
    shown = screen.file.getvalue()
    assert "\x1b" in shown
    assert "2/4" in shown and "0.750" in shown and "▁█" in shown


def test_a_column_that_a_step_does_not_log_keeps_its_value(tmp_path):
    screen = console(terminal=True)
    with Tracker(tmp_path, 4, "run", columns=("reward", "kl"), console=screen) as tracker:
        tracker.log(1, {"reward": 0.25, "kl": 0.125})
        tracker.log(2, {"reward": 0.75})
        screen.file.truncate(0)
    assert "0.125" in screen.file.getvalue()


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    with Tracker(tmp_path, 4, "run", console=console()) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"reward": step / 10})
    with Tracker(tmp_path, 4, "run", start_step=2, console=console()) as tracker:
        tracker.log(3, {"reward": 9.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 9.0)]


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a line of JSON"):
        read_metrics(path)


def test_a_run_that_fails_before_its_first_line_leaves_no_directory(tmp_path):
    with pytest.raises(UserError), Tracker(tmp_path / "run", 4, "run", console=console()):
        raise UserError("the reward function raised")
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_later_keeps_what_it_logged(tmp_path):
    with (
        pytest.raises(UserError),
        Tracker(tmp_path / "run", 4, "run", console=console()) as tracker,
    ):
        tracker.log(1, {"reward": 0.5})
        raise UserError("the reward function raised")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.51234, "0.512"), (0.0, "0"), (2e-5, "2.0e-05"), (5123.0, "5.1k"), (3.2e6, "3.2M")],
)
def test_numbers_are_shown_short(value, text):
    assert short(value) == text
    assert short(-value) == (f"-{text}" if value else "-0")


def test_times_are_shown_as_a_clock():
    assert [clock(s) for s in (None, -3.0, 59.6, 3725.0)] == ["-:--", "0:00", "1:00", "1:02:05"]


def test_the_trend_runs_from_the_lowest_to_the_highest_bar():
    assert trend([1.0, 2.0, math.nan, 3.0]) == "▁▅█"
    assert trend([1.0]) == ""
    assert trend([2.0, 2.0]) == "▁▁"
    # a long course is shown whole, not its last values
    assert trend([float(value) for value in range(1000)])[::23] == "▁█"
