"""Models and checkpoints are whole or absent, and a resumed run goes on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlcore import atomic, checkpoint
from rlcore.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_model,
)
from rlcore.errors import UserError


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

    with pytest.raises(OSError, match="disk full"):
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


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_n_steps_and_a_resume_of_n_more_are_2n_steps_exactly(tmp_path, algorithm):
    from rlcore.tasks import arithmetic
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
