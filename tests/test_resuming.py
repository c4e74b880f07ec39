"""A resumed run is the run that was begun, or it does not start."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.runs import ROWS, content, grpo_config, sft_config, train_with_digits, write_rows
from helpers.tiny import save_tiny

from rlcore.errors import UserError
from rlcore.runs import fingerprints
from rlcore.runs.config import load_config
from rlcore.trainers.dpo import DPOConfig
from rlcore.trainers.reward_model import RewardModelConfig, train_reward_model
from rlcore.trainers.sft import SFTConfig, train_sft


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Two of four steps, with a checkpoint."""
    home = tmp_path_factory.mktemp("begun")
    train_sft(sft_config(home, max_steps=2, save_steps=2))
    return home


@pytest.fixture
def home(begun, tmp_path, monkeypatch):
    """A copy of it under the paths that it was begun with."""
    shutil.copytree(begun, tmp_path / "home")
    record = tmp_path / "home" / "run" / "training.yaml"
    record.write_text(record.read_text().replace(str(begun), str(tmp_path / "home")))
    return tmp_path / "home"


def resumed(home: Path, **changes) -> SFTConfig:
    return sft_config(home, **{"max_steps": 2, "save_steps": 2, "resume": True} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"learning_rate": 1e-3},
        {"lr_scheduler_type": "linear"},
        {"warmup_steps": 1},
        {"weight_decay": 0.1},
        {"adam_beta2": 0.9},
        {"max_grad_norm": 2.0},
        {"bf16": True},
        {"fused_head": "off"},
        {"peft": "lora"},
        {"max_length": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_that_the_steps_depend_on_may_not_change(home, changes):
    before = content(home)
    ((name, value),) = changes.items()
    old = getattr(sft_config(home), name)
    with pytest.raises(UserError, match=rf"cannot be resumed.*{name} {old} -> {value}"):
        train_sft(resumed(home, **changes))
    assert content(home) == before


def test_every_option_of_every_trainer_is_compared_or_may_change():
    # the names that may differ, written out by hand: a new option is compared unless it is here
    free = {
        *("resume", "overwrite_output_dir", "output_dir", "max_steps", "num_train_epochs"),
        *("logging_steps", "save_steps", "save_total_limit", "eval_dataset", "eval_steps"),
        *("report_to", "gradient_checkpointing", "keep_best", "early_stopping_patience"),
        *("log_completions", "completions_format", "push_to_hub", "run_name"),
        *("per_device_eval_batch_size", "eval_num_generations"),
        *("sampler_url", "sampler_timeout", "sampler_requests", "sampler_weights_dir"),
        "sampler_tolerance",
    }
    from rlcore.runs import resuming

    assert free == {*resuming._MAY_CHANGE, *resuming._NOT_COMPARED}


def test_other_data_under_the_same_name_is_refused(home):
    write_rows(home / "rows.jsonl", [*ROWS[:-1], ROWS[-1] | {"completion": " 0"}])
    config = resumed(home)
    write_rows(home / "rows.jsonl", [*ROWS[:-1], ROWS[-1] | {"completion": " 0"}])
    with pytest.raises(UserError, match=r"dataset .*rows.jsonl is not what the run began with"):
        train_sft(config)


def test_other_data_under_another_name_is_refused_and_the_same_is_not(home):
    other = write_rows(home / "other.jsonl", ROWS[::-1])
    with pytest.raises(UserError, match=r"dataset .*other.jsonl is not what the run began with"):
        train_sft(resumed(home, dataset=other))
    train_sft(resumed(home, dataset=write_rows(home / "copy.jsonl")))


def test_another_model_is_refused_under_any_name(home):
    save_tiny(home / "other", initializer_range=0.05, attention_dropout=0.1, seed=1)
    with pytest.raises(UserError, match=r"model .*other is not what the run began with"):
        train_sft(resumed(home, model=str(home / "other")))
    shutil.rmtree(home / "model")
    shutil.move(home / "other", home / "model")
    with pytest.raises(UserError, match=r"model .*model is not what the run began with"):
        train_sft(resumed(home))


def test_a_model_that_moved_is_the_same(home, capsys):
    shutil.move(home / "model", home / "moved")
    train_sft(dataclasses.replace(resumed(home), model=str(home / "moved")))
    assert f"model {home}/model -> {home}/moved" in capsys.readouterr().err


def test_a_path_spelled_otherwise_is_no_change(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    train_sft(resumed(home, model="./run/../model", dataset="rows.jsonl", output_dir="run"))
    assert "resumed with" not in capsys.readouterr().err


def test_what_may_change_is_said_in_one_line(home, capsys):
    train_sft(resumed(home, max_steps=3, save_steps=1, logging_steps=2))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "resumed with" in line]
    for change in ("max_steps 2 -> 3", "save_steps 2 -> 1", "logging_steps 1 -> 2"):
        assert change in line
    kept = yaml.safe_load((home / "run" / "training.yaml").read_text())
    assert (kept["max_steps"], kept["save_steps"]) == (3, 1)


def test_fewer_steps_than_are_done_are_refused(home):
    with pytest.raises(UserError, match="checkpoint-2 is beyond this run's last step, 1"):
        train_sft(resumed(home, max_steps=1))


def test_another_trainer_is_refused(home):
    for config_class in (RewardModelConfig, DPOConfig):
        names = {field.name for field in dataclasses.fields(config_class)}
        options = {name: value for name, value in vars(resumed(home)).items() if name in names}
        with pytest.raises(UserError, match=r"another trainer \(SFTConfig, not"):
            train_reward_model(config_class(**options))


def test_without_the_files_to_compare_with_the_run_goes_on_and_says_so(home, capsys):
    for name in ("training.yaml", ".rlcore-run"):
        (home / "run" / name).unlink()
    train_sft(resumed(home, max_steps=4))
    assert "no training.yaml to compare" in capsys.readouterr().err


@pytest.mark.parametrize("start", [{"overwrite_output_dir": True}, {"resume": True}])
def test_the_saved_config_repeats_a_run(tmp_path, start):
    config = grpo_config(tmp_path, save_steps=2, max_steps=2)
    train_with_digits(config)
    train_with_digits(dataclasses.replace(config, **start))
    path = tmp_path / "run" / "training.yaml"
    again = load_config(type(config), path, {"output_dir": str(tmp_path / "again")})
    assert not again.resume and not again.overwrite_output_dir
    assert not {"resume", "overwrite_output_dir"} & yaml.safe_load(path.read_text()).keys()
    train_with_digits(again)
    model = "model.safetensors"
    assert (tmp_path / "again" / model).read_bytes() == (tmp_path / "run" / model).read_bytes()


def test_fingerprints_see_every_column_the_order_and_every_weight(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": str(n), "extra": {"a": [n]}} for n in range(3)]
    seen = {
        fingerprints.of_rows(Dataset.from_list(these))
        for these in (rows, rows[::-1], rows[:2], [row | {"extra": {"a": [0]}} for row in rows])
    }
    assert len(seen) == 4
    assert fingerprints.of_rows(Dataset.from_list(rows)) in seen
    one, two = (Path(save_tiny(tmp_path / str(n), seed=n)) for n in (1, 2))
    assert fingerprints.of_model(one) != fingerprints.of_model(two)
    before = fingerprints.of_model(one)
    (one / "notes.txt").write_text("mine")
    assert fingerprints.of_model(one) == before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_models_fingerprint_holds_each_file_that_shapes_what_it_does(tmp_path, name):
    (tmp_path / name).write_text("one")
    before = fingerprints.of_model(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("a line")
    assert fingerprints.of_model(tmp_path) == before
    (tmp_path / name).write_text("two")
    assert fingerprints.of_model(tmp_path) != before


@pytest.mark.parametrize("place", [0, 1 << 20, (2 << 20) - 1])
def test_a_models_fingerprint_looks_at_the_beginning_the_middle_and_the_end(tmp_path, place):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(2 << 20))
    before = fingerprints.of_model(tmp_path)
    changed = bytearray(2 << 20)
    part = slice(max(place - (1 << 17), 0), place + (1 << 17))
    changed[part] = b"x" * len(changed[part])
    weights.write_bytes(changed)
    assert fingerprints.of_model(tmp_path) != before
