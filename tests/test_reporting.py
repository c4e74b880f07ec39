"""Trackers: tensorboard and wandb as they are, the others' packages by stand-ins."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlcore.errors import UserError
from rlcore.runs import reporting
from rlcore.runs.reporting import TRACKERS, check_report_to
from rlcore.runs.samples import Sample
from rlcore.runs.tracking import Tracker

SAMPLES = [
    Sample(0, "1+1=", "two", {"f": 0.5}, 0.5, False),
    Sample(1, "1+1=", "2", {"f": 1.0}, 1.0, False),
]
CONFIG = {"beta": 0.1, "reward": ["f"], "reward_model": None, "bf16": False}


def logged(directory: Path, name: str, steps: tuple[int, ...] = (1, 2), start: int = 0) -> None:
    tracker = Tracker(
        directory, 9, "GRPO", report_to=[name], config=CONFIG, console=Console(file=io.StringIO()),
        run_id="0123abcd", start_step=start,
    )  # fmt: skip
    with tracker:
        for step in steps:
            tracker.log(step, {"reward": step / 10})
            tracker.samples(step, "train", SAMPLES)


def test_tensorboard_has_the_curves_the_options_and_the_samples(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    logged(tmp_path / "run", "tensorboard")
    logged(tmp_path / "run", "tensorboard", (3,), start=2)
    found = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [(each.step, round(each.value, 6)) for each in found.Scalars("reward")] == [
        (1, 0.1), (2, 0.2), (3, 0.3),
    ]  # fmt: skip
    (text, *_) = found.Tensors("completions/train/text_summary")
    assert "two" in text.tensor_proto.string_val[0].decode()
    options, *_ = (tmp_path / "run" / "tensorboard").glob("**/hparams.yml")
    known = yaml.safe_load(options.read_text())
    assert known == {"beta": 0.1, "reward": "['f']", "reward_model": "None", "bf16": False}


def test_wandb_offline_takes_the_run_its_name_and_its_table(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path / "grpo", "wandb")
    logged(tmp_path / "grpo", "wandb", (3,), start=2)
    runs = list((tmp_path / "grpo" / "wandb").glob("offline-run-*-0123abcd"))
    assert len(runs) == 2, "a resumed run keeps its id, and so goes on as the same run"
    history = b"".join(path.read_bytes() for run in runs for path in run.glob("run-*.wandb"))
    assert b"grpo" in history and b"reward" in history and b"completions/train" in history
    tables = [path.read_text() for run in runs for path in run.glob("files/media/table/**/*.json")]
    assert len(tables) == 3 and all('"two"' in table for table in tables)


class Stand(types.ModuleType):
    """A module, and the run that its init gives, that notes what is asked of it."""

    def __init__(self, name: str, calls: list):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace()
        self.calls = calls
        self.config = self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "log_table":
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return [] if name.startswith("search") else self

        return call

    def __setitem__(self, name: str, value: object) -> None:
        self.calls.append((name, value, {}))


@pytest.mark.parametrize("name", ["trackio", "swanlab"])
def test_the_others_are_started_with_the_runs_name_and_get_every_step(tmp_path, monkeypatch, name):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, Stand(name, calls))
    logged(tmp_path / "grpo", name)
    started = next(options for called, _, options in calls if called == "init")
    assert started["project"] == "rlcore" and started["resume"] == "allow"
    assert "grpo" in (started.get("name"), started.get("experiment_name"))
    steps = [(arguments, options) for called, arguments, options in calls if called == "log"]
    assert len(steps) == 2 and "'reward': 0.1" in str(steps[0]) and "'step': 1" in str(steps[0])
    assert any("beta" in str(arguments) for called, arguments, _ in calls if called == "update")
    assert any(called == "finish" for called, _, _ in calls)


def test_every_tracker_is_one_of_accelerates_and_takes_what_it_is_given(tmp_path):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name, options in TRACKERS.items():
        LOGGER_TYPE_TO_CLASS[name](**options(tmp_path, "grpo", "0123abcd"))


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'wandb'"):
        Tracker(tmp_path, 1, "run", report_to="wandbb")
    assert check_report_to("none") == check_report_to([]) == check_report_to(None) == []


@pytest.mark.parametrize(
    ("name", "way"), [("tensorboard", r"'rlcore\[tracking\]'"), ("swanlab", "swanlab")]
)
def test_a_tracker_whose_package_is_missing_is_refused_with_the_way_to_get_it(
    monkeypatch, name, way
):
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install {way}$"):
        check_report_to([name])
