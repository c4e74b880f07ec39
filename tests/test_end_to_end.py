"""What README says a person can do, done in order with the command line alone, on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny import save_tiny

from rlcore.cli import main
from rlcore.runs.tracking import read_metrics

REWARD = """
def digits(prompts, completions, **columns):
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]
"""
DEADLINE = 120.0


class Terminal:
    """A command line on a terminal of 80 columns."""

    def __init__(self, words: list[str], directory: Path):
        self._screen, end = pty.openpty()
        environment = os.environ | {"COLUMNS": "80", "LINES": "30", "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlcore", *words], cwd=directory, env=environment,
            stdin=end, stdout=end, stderr=end, close_fds=True, start_new_session=True,
        )  # fmt: skip
        os.close(end)
        self.shown = ""

    def read_until(self, wanted: str | None) -> None:
        """Read what is shown until `wanted`, or to the end of the command."""
        until = time.monotonic() + DEADLINE
        while wanted is None or not re.search(wanted, self.shown):
            assert time.monotonic() < until, self.shown[-2000:]
            if not select.select([self._screen], [], [], 0.2)[0]:
                continue
            try:
                piece = os.read(self._screen, 65536)
            except OSError:  # the other end is closed
                piece = b""
            if not piece:
                assert wanted is None, self.shown[-2000:]
                break
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece.decode(errors="replace"))

    def press_ctrl_c(self) -> None:
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> int:
        self.read_until(None)
        status = self._process.wait(DEADLINE)
        os.close(self._screen)
        return status


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    save_tiny(tmp_path / "model", initializer_range=0.05)
    rows = [json.dumps({"prompt": f"{n}+1="}) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:12]))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[12:]))
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path


def test_train_stop_go_on_score_talk_compare_and_report(home, capsys):
    train = [
        "train",
        "grpo",
        "--model",
        "model",
        "--dataset",
        "rows.jsonl",
        "--eval-dataset",
        "held.jsonl",
        "--eval-steps",
        "5",
        "--reward",
        "mine.py:digits",
        "--output-dir",
        "run",
        "--max-steps",
        "40",
        "--learning-rate",
        "3e-2",
        "--lr-scheduler-type",
        "constant",
        "--num-generations",
        "8",
        "--per-device-train-batch-size",
        "64",
        "--max-completion-length",
        "4",
        "--save-steps",
        "5",
    ]
    terminal = Terminal(train, home)
    terminal.read_until(r"step \d+, of one prompt: \d+\+1=")
    assert terminal.shown.index("reading the model and the data") < terminal.shown.index(
        "GRPO  run"
    )
    assert "GRPO  run  Qwen2" in terminal.shown and "held-out reward" in terminal.shown
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    flat = " ".join(terminal.shown.split())
    assert "stopped by SIGINT after step" in flat and "--resume goes on from checkpoint-" in flat
    stopped = read_metrics(home / "run" / "metrics.jsonl")[-1]["step"]
    assert stopped < 40

    terminal = Terminal([*train, "--resume"], home)
    assert terminal.end() == 0
    flat = " ".join(terminal.shown.split())
    assert re.search(r"held-out reward: \S+ at the start, \S+ at the end, best \S+ at step", flat)
    assert "warning:" not in flat, "on a terminal it stands on the screen already"
    command = re.search(r"next: rlcore (eval model run/best .*?) next: rlcore chat run/best", flat)[
        1
    ]
    lines = read_metrics(home / "run" / "metrics.jsonl")
    assert [x["step"] for x in lines if "reward" in x] == list(range(1, 41))

    # as the end of the run proposes; nothing but digits is an answer that passes
    # in one batch, as the run evaluated
    more = ["--num-samples", "2", "--batch-size", "64", "--output", "answers.jsonl"]
    assert main([*command.split(), *more]) == 0
    shown = capsys.readouterr().out
    assert "minus the first" in shown and all(len(line) <= 80 for line in shown.splitlines())
    answers = [json.loads(line) for line in (home / "answers.jsonl").open()]
    best = [a["reward"] for a in answers if a["model"] == "run/best" and a["kind"] == "greedy"]
    at_best = max(line["eval/reward"] for line in lines if "eval/reward" in line)
    assert sum(best) / len(best) == pytest.approx(at_best)

    terminal = Terminal(
        ["chat", "run/best", "--reward", "mine.py:digits", "--max-completion-length", "4"], home
    )
    terminal.read_until("> ")
    os.write(terminal._screen, b"3+1=\n")
    terminal.read_until(r"reward \d\.\d{3}")
    os.write(terminal._screen, b"/quit\n")
    assert terminal.end() == 0

    again = [word if word != "run" else "other" for word in train]
    assert main([*again, "--max-steps", "2", "--learning-rate", "1e-9"]) == 0
    capsys.readouterr()
    assert main(["compare", "run", "other"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"learning_rate +0\.03 +1e-09", shown) and "eval/reward" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert main(["report", "run", "other", "--output", "both.html"]) == 0
    assert (home / "both.html").stat().st_size > 10_000
    assert (home / "run" / "report.html").is_file() and (home / "run" / "README.md").is_file()
