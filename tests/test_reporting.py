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
from rlcore.runs.reporting import COLUMNS, TRACKERS, check_report_to
from rlcore.runs.run_record import note_start, read_record
from rlcore.runs.samples import Sample
from rlcore.runs.tracking import Tracker

SAMPLES = [
    Sample(0, "1+1=", "two", {"f": 0.5}, 0.5, False),
    Sample(1, "1+1=", "2", {"f": 1.0}, 1.0, False),
]
CONFIG = {"beta": 0.1, "reward": ["f"], "reward_model": None, "bf16": False}


def note(directory: Path) -> None:
    """As a trainer's run begins its record."""
    directory.mkdir()
    note_start(directory, "GRPOConfig", {})


def logged(
    directory: Path,
    name: str,
    steps: tuple[int, ...] = (1, 2),
    start: int = 0,
    config: dict = CONFIG,
    run_id: str = "0123abcd",
    console: Console | None = None,
) -> None:
    console = console or Console(file=io.StringIO())
    tracker = Tracker(
        directory, 9, "GRPO", report_to=[name], config=config, console=console, run_id=run_id,
        start_step=start,
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


def test_mlflow_goes_on_with_the_run_that_it_gave_and_keeps_what_changed(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    note(tmp_path / "grpo")
    logged(tmp_path / "grpo", "mlflow")
    logged(tmp_path / "grpo", "mlflow", (3,), start=2, config=CONFIG | {"beta": 0.2, "new": 1})
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert found.info.run_name == "grpo" and found.info.status == "FINISHED"
    assert found.data.params == {
        "beta": "0.1", "reward": "['f']", "reward_model": "None", "bf16": "False", "new": "1",
    }  # fmt: skip
    assert found.data.tags["resumed.beta"] == "0.2" and "resumed.bf16" not in found.data.tags
    client = mlflow.MlflowClient()
    course = client.get_metric_history(found.info.run_id, "reward")
    assert [(each.step, each.value) for each in course] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    tables = [each.path for each in client.list_artifacts(found.info.run_id, "completions/train")]
    assert len(tables) == 3
    table = mlflow.artifacts.load_dict(f"runs:/{found.info.run_id}/{tables[0]}")
    assert [row[3] for row in table["data"]] == ["two", "2"] and table["columns"] == COLUMNS
    # a server that does not know the run gets one of its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
    logged(tmp_path / "grpo", "mlflow", (4,), start=3)
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 1


def test_trackio_knows_a_resumed_run_by_its_name_and_two_of_one_name_apart(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    logged(tmp_path / "grpo", "trackio")
    logged(tmp_path / "grpo", "trackio", (3,), start=2)
    logged(tmp_path / "grpo", "trackio", run_id="ffff0000")
    assert set(SQLiteStorage.get_runs("rlcore")) == {"grpo-0123abcd", "grpo-ffff0000"}
    lines = SQLiteStorage.get_logs("rlcore", "grpo-0123abcd")
    assert [(each["step"], each["reward"]) for each in lines if "reward" in each] == [
        (1, 0.1), (2, 0.2), (3, 0.3),
    ]  # fmt: skip
    assert "two" in str([each for each in lines if "completions/train" in each])


def test_swanlab_keeps_its_id_and_the_samples_as_texts(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run_id = "0123abcd" * 4
    logged(tmp_path / "grpo", "swanlab", run_id=run_id)
    texts = [path.read_text() for path in (tmp_path / "grpo" / "swanlab").glob("*/media/**/*.txt")]
    assert sum("two" in text for text in texts) == 2
    (directory,) = (tmp_path / "grpo" / "swanlab").glob(f"run-*-{run_id[:21]}")
    assert directory.is_dir()


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


def stand_in(monkeypatch, name: str, **more) -> list:
    calls: list = []
    stand = Stand(name, calls)
    stand.Table = stand.Text = None
    for attribute, value in more.items():
        setattr(stand, attribute, value)
    monkeypatch.setitem(sys.modules, name, stand)
    return calls


@pytest.mark.parametrize("name", ["trackio", "swanlab"])
def test_the_others_are_started_with_the_runs_name_and_get_every_step(tmp_path, monkeypatch, name):
    calls = stand_in(monkeypatch, name)
    logged(tmp_path / "grpo", name)
    started = next(options for called, _, options in calls if called == "init")
    assert started["project"] == "rlcore" and started["resume"] == "allow"
    assert (started.get("name") or started["experiment_name"]).startswith("grpo")
    steps = [(arguments, options) for called, arguments, options in calls if called == "log"]
    assert len(steps) == 2 and "'reward': 0.1" in str(steps[0]) and "'step': 1" in str(steps[0])
    assert any("beta" in str(arguments) for called, arguments, _ in calls if called == "update")
    assert any(called == "finish" for called, _, _ in calls)


def test_trackio_gets_a_table_and_a_name_with_the_runs_id(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "trackio", Table=lambda columns, data: ("table", data))
    logged(tmp_path / "grpo", "trackio")
    started = next(options for called, _, options in calls if called == "init")
    assert started["name"] == "grpo-0123abcd"
    told = [arguments[0] for called, arguments, _ in calls if called == "log"]
    tables = [each["completions/train"] for each in told if "completions/train" in each]
    assert len(tables) == 2 and [row[3] for row in tables[0][1]] == ["two", "2"]


def test_swanlab_gets_texts_and_an_id_of_21_characters(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, "swanlab", Text=lambda text: ("text", text))
    logged(tmp_path / "grpo", "swanlab", run_id="0123abcd" * 4)
    started = next(options for called, _, options in calls if called == "init")
    assert started["id"] == ("0123abcd" * 4)[:21] and started["resume"] == "allow"
    told = str([arguments for called, arguments, _ in calls if called == "log"])
    assert told.count("completions/train") == 2 and "two" in told


def test_a_tracker_without_tables_is_told_of_once(tmp_path, monkeypatch):
    stand_in(monkeypatch, "swanlab")
    screen = Console(file=io.StringIO(), width=200)
    logged(tmp_path / "grpo", "swanlab", console=screen)
    assert screen.file.getvalue().count("swanlab takes no tables: the samples are in ") == 1


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    stand_in(monkeypatch, "swanlab", init=lambda **options: 1 / 0)
    with pytest.raises(UserError, match=r"^report_to swanlab: it does not start: division by"):
        logged(tmp_path / "grpo", "swanlab")


class Mlflow(Stand):
    """Knows the runs of its `runs`, {id: parameters}, and refuses a parameter that changes."""

    def __init__(self, calls: list):
        super().__init__("mlflow", calls)
        self.runs: dict[str, dict] = {}
        self.exceptions = types.SimpleNamespace(MlflowException=KeyError)
        limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = types.SimpleNamespace(validation=limits)
        self.tags: dict[str, object] = {}

    def search_experiments(self, **_) -> list:
        return [types.SimpleNamespace(experiment_id="1")]

    def get_run(self, run_id: str):
        data = types.SimpleNamespace(params=dict(self.runs[run_id]))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id), data=data)

    def start_run(self, run_id=None, **_):
        self.active = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.active, {})
        return self.get_run(self.active)

    def log_params(self, values: dict) -> None:
        known = self.runs[self.active]
        for name, value in values.items():
            assert known.setdefault(name, str(value)) == str(value), "a parameter has one value"

    def set_tags(self, tags: dict) -> None:
        self.tags |= tags


def test_mlflows_own_id_is_kept_and_passed_on(tmp_path, monkeypatch):
    mlflow = Mlflow([])
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    note(tmp_path / "grpo")
    logged(tmp_path / "grpo", "mlflow")
    assert read_record(tmp_path / "grpo").facts == {"mlflow_run": "run0"}
    logged(tmp_path / "grpo", "mlflow", (3,), start=2, config=CONFIG | {"beta": 0.2})
    assert list(mlflow.runs) == ["run0"] and mlflow.runs["run0"]["beta"] == "0.1"
    assert mlflow.tags == {"resumed.beta": 0.2}
    files = [arguments[1] for called, arguments, _ in mlflow.calls if called == "log_dict"]
    assert files == [f"completions/train/00000{step}.json" for step in (1, 2, 3)]
    # the environment's wins, and is the one to go on with
    monkeypatch.setenv("MLFLOW_RUN_ID", "mine")
    logged(tmp_path / "grpo", "mlflow", (4,), start=3)
    assert mlflow.active == "mine"
    monkeypatch.delenv("MLFLOW_RUN_ID")
    logged(tmp_path / "grpo", "mlflow", (5,), start=4)
    assert mlflow.active == "mine"
    # another server does not know it
    mlflow.runs.clear()
    logged(tmp_path / "grpo", "mlflow", (6,), start=5)
    assert mlflow.active == "run0"


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
