"""Who may write into a directory, what is replaced when, and what never is."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.runs import content, grpo_config, killed, sft_config, write_rows
from helpers.tiny import most_of

from rlcore.cli import main
from rlcore.errors import UserError
from rlcore.runs import checkpoint
from rlcore.runs.atomic import IN_PLACE
from rlcore.runs.checkpoint import checkpoints
from rlcore.runs.locking import LOCK_FILE, check_unlocked, locked
from rlcore.runs.output_dir import check_output_dir, claimed, file_of_run, last_resumable
from rlcore.runs.resuming import INPUTS
from rlcore.runs.run_record import note_start, note_written
from rlcore.runs.tracking import Tracker, read_metrics
from rlcore.trainers.distill import DistillConfig, train_distill
from rlcore.trainers.grpo import train_grpo
from rlcore.trainers.ppo import PPOConfig, train_ppo
from rlcore.trainers.sft import train_sft


def make_run(directory: Path) -> dict[str, bytes]:
    """A finished run as `claimed` leaves it, with a checkpoint; its files."""
    with claimed(directory):
        note_start(directory, "SFTConfig", {})
        (directory / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 2.0}\n')
        (directory / "training.yaml").write_text("model: a\n")
        (directory / "checkpoint-1").mkdir()
        (directory / "checkpoint-1" / "model.safetensors").write_text("half way")
        checkpoint._write_manifest(directory / "checkpoint-1", step=1, num_processes=1)
        note_written(directory, ["model.safetensors", "config.json"])
        (directory / "model.safetensors").write_text("the model")
        (directory / "config.json").write_text("{}")
    return content(directory)


@pytest.fixture
def old(tmp_path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_model_that_a_killed_run_left_half_written_is_no_result(tmp_path):
    with claimed(tmp_path):
        note_start(tmp_path, "SFTConfig", {})
    half = tmp_path / f".{IN_PLACE}.partial12"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    check_output_dir(tmp_path)
    with claimed(tmp_path):
        assert not half.exists()


# Inputs and the output directory


@pytest.mark.parametrize("place", ["run", "run/checkpoint-4", "run/a/b", "link", "other/../run"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_output_directory_around_an_input_is_refused_and_the_input_is_untouched(
    tmp_path, monkeypatch, name, place
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "a" / "b").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("run/checkpoint-4")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    given = place
    if "dataset" in name:
        given = write_rows(Path(place) / "rows.jsonl")
    before = content(tmp_path)
    train, made = (train_ppo, ppo_config(tmp_path, overwrite_output_dir=True))
    if name == "teacher":
        own = {"model": made.model, "dataset": made.dataset, "output_dir": made.output_dir}
        train, made = train_distill, DistillConfig(**own, overwrite_output_dir=True)
    with pytest.raises(UserError, match=f"^{name} .* lies in output_dir"):
        train(dataclasses.replace(made, **{name: given}))
    assert content(tmp_path) == before


def test_the_model_below_an_adapter_is_an_input_too(tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "run"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"model's own model .*run lies in output_dir"):
        train_ppo(ppo_config(tmp_path, model=str(tmp_path / "adapter")))


def test_a_config_file_in_a_run_that_is_to_be_replaced_is_refused_and_resuming_it_is_not(
    tmp_path, capsys
):
    config = sft_config(tmp_path, save_steps=2, max_steps=2)
    train_sft(config)
    before = content(tmp_path / "run")
    command = ["train", "sft", "--config", str(tmp_path / "run" / "training.yaml")]
    assert main([*command, "--overwrite-output-dir"]) == 2
    assert "training.yaml lies in output_dir" in capsys.readouterr().err
    assert content(tmp_path / "run") == before
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--output-dir", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == before["model.safetensors"]


@pytest.mark.parametrize("output", ["model", "model/run", "link/run", "data/run"])
def test_an_output_directory_within_an_input_is_refused(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(UserError, match=r"lies in"):
        train_ppo(ppo_config(tmp_path, model="./model", dataset="data", output_dir=output))
    assert content(tmp_path) == {}


def ppo_config(directory: Path, **changes) -> PPOConfig:
    options = dict(model="/m", dataset="/d", output_dir=str(directory / "run"))
    return PPOConfig(**options | {"reward": ["exact_match"]} | changes)


def test_a_neighbour_of_the_output_directory_is_no_overlap(tmp_path):
    shutil.copytree(sft_config(tmp_path).model, tmp_path / "run-model")
    train_sft(sft_config(tmp_path, model=str(tmp_path / "run-model"), max_steps=1))


# Overwriting


def test_a_run_that_fails_before_its_first_step_leaves_the_one_it_was_to_replace(tmp_path):
    config = grpo_config(tmp_path, save_steps=2)
    run = tmp_path / "run"
    train_grpo(config, reward_funcs=[lambda completions, **_: [float(len(c)) for c in completions]])
    (run / "notes.txt").write_text("mine")
    before = content(run)

    calls = []

    def raises(prompts, completions, **_):
        calls.append(prompts)
        if len(calls) > 3:  # after the evaluation at step 0
            raise RuntimeError("no such luck")
        return [0.0] * len(completions)

    again = dataclasses.replace(
        config, overwrite_output_dir=True, eval_dataset=most_of(config.dataset), seed=1
    )
    with pytest.raises(Exception, match="no such luck"):
        train_grpo(again, reward_funcs=[raises])
    assert len(calls) > 3
    assert content(run) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_finishes_replaces_the_old_one_and_nothing_else(tmp_path):
    config = sft_config(tmp_path, save_steps=1)
    run = tmp_path / "run"
    train_sft(config)
    (run / ".git").mkdir()
    (run / ".git" / "config").write_text("[core]")
    (run / "notes.txt").write_text("mine")
    (run / "README.md").write_text("mine as well")
    train_sft(
        dataclasses.replace(config, max_steps=1, save_steps=0, seed=3, overwrite_output_dir=True)
    )
    fresh = sft_config(tmp_path, max_steps=1, seed=3, output_dir=str(tmp_path / "fresh"))
    train_sft(fresh)
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()} | {
        ".git",
        "notes.txt",
        "README.md",
    }
    assert (run / ".git" / "config").read_text() == "[core]"
    assert (run / "README.md").read_text() == "mine as well"
    model = "model.safetensors"
    assert (run / model).read_bytes() == (tmp_path / "fresh" / model).read_bytes()


def test_a_tracker_of_the_callers_in_the_output_directory_keeps_the_new_runs_lines(tmp_path):
    config = sft_config(tmp_path, max_steps=2)
    for _ in range(2):
        with Tracker(config.output_dir, 2, "mine") as tracker:
            train_sft(config, tracker=tracker)
        metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [line["step"] for line in metrics] == [1, 2]
        config = dataclasses.replace(config, overwrite_output_dir=True)


@pytest.mark.parametrize("extra", [[], ["checkpoint-3/x"], ["training.yaml", "config.json"]])
def test_a_folder_that_no_run_wrote_is_not_overwritten(tmp_path, extra):
    for name in ("metrics.jsonl", ".git/HEAD", "thesis.tex", *extra):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"step": 1}')
    before = content(tmp_path)
    with pytest.raises(UserError, match="not hold a training run"):
        train_ppo(
            ppo_config(tmp_path, output_dir=str(tmp_path / "folder"), overwrite_output_dir=True)
        )
    assert content(tmp_path) == before


def test_a_run_in_use_is_refused_unless_told_otherwise(old):
    with pytest.raises(UserError, match=r"--resume.*--overwrite-output-dir"):
        check_output_dir(old)
    check_output_dir(old, overwrite=True)
    check_output_dir(old, resume=True)
    with pytest.raises(UserError, match="exclude each other"):
        check_output_dir(old, overwrite=True, resume=True)


def test_checking_touches_nothing(tmp_path, old):
    before = content(tmp_path)
    check_output_dir(tmp_path / "new")
    check_output_dir(old, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output_dir(tmp_path / "file")
    assert content(tmp_path) == before | {"file": b""}


def test_resuming_keeps_everything(old):
    before = content(old)
    with claimed(old, resume=True):
        pass
    assert content(old) == before


def test_the_remains_of_a_run_that_never_started_are_no_obstacle(tmp_path):
    run = tmp_path / "run"

    def start_and_die():
        with claimed(run):
            note_start(run, "SFTConfig", {})
            (run / "training.yaml").write_text("model: a\n")
            (run / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n')
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(start_and_die) == -signal.SIGKILL
    check_output_dir(run)
    with pytest.raises(ValueError), claimed(run):
        assert read_metrics(run / "metrics.jsonl") == []
        raise ValueError
    assert not run.exists()


def test_a_users_own_config_in_the_output_directory_is_no_run(tmp_path):
    (tmp_path / "training.yaml").write_text("model: a\n")
    with pytest.raises(UserError, match="is not empty"):
        check_output_dir(tmp_path)


def start_and_die(run: Path, moves: int, **options: bool) -> None:
    """Start a run there and die at the rename with that number, or else before its first result."""
    done = []
    rename = Path.rename

    def counting(self, target):
        if len(done) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(target)
        return rename(self, target)

    Path.rename = counting
    with claimed(run, **options):
        note_start(run, "GRPOConfig", {})
        (run / "training.yaml").write_text("model: b\n")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("again", ["overwrite", "resume", "fail"])
def test_a_run_killed_while_it_moves_the_old_one_aside_or_back_loses_nothing(tmp_path, again):
    whole = make_run(tmp_path / "whole")
    for moves in range(len(list((tmp_path / "whole").iterdir())) + 2):
        run = tmp_path / f"run{moves}"
        make_run(run)
        (run / "notes.txt").write_text("mine")
        # the second one dies while it puts back what the first had moved
        for count in (moves, moves // 2):
            died = killed(lambda: start_and_die(run, count, overwrite=True))  # noqa: B023
            assert died == -signal.SIGKILL
            with pytest.raises(UserError, match="is not empty"):
                check_output_dir(run)
            check_output_dir(run, resume=True)
            assert last_resumable(run).joinpath("model.safetensors").read_text() == "half way"
            assert file_of_run(run, "training.yaml").read_text() == "model: a\n"
        if again == "overwrite":
            with claimed(run, overwrite=True):
                note_start(run, "GRPOConfig", {})
        elif again == "resume":
            with claimed(run, resume=True):
                pass
        else:
            with pytest.raises(ValueError), claimed(run, overwrite=True):
                note_start(run, "GRPOConfig", {})
                raise ValueError
        found = content(run)
        assert found.pop("notes.txt") == b"mine"
        assert found == whole if again != "overwrite" else found.keys() == {".rlcore-run"}


def test_the_old_run_stays_aside_until_the_new_one_has_finished(old):
    before = content(old)

    def die_after_a_step():
        with claimed(old, overwrite=True) as notes:
            assert any(".replaced" in note for note in notes)
            note_start(old, "SFTConfig", {})
            (old / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(die_after_a_step) == -signal.SIGKILL
    assert killed(die_after_a_step) == -signal.SIGKILL  # now with two to keep
    assert content(old / ".replaced" / ".replaced") == before
    assert checkpoints(old) == []
    with pytest.raises(UserError, match=r"nothing to resume.*before it is kept in .*/\.replaced"):
        check_output_dir(old, resume=True)
    with claimed(old, overwrite=True):
        note_start(old, "SFTConfig", {})
        (old / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert not (old / ".replaced").exists()


# The lock


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def flock_late(descriptor, operation):
        if not removed:
            removed.append(tmp_path / LOCK_FILE)
            removed[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with locked(tmp_path), pytest.raises(UserError, match="another run"):
        check_unlocked(tmp_path)


def test_two_runs_do_not_share_a_directory_and_a_dead_one_lets_go(tmp_path):
    run = tmp_path / "run"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claimed(run):
                os.write(writer, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=f"another run .process {child} on .*wait for its end"):
            check_output_dir(run, **options)
    with pytest.raises(UserError, match="another run"), claimed(run, overwrite=True):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_output_dir(run)
    with claimed(run), pytest.raises(UserError, match="another run"):
        check_unlocked(run)
    assert not run.exists()


def test_without_file_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("rlcore.runs.locking.fcntl.flock", unsupported)
    check_output_dir(tmp_path)
    with claimed(tmp_path / "run") as notes:
        assert "no file locks" in notes[0]


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write into output directory"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass
