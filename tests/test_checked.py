"""Configs that check themselves: names, types and ranges, in our words."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlcore.commands.table import COMMANDS
from rlcore.errors import UserError
from rlcore.runs.checked import Checked
from rlcore.runs.config import load_config, save_config
from rlcore.runs.options import OBJECT, init_fields
from rlcore.trainers import DPOConfig, GRPOConfig, PGConfig


@pytest.mark.parametrize(
    "options, message",
    [
        ({"betta": 0.1}, "GRPOConfig has no option 'betta'; did you mean 'beta'?"),
        ({"dataset_name": "d"}, "GRPOConfig has no option 'dataset_name': it is called 'dataset'"),
        ({"use_vllm": True}, "GRPOConfig has no option 'use_vllm': say --sampler vllm"),
        ({"beta": "high"}, "beta must be float, not 'high'"),
        ({"beta": -1}, "beta must be at least 0, not -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, not nan"),
        ({"num_generations": 8.0}, "num_generations must be int, not 8.0"),
        ({"num_generations": True}, "num_generations must be int, not True"),
        ({"num_generations": None}, "num_generations must be int, not None"),
        ({"bf16": "yes"}, "bf16 must be bool, not 'yes'"),
        ({"eos_token": 3}, "eos_token must be str | None, not 3"),
        ({"eos_token": b"x"}, "eos_token must be str | None, not a bytes"),
        ({"reward": [len]}, "reward must be list[str], not [<built-in function len>]"),
    ],
)
def test_a_mistake_is_one_sentence_where_it_is_made(options, message):
    with pytest.raises(UserError) as caught:
        GRPOConfig(output_dir="o", **options)
    assert str(caught.value).startswith(message)
    with pytest.raises(UserError):
        dataclasses.replace(GRPOConfig(output_dir="o"), **options)


def test_one_value_is_a_list_of_one_a_path_is_text_and_numpys_numbers_are_plain(tmp_path):
    config = GRPOConfig(
        output_dir=Path("runs/a"), reward="exact_match", reward_weights=np.float32(0.5),
        num_generations=np.int64(4), beta=np.float64(0.25), bf16=np.bool_(True),
        report_to=("wandb",), dataset=[Path("a.jsonl"), "b.jsonl"], model=Path("m"),
    )  # fmt: skip
    assert (config.output_dir, config.reward, config.model) == ("runs/a", ["exact_match"], "m")
    assert (config.reward_weights, config.report_to) == ([0.5], ["wandb"])
    assert config.dataset == ["a.jsonl", "b.jsonl"]
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["beta"] == 0.25
    assert load_config(GRPOConfig, tmp_path / "config.yaml") == config
    assert DPOConfig(output_dir="o", loss_type="ipo").loss_type == ["ipo"]


def test_what_may_be_an_object_stays_one():
    rows, model = [{"prompt": "1"}], object()
    config = PGConfig(output_dir="o", dataset=rows, model=model, eval_dataset={"easy": rows})
    assert config.dataset is rows and config.model is model
    assert config.eval_dataset == {"easy": rows}


def config_of(name: str) -> type:
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.config)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_config_checks_itself(name):
    cls = config_of(name)
    assert issubclass(cls, Checked)
    known = init_fields(cls)
    required = [
        option for option, field in known.items()
        if dataclasses.MISSING is field.default is field.default_factory
    ]  # fmt: skip
    if required:
        with pytest.raises(UserError, match=rf"^{cls.__name__} needs {', '.join(required)}: "):
            cls()
    given = dict.fromkeys(required, "x")
    with pytest.raises(UserError, match=rf"^{cls.__name__} has no option 'sede'"):
        cls(**given, sede=1)
    with pytest.raises(UserError, match="are given by name: not 'x'"):
        cls("x", **given)
    for option, field in known.items():
        if OBJECT not in field.metadata:
            with pytest.raises(UserError, match=rf"^{option} must be .*, not a set$"):
                cls(**given | {option: set()})


def test_a_config_is_copied_and_pickled_without_being_made_anew():
    config = config_of("merge")(adapter="a", output_dir="b")
    assert copy.deepcopy(config) == copy.copy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
