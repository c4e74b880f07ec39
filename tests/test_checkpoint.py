"""Models and checkpoints are whole or absent, and a resumed run goes on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from helpers.runs import sft_config
from helpers.tiny import tiny_tokenizer
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlcore.errors import UserError
from rlcore.runs import atomic, checkpoint, output_dir
from rlcore.runs.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    newest_intact,
    save_checkpoint,
    save_model,
)
from rlcore.runs.unpickling import data_alone
from rlcore.trainers.sft import train_sft


class Killed(BaseException):
    """Stands for the process's end: nothing in the library catches it."""


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def weight(model) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach().clone()


def loadable(directory: Path) -> torch.Tensor | None:
    """The embedding of the model in `directory`, None where none can be loaded from it."""
    if not (directory / "config.json").exists():
        return None
    return weight(AutoModelForCausalLM.from_pretrained(directory))


@pytest.fixture
def setup():
    """An accelerator with a prepared model and optimizer, as a trainer has them."""

    def make():
        accelerator = Accelerator(cpu=True)
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        return SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer)

    return make


def take_steps(parts, count: int) -> None:
    """Steps that depend on weights, optimizer state and the global random state."""
    for _ in range(count):
        ids = torch.randint(32, (2, 8))
        loss = parts.model(ids, labels=ids).loss
        parts.accelerator.backward(loss)
        parts.optimizer.step()
        parts.optimizer.zero_grad()


def test_a_saved_model_loads_as_safetensors(tmp_path):
    model = tiny_model()
    save_model(model, None, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert torch.equal(loadable(tmp_path / "model"), weight(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_fails_to_save_leaves_nothing(tmp_path):
    def fail(directory):
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*disk full"):
        save_model(tiny_model(), SimpleNamespace(save_pretrained=fail), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_run_keeps_its_other_files_and_replaces_the_model(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an older, larger model")
    save_model(tiny_model(seed=1), None, tmp_path)
    save_model(tiny_model(seed=2), None, tmp_path)
    assert torch.equal(loadable(tmp_path), weight(tiny_model(seed=2)))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("moves", range(4))
def test_a_run_killed_while_it_replaces_a_model_leaves_a_whole_one_or_none(
    tmp_path, monkeypatch, moves
):
    save_model(tiny_model(seed=1), None, tmp_path / "model")
    replace, done = atomic.os.replace, []

    def replace_some(source, target):
        if len(done) == moves:
            raise Killed
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace_some)
    try:
        save_model(tiny_model(seed=2), None, tmp_path / "model")
    except Killed:
        assert loadable(tmp_path / "model") is None
    else:
        assert torch.equal(loadable(tmp_path / "model"), weight(tiny_model(seed=2)))


def test_a_checkpoint_brings_back_weights_optimizer_random_state_and_trainer_state(setup, tmp_path):
    parts = setup()
    take_steps(parts, 3)
    state = {"tokens": 17, "seen": torch.arange(3)}
    save_checkpoint(parts.accelerator, tmp_path, 3, state=state)
    take_steps(parts, 3)
    expected = weight(parts.model)

    resumed = setup()
    take_steps(resumed, 1)
    found = load_checkpoint(resumed.accelerator, last_checkpoint(tmp_path))
    assert (found["step"], found["tokens"]) == (3, 17)
    assert torch.equal(found["seen"], torch.arange(3))
    take_steps(resumed, 3)
    assert torch.equal(weight(resumed.model), expected)


def test_a_checkpoint_is_a_model_directory_too(setup, tmp_path):
    parts = setup()
    take_steps(parts, 1)
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)
    assert torch.equal(loadable(directory), weight(parts.model))


def test_a_run_killed_before_the_rename_leaves_the_older_checkpoint_the_last(
    setup, tmp_path, monkeypatch
):
    parts = setup()
    save_checkpoint(parts.accelerator, tmp_path, 1)

    def kill(*_):
        # a dead process tidies nothing up
        patched.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "publish", kill)
        with pytest.raises(Killed):
            save_checkpoint(parts.accelerator, tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one is there, under another name
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    # the next run clears the remains away and writes the same step whole
    save_checkpoint(parts.accelerator, tmp_path, 2)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over(setup, tmp_path, damage):
    parts = setup()
    save_checkpoint(parts.accelerator, tmp_path, 9)
    broken = save_checkpoint(parts.accelerator, tmp_path, 10)
    assert last_checkpoint(tmp_path) == broken
    optimizer, manifest = broken / "optimizer.bin", broken / "manifest.json"
    {
        "missing": optimizer.unlink,
        "short": lambda: optimizer.write_bytes(optimizer.read_bytes()[:-1]),
        "no manifest": manifest.unlink,
        "torn manifest": lambda: manifest.write_text(manifest.read_text()[:20]),
    }[damage]()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint(parts.accelerator, broken)


def signed(directory: Path) -> None:
    """Write the manifest that the files ask for, as whoever changed them would."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(manifest | {"files": atomic.fingerprints(directory)}))


def flip(path: Path, place: int) -> None:
    """Change one bit of a file, and nothing of its size."""
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_the_older_checkpoint_taken(setup, tmp_path):
    parts = setup()
    take_steps(parts, 1)
    older = save_checkpoint(parts.accelerator, tmp_path, 9)
    newer = save_checkpoint(parts.accelerator, tmp_path, 10)
    assert newest_intact([tmp_path]) == (newer, [])
    names = json.loads((newer / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "optimizer.bin", "trainer_state_0.pt", "config.json"} <= set(names)
    for number, name in enumerate(names):
        flip(newer / name, 7919 * number)
        found, lines = newest_intact([tmp_path])
        assert found == older
        assert lines == [
            f"{newer} is damaged ({name} is not what was written): going on from checkpoint-9"
        ]
        flip(newer / name, 7919 * number)
    assert newest_intact([tmp_path]) == (newer, [])
    for directory in (older, newer):
        flip(directory / "optimizer.bin", 100)
    with pytest.raises(UserError, match=r"nothing to resume.*checkpoint-10.*checkpoint-9"):
        newest_intact([tmp_path])


def test_files_in_folders_of_a_checkpoint_count_like_the_others(setup, tmp_path, monkeypatch):
    parts = setup()
    save_configs = checkpoint._save_configs

    def with_shards(accelerator, tokenizer, staging):
        save_configs(accelerator, tokenizer, staging)
        (staging / "pytorch_model_fsdp_0").mkdir()
        (staging / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"shard")

    monkeypatch.setattr(checkpoint, "_save_configs", with_shards)
    save_checkpoint(parts.accelerator, tmp_path, 1)
    # the same step once more: a folder takes a folder's place
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)
    shard = directory / "pytorch_model_fsdp_0" / "__0_0.distcp"
    entry = json.loads((directory / "manifest.json").read_text())["files"][
        "pytorch_model_fsdp_0/__0_0.distcp"
    ]
    # sha256 of the five bytes
    assert entry == {"bytes": 5, "sha256": hashlib.sha256(b"shard").hexdigest()}
    shard.write_bytes(b"Shard")
    with pytest.raises(UserError, match="distcp is not what was written"):
        newest_intact([tmp_path])
    shard.unlink()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_checkpoints_do_not_count_among_those_that_stay(setup, tmp_path, damage):
    parts = setup()
    save_checkpoint(parts.accelerator, tmp_path, 10)
    broken = save_checkpoint(parts.accelerator, tmp_path, 20) / "optimizer.bin"
    if damage == "cut":
        broken.write_bytes(broken.read_bytes()[:-1])
    else:
        flip(broken, 50)
    # the run has gone on from checkpoint-10
    save_checkpoint(parts.accelerator, tmp_path, 15, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-15"]
    assert newest_intact([tmp_path]) == (tmp_path / "checkpoint-15", [])


def test_all_random_generators_go_on_where_they_were(setup, tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    parts = setup()
    draw()
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)
    expected = draw()
    assert draw() != expected
    load_checkpoint(parts.accelerator, directory)
    assert draw() == expected


def test_a_random_state_that_cannot_be_read_is_an_error(setup, tmp_path):
    parts = setup()
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)
    own = torch.load(directory / "trainer_state_0.pt", weights_only=True)
    for random_state in ({}, own["random_state"] | {"torch": torch.zeros(3, dtype=torch.uint8)}):
        torch.save(own | {"random_state": random_state}, directory / "trainer_state_0.pt")
        signed(directory)
        with pytest.raises(UserError, match="cannot go on from"):
            load_checkpoint(parts.accelerator, directory)


def test_where_another_process_cannot_go_on_this_one_does_not_either(setup, tmp_path):
    parts = setup()
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)

    class Two:
        """The accelerator of one of two processes, whose other one fails."""

        def __getattr__(self, name):
            return getattr(parts.accelerator, name)

        def reduce(self, value, how):
            return value + 1

    with pytest.raises(UserError, match=r"cannot go on from .*: another process failed"):
        load_checkpoint(Two(), directory)
    with pytest.raises(UserError, match=r"cannot write .*: another process failed"):
        save_checkpoint(Two(), tmp_path, 2)


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


EXECUTED_ONCE = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "pytorch_model.bin")


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_no_file_of_a_checkpoint_runs_what_stands_in_it(setup, tmp_path, write):
    parts = setup()
    take_steps(parts, 1)
    whole = save_checkpoint(parts.accelerator, tmp_path, 1)
    trace = tmp_path / "trace"
    names = [path.name for path in whole.iterdir() if path.name != "manifest.json"]
    for name in (*names, *EXECUTED_ONCE):
        directory = tmp_path / "checkpoint-2"
        shutil.copytree(whole, directory)
        if write == "pickle":
            (directory / name).write_bytes(pickle.dumps(Malice(trace)))
        else:
            torch.save({"state": Malice(trace)}, directory / name)
        if name == "pytorch_model.bin":
            (directory / "model.safetensors").unlink()
        signed(directory)
        assert last_checkpoint(tmp_path) == directory
        # what is never read does no harm, everything else is refused in one sentence
        with contextlib.suppress(UserError):
            load_checkpoint(parts.accelerator, directory)
        assert not trace.exists(), name
        shutil.rmtree(directory)


def test_a_sharded_folder_runs_nothing_either(tmp_path):
    saved = {"weight": torch.arange(6.0).view(2, 3), "lr": 0.5, "betas": (0.9, 0.99)}
    into = {"weight": torch.zeros(2, 3), "lr": 0.0, "betas": (0.0, 0.0)}
    trace = tmp_path / "trace"
    dcp.save(saved, checkpoint_id=tmp_path / "good", no_dist=True)
    with data_alone():
        dcp.load(into, checkpoint_id=tmp_path / "good", no_dist=True)
    assert torch.equal(into["weight"], saved["weight"])
    assert (into["lr"], into["betas"]) == (0.5, (0.9, 0.99))

    dcp.save(saved | {"lr": Malice(trace)}, checkpoint_id=tmp_path / "value", no_dist=True)
    shutil.copytree(tmp_path / "good", tmp_path / "index")
    (tmp_path / "index" / ".metadata").write_bytes(pickle.dumps(Malice(trace)))
    for name in ("value", "index"):
        with data_alone(), pytest.raises((CheckpointException, pickle.UnpicklingError)):
            dcp.load(into, checkpoint_id=tmp_path / name, no_dist=True)
        assert not trace.exists(), name
    # and without the guard it does run
    with contextlib.suppress(Exception):
        dcp.load(into, checkpoint_id=tmp_path / "value", no_dist=True)
    assert trace.exists()


@contextlib.contextmanager
def disk_of(size: int):
    """No file can grow beyond `size` bytes for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 200, 4000, 9000])
def test_a_full_disk_is_one_sentence_and_costs_no_older_checkpoint(setup, tmp_path, size):
    """The limit meets configuration, weights (10 kB), optimizer (20 kB) and manifest in turn."""
    parts = setup()
    take_steps(parts, 1)
    older = save_checkpoint(parts.accelerator, tmp_path, 1, keep=1)
    with disk_of(size), pytest.raises(UserError, match=r"cannot write .*checkpoint-2.* MB free"):
        save_checkpoint(parts.accelerator, tmp_path, 2, keep=1)
    with disk_of(size), pytest.raises(UserError, match=r"cannot write .*model"):
        save_model(parts.model, tiny_tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert newest_intact([tmp_path]) == (older, [])


def test_what_a_dead_process_left_half_written_is_removed(tmp_path):
    left = [tmp_path / ".model.partial123", tmp_path / ".model.partial"]
    others = [
        tmp_path / ".models.partial1",
        tmp_path / ".model.partial1x",
        tmp_path / "model.partial",
    ]
    for path in (*left, *others):
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    with atomic.staged(tmp_path / "model") as staging:
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in others)
        # one that is being written stays, whatever its number
        atomic.remove_leftovers(tmp_path, "model")
        assert staging.exists()
        (staging / "file").write_text("whole")
    assert (tmp_path / "model" / "file").read_text() == "whole"
    (tmp_path / ".value_head.safetensors.partial").write_text("half")
    atomic.remove_leftovers(tmp_path, output_dir.STAGED)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", *(path.name for path in others)}


def test_a_directory_that_is_there_is_written_on_its_own_disk(tmp_path):
    """It may be a mount or a link, and what lies beside it another disk, or not ours to write."""
    run, beside = tmp_path / "disk", tmp_path / "elsewhere" / "run"
    run.mkdir()
    beside.parent.mkdir()
    beside.symlink_to(run)
    left = run / ".model.partial123"
    left.mkdir()
    for round in range(2):
        with atomic.staged(beside) as staging:
            assert not left.exists()
            assert staging.parent.samefile(run)
            (staging / "templates").mkdir()
            (staging / "templates" / "one").write_text(str(round))
            assert [path.name for path in beside.parent.iterdir()] == ["run"]
        assert [path.name for path in run.iterdir()] == ["templates"]
        assert (run / "templates" / "one").read_text() == str(round)


def test_directories_above_are_made_where_they_are_missing(setup, tmp_path):
    save_model(tiny_model(), None, tmp_path / "not" / "there" / "model")
    assert loadable(tmp_path / "not" / "there" / "model") is not None
    save_checkpoint(setup().accelerator, tmp_path / "nor" / "here", 3)
    assert last_checkpoint(tmp_path / "nor" / "here").name == "checkpoint-3"


def test_only_the_newest_checkpoints_stay(setup, tmp_path):
    parts = setup()
    for step in (8, 9, 10):
        save_checkpoint(parts.accelerator, tmp_path, step, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}


def test_another_number_of_processes_is_refused(setup, tmp_path):
    parts = setup()
    directory = save_checkpoint(parts.accelerator, tmp_path, 1)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"num_processes": 2}))
    with pytest.raises(UserError, match="written by 2 processes"):
        load_checkpoint(parts.accelerator, directory)


def test_no_checkpoint_in_an_empty_or_absent_directory(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None


def comparable(path: Path) -> list[dict]:
    """The metrics without what the clock says."""
    clocks = {"step_time", "tokens_per_second"}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [{name: row[name] for name in row.keys() - clocks} for row in rows]


def test_a_run_goes_on_from_before_a_damaged_checkpoint_says_so_and_ends_the_same(tmp_path, capfd):
    config = sft_config(tmp_path, max_steps=3, save_steps=1)
    train_sft(config)
    run = tmp_path / "run"
    whole = (run / "model.safetensors").read_bytes()
    flip(run / "checkpoint-3" / "optimizer.bin", 100)
    flip(run / "checkpoint-2" / "model.safetensors", 5000)
    train_sft(dataclasses.replace(config, resume=True, save_total_limit=1))
    shown = " ".join(capfd.readouterr().err.split())
    for number in (2, 3):
        assert f"checkpoint-{number} is damaged (" in shown
    assert "going on from checkpoint-1" in shown
    assert (run / "model.safetensors").read_bytes() == whole
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert newest_intact([run]) == (run / "checkpoint-3", [])


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_n_steps_and_a_resume_of_n_more_are_2n_steps_exactly(tmp_path, algorithm):
    from rlcore.demo import arithmetic
    from rlcore.trainers.grpo import GRPOConfig, train_grpo
    from rlcore.trainers.sft import SFTConfig, train_sft

    task = arithmetic.make_task(tmp_path / "task", sft_rows=32, train_rows=16, test_rows=4)
    config_class, train, dataset, options = {
        "sft": (SFTConfig, train_sft, task.sft, {}),
        "grpo": (
            GRPOConfig,
            train_grpo,
            task.train,
            {
                "reward": [f"{__name__}:length_reward"],
                "num_generations": 4,
                "num_iterations": 2,
                "max_completion_length": 6,
            },
        ),
    }[algorithm]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = {
        "model": str(task.model),
        "dataset": str(dataset),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "save_steps": 2,
        "warmup_steps": 1,
    } | options
    train(config_class(output_dir=str(whole), **config))

    # what is left of a run that was killed after its first half
    halves.mkdir()
    shutil.copytree(whole / "checkpoint-2", halves / "checkpoint-2")
    rows = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (halves / "metrics.jsonl").write_text("".join(rows[:3]))
    train(config_class(output_dir=str(halves), resume=True, **config))

    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        assert (halves / name).read_bytes() == (whole / name).read_bytes()
    assert comparable(halves / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def length_reward(prompts, completions, **columns):
    return [float(len(text) % 5) for text in completions]
