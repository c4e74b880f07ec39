"""YAML files and flags into config dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlcore.errors import TrainingDiverged, UserError, nearest, unknown_name
from rlcore.runs.config import load_config, save_config
from rlcore.runs.options import options


@dataclass
class Base:
    """Options of every run."""

    model: str  # where it starts
    # the peak,
    # after warm-up
    learning_rate: float = 1e-6

    # Machine

    bf16: bool = False
    """half the bytes"""


@dataclass
class Config(Base):
    """Options of this run."""

    learning_rate: float = 1e-5
    num_generations: int = 8  # completions a prompt
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    scale_rewards: Literal["group", "none"] = "group"

    def __post_init__(self):
        if self.num_generations < 2:
            raise UserError("num_generations must be at least 2")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = written(tmp_path, "model: a\nlearning_rate: 0.5\nnum_generations: 4\n")
    config = load_config(Config, path, ["--num-generations", "6"])
    assert (config.model, config.learning_rate, config.num_generations) == ("a", 0.5, 6)
    assert config.scale_rewards == "group"


def test_a_mapping_overrides_yaml(tmp_path):
    config = load_config(Config, written(tmp_path, "model: a\n"), {"model": "b", "bf16": True})
    assert (config.model, config.bf16) == ("b", True)


@pytest.mark.parametrize("flag", ["--num-generations", "--num_generations"])
@pytest.mark.parametrize("joined", [True, False])
def test_dashes_and_underscores_are_the_same_flag(flag, joined):
    words = [f"{flag}=3"] if joined else [flag, "3"]
    assert load_config(Config, None, ["--model", "a", *words]).num_generations == 3


def test_yaml_keys_take_dashes_too(tmp_path):
    assert load_config(Config, written(tmp_path, "model: a\nnum-generations: 3\n")).num_generations


def test_yaml_exponent_without_a_dot_is_a_number(tmp_path):
    # YAML 1.1 itself makes the string "1e-4" of it
    assert load_config(
        Config, written(tmp_path, "model: a\nlearning_rate: 1e-4\n")
    ).learning_rate == (1e-4)


def test_boolean_flags_switch_on_and_off(tmp_path):
    path = written(tmp_path, "model: a\nbf16: true\n")
    assert load_config(Config, path).bf16 is True
    assert load_config(Config, path, ["--no-bf16"]).bf16 is False
    assert load_config(Config, None, ["--model", "a", "--bf16"]).bf16 is True
    assert load_config(Config, None, ["--model", "a", "--bf16", "true"]).bf16 is True
    assert load_config(Config, path, ["--bf16=false"]).bf16 is False


def test_lists_take_several_words_negative_numbers_and_none():
    flags = ["--model", "a", "--reward", "x", "y", "--reward-weights", "1", "-2.5"]
    config = load_config(Config, None, flags)
    assert config.reward == ["x", "y"]
    assert config.reward_weights == [1.0, -2.5]
    assert load_config(Config, None, [*flags, "--reward-weights", "None"]).reward_weights is None


def test_one_word_makes_a_list_of_one(tmp_path):
    assert load_config(Config, written(tmp_path, "model: a\nreward: x\n")).reward == ["x"]
    assert load_config(Config, None, ["--model", "a", "--reward", "x"]).reward == ["x"]


def test_checks_of_the_dataclass_see_the_final_values_only(tmp_path):
    path = written(tmp_path, "model: a\nnum_generations: 1\n")
    assert load_config(Config, path, ["--num-generations", "2"]).num_generations == 2
    with pytest.raises(UserError, match="at least 2"):
        load_config(Config, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nnum_generation: 3\n", "unknown key 'num_generation'; did you mean 'num_gen"),
        ("model: a\nqqq: 3\n", "unknown key 'qqq'"),
        ("model: a\nnum_generations: many\n", "num_generations must be int, not 'many'"),
        ("model: a\nnum_generations: 2.5\n", "num_generations must be int, not 2.5"),
        ("model: a\nbf16: 3\n", "bf16 must be bool, not 3"),
        ("model: a\nscale_rewards: all\n", "scale_rewards must be group | none, not 'all'"),
        ("model: a\nmodel: b\n", "'model' is given twice"),
        ("model: a\nnum-generations: 3\nnum_generations: 3\n", "is given twice"),
        ("model: [a\n", "not readable as YAML"),
        ("- a\n", "must hold `name: value` lines"),
        ("learning_rate: 0.1\n", "required, but not given: --model"),
    ],
)
def test_bad_yaml_names_the_file_and_the_fault(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(Config, path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "required" in message


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config .*gone\.yaml"):
        load_config(Config, tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num-generation", "3"],
            "unknown flag --num-generation; did you mean --num-generations",
        ),
        (["--no-model"], "unknown flag --no-model"),
        (["stray"], "'stray' is not a flag"),
        (["--num-generations", "x"], "--num-generations must be int, not 'x'"),
        (["--num-generations"], "--num-generations must be int, not nothing"),
        (["--model", "a", "b"], "--model must be str, not ['a', 'b']"),
        (["--bf16"], "required, but not given: --model"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(UserError) as caught:
        load_config(Config, None, flags)
    assert message in str(caught.value)


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = Config("a", 1e-7, reward=["x"], reward_weights=[0.1], bf16=True)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config


def test_help_comes_from_comments_and_groups_from_classes_and_sections():
    shown = {option.name: option for option in options(Config)}
    assert shown["model"].help == "where it starts"
    assert shown["learning_rate"].help == "the peak, after warm-up"
    assert shown["bf16"].help == "half the bytes"
    assert shown["model"].default is None
    assert shown["learning_rate"].default == "1e-05"
    assert [shown[name].group for name in ("model", "bf16", "num_generations")] == [
        "Options of every run",
        "Machine",
        "Options of this run",
    ]
    # a subclass that changes a default moves neither the help nor the group
    assert shown["learning_rate"].group == "Options of every run"
    assert shown["scale_rewards"].type == "group | none"


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list():
    error = unknown_name("reward", "exakt", ["exact", "length"])
    assert isinstance(error, UserError)
    assert str(error) == "unknown reward 'exakt'. Did you mean 'exact'? Known: exact, length"
    assert nearest("zzz", ["exact"]) is None


def test_a_divergence_names_step_quantity_and_checkpoint():
    error = TrainingDiverged(7, "loss", float("nan"), Path("runs/checkpoint-5"))
    assert str(error).startswith("step 7: loss is nan")
    assert "checkpoint-5" in str(error)
    assert "no checkpoint" in str(TrainingDiverged(7, "loss", float("inf")))
