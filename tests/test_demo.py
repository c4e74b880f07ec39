"""`rlcore demo`, shortened: every part runs, says what it does, and leaves what it promised."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from rlcore.demo import arithmetic, recipes
from rlcore.demo.demo import DemoConfig, run_demo
from rlcore.errors import UserError


@pytest.fixture
def short(monkeypatch):
    """The task and the recipes, cut down to a few rows and steps."""
    make_task, sft, grpo = arithmetic.make_task, recipes.sft_config, recipes.grpo_config

    def small_task(directory, seed):
        return make_task(directory, seed, sft_rows=32, train_rows=16, test_rows=4)

    def short_sft(*arguments):
        return dataclasses.replace(
            sft(*arguments), max_steps=2, warmup_steps=0, per_device_train_batch_size=4
        )

    def short_grpo(*arguments):
        return dataclasses.replace(
            grpo(*arguments), max_steps=2, eval_steps=1, per_device_train_batch_size=16
        )

    monkeypatch.setattr(arithmetic, "make_task", small_task)
    monkeypatch.setattr(recipes, "sft_config", short_sft)
    monkeypatch.setattr(recipes, "grpo_config", short_grpo)


def test_the_demo_shows_before_and_after_and_says_where_everything_is(short, tmp_path):
    screen = Console(file=io.StringIO(), width=100)
    directory = tmp_path / "demo"
    for _ in range(2):  # a second demo replaces the first
        scores = run_demo(DemoConfig(output_dir=str(directory)), console=screen)
    assert set(scores) == {"sft", "grpo", "control"}
    assert json.loads((directory / "results.json").read_text()) == {
        "seed": 0,
        **{
            name: {"greedy": score.greedy, "sampled": score.sampled}
            for name, score in scores.items()
        },
    }
    shown = screen.file.getvalue()
    for text in ("before", "after GRPO", "control", "greedy", "sampled", "1/4", "4/4"):
        assert text in shown
    for name in ("curve.png", "grpo/metrics.jsonl", "grpo", "task", "results.json"):
        assert (directory / name).exists()
        assert str(directory / name) in shown
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_control_differs_from_the_run_in_its_reward_alone(short, tmp_path):
    directory = tmp_path / "demo"
    run_demo(DemoConfig(output_dir=str(directory)), console=Console(file=io.StringIO()))

    def config(name):
        lines = (directory / name / "training.yaml").read_text().splitlines()
        return {line for line in lines if not line.startswith(("output_dir", "reward:", "- "))}

    assert config("grpo") == config("control")
    assert "shuffled" in (directory / "control" / "training.yaml").read_text()


def test_the_demo_does_not_write_into_somebody_elses_directory(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.jsonl").write_text("years of work")
    with pytest.raises(UserError, match="holds no demo"):
        run_demo(DemoConfig(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.rglob("*")] == ["task", "train.jsonl"]
    assert (tmp_path / "task" / "train.jsonl").read_text() == "years of work"
