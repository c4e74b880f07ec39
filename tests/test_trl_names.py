"""Names that people bring from TRL: of options, commands, rewards and splits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers.tiny import save_tiny

from rlcore.cli import main
from rlcore.data import tables
from rlcore.data.loading import load_rows
from rlcore.errors import UserError
from rlcore.runs.aliases import ALIASES, ANSWERS, FOLDED, OF_OTHERS
from rlcore.runs.config import load_config, save_config
from rlcore.runs.options import init_fields
from rlcore.runs.tracking import read_metrics
from rlcore.sampling.rewards import load_reward
from rlcore.trainers import (
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    PGConfig,
    PPOConfig,
    RewardModelConfig,
    RLOOConfig,
    SFTConfig,
    train_dpo,
    train_reward_model,
    train_sft,
)
from rlcore.trainers.options.base import check_train_config

CONFIGS = (SFTConfig, GRPOConfig, PPOConfig, DPOConfig, DistillConfig)


def test_each_other_name_is_no_name_of_ours_and_leads_to_one():
    ours = {name for cls in CONFIGS for name in init_fields(cls)}
    assert not ours & (ALIASES.keys() | ANSWERS.keys() | FOLDED.keys())
    assert set(ALIASES.values()) | OF_OTHERS.keys() <= ours


def test_flags_and_yaml_take_trls_names(tmp_path):
    flags = ["--model_name_or_path", "m", "--dataset-name", "d", "--output-dir", "o"]
    config = load_config(GRPOConfig, None, [*flags, "--reward_funcs", "a.b", "exact_match"])
    assert (config.model, config.dataset, config.reward) == ("m", "d", ["a.b", "exact_match"])
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\ndataset_name: [d, e]\noutput_dir: o\n")
    config = load_config(SFTConfig, tmp_path / "c.yaml")
    assert (config.model, config.dataset) == ("m", ["d", "e"])


def test_parameters_of_a_loss_come_as_json_as_yaml_and_by_trls_names(tmp_path):
    needed = ["--model", "m", "--dataset", "d", "--output-dir", "o"]

    def of(*flags, path=None):
        return load_config(GRPOConfig, path, [*needed, *flags]).surrogate_params

    assert of() is None
    assert of("--surrogate-params", '{"tau_pos": 2}') == {"tau_pos": 2.0}
    named = of("--sapo-temperature-neg", "1e-2", "--surrogate_params", '{"tau_pos": 2}')
    assert named == {"tau_pos": 2.0, "tau_neg": 0.01}
    assert of("--vespo_k_pos", "3", "--vespo_lambda_neg", "1") == {"k_pos": 3.0, "lambda_neg": 1.0}
    (tmp_path / "c.yaml").write_text("surrogate_params: {tau_pos: 1e-3}\n")
    assert of(path=tmp_path / "c.yaml") == {"tau_pos": 1e-3}
    save_config(load_config(GRPOConfig, tmp_path / "c.yaml", needed), tmp_path / "saved.yaml")
    assert of(path=tmp_path / "saved.yaml") == {"tau_pos": 1e-3}
    for given in ("tau_pos", "{'tau_pos': 1}", '{"tau_pos": "high"}', "[1]"):
        with pytest.raises(UserError, match="surrogate-params must be numbers by name"):
            of("--surrogate-params", given)
    with pytest.raises(UserError, match="surrogate_params must be"):
        GRPOConfig(model="m", surrogate_params=[1.0])
    with pytest.raises(UserError, match=r"surrogate_params must be.* finite, not inf"):
        GRPOConfig(model="m", surrogate_params={"tau_pos": float("inf")})
    with pytest.raises(UserError, match="unknown flag --vespo_k_pos: grpo has it"):
        load_config(PPOConfig, None, [*needed, "--vespo_k_pos", "3"])


def test_one_option_under_two_names_is_given_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\nmodel: n\n")
    with pytest.raises(UserError, match="'model' is given twice"):
        load_config(SFTConfig, tmp_path / "c.yaml")


def test_a_name_is_not_taken_where_ours_has_no_meaning():
    with pytest.raises(UserError, match="unknown flag --reward-funcs"):
        load_config(SFTConfig, None, ["--reward-funcs", "a"])
    with pytest.raises(UserError, match="unknown flag --epsilon: grpo has it; ppo has cliprange"):
        load_config(PPOConfig, None, ["--epsilon", "0.1"])
    with pytest.raises(UserError, match="unknown flag --vllm_mode: say --sampler vllm"):
        load_config(GRPOConfig, None, ["--vllm_mode", "colocate"])


@pytest.mark.parametrize("name", ANSWERS)
def test_what_has_no_counterpart_is_answered(name):
    with pytest.raises(UserError) as raised:
        load_config(GRPOConfig, None, [f"--{name}", "x"])
    assert str(raised.value) == f"unknown flag --{name}: {ANSWERS[name]}"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", initializer_range=0.05)
    lines = [json.dumps({"question": f"{n}+1", "prompt": "no"}) for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "more.jsonl").write_text(json.dumps({"question": "9+1", "why": "more"}))
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text(
        "def length(prompts, completions, **_):\n"
        "    assert all('+1' in prompt for prompt in prompts)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "name", ["rewards.mine:length", "rewards.mine.length", "rewards/mine.py:length"]
)
def test_a_reward_is_found_by_colon_dot_or_file(home, name):
    assert load_reward(name)(["1+1"], ["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rewards/other.py:length", "there is no file 'rewards/other.py'"),
        ("rewards.mine.width", "has no function 'width'"),
        ("lenght", "Known: "),
    ],
)
def test_a_reward_that_is_not_there_is_named(home, name, said):
    with pytest.raises(UserError, match=said):
        load_reward(name)


def test_rloo_trains_with_the_leave_one_out_baseline_from_several_files(home):
    flags = {
        "model_name_or_path": "model", "output-dir": "run", "num-generations": "4",
        "reward-funcs": "rewards/mine.py:length", "prompt-column": "question", "max-steps": "1",
        "per-device-train-batch-size": "4", "max-completion-length": "2",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert main(["train", "rloo", *words, "--dataset", "rows.jsonl", "more.jsonl"]) == 0
    config = (home / "run" / "training.yaml").read_text()
    assert "beta: 0.05" in config
    assert "baseline: leave_one_out" in config and "num_generations: 4" in config
    assert "- rows.jsonl\n- more.jsonl" in config
    assert len(read_metrics(home / "run" / "metrics.jsonl")) == 1
    assert main(["train", "rloo", *words, "--dataset", "rows.jsonl", "more.jsonl",
                 "--resume", "--max-steps", "2"]) == 0  # fmt: skip
    assert len(read_metrics(home / "run" / "metrics.jsonl")) == 2


def test_rloo_has_trls_defaults_below_yaml_and_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ndataset: d\noutput_dir: o\nnum_generations: 8\n")
    config = load_config(RLOOConfig, tmp_path / "c.yaml", ["--beta", "0.1"])
    assert isinstance(config, PGConfig)
    assert (config.baseline, config.num_generations, config.beta) == ("leave_one_out", 8, 0.1)
    assert (RLOOConfig().num_generations, RLOOConfig().beta) == (2, 0.05)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("kto", "Did you mean 'train kto'?"),
        ("train orpo", "`rlcore train orpo` is `rlcore train dpo --loss-type orpo`"),
        ("train gkd", "`rlcore train gkd` is `rlcore train distill`"),
        ("train rlo", "Did you mean 'train rloo'?"),
    ],
)
def test_commands_of_trl_are_answered(command, said, capsys):
    assert main([*command.split(), "--model", "x"]) == 2
    assert said in capsys.readouterr().err


def test_rloo_is_in_the_list_of_commands(capsys):
    assert main(["train", "--help"]) == 0
    assert "train rloo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--dataset_train_split", "test"], "d:/test"),
        (["--dataset_config", "main"], "d:main"),
        (["--dataset_config", "main", "--dataset_train_split", "train[:5%]"], "d:main/train[:5%]"),
    ],
)
def test_configuration_split_and_adapter_become_part_of_our_options(tmp_path, flags, name):
    (tmp_path / "c.yaml").write_text("model: m\ndataset_name: d\noutput_dir: o\n")
    config = load_config(SFTConfig, tmp_path / "c.yaml", [*flags, "--use_peft"])
    assert (config.dataset, config.peft) == (name, "lora")
    assert load_config(SFTConfig, tmp_path / "c.yaml", ["--use_peft", "false"]).peft is None


@pytest.mark.parametrize("dataset", [["a", "b"], ["a:main"]])
def test_a_configuration_belongs_to_one_data_set_without_one(dataset):
    flags = ["--model", "m", "--output-dir", "o", "--dataset", *dataset, "--dataset-config", "c"]
    with pytest.raises(UserError, match="parts of one data set's name"):
        load_config(SFTConfig, None, flags)


def test_a_mixture_is_a_list_in_ours_and_in_trls_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    start = "model: m\noutput_dir: o\n"
    path.write_text(start + "dataset:\n- a.jsonl\n- b:main/train\n")
    assert load_config(SFTConfig, path).dataset == ["a.jsonl", "b:main/train"]
    path.write_text(start + "datasets:\n- path: a\n  name: c\n  split: test\n- path: b\n")
    assert load_config(SFTConfig, path).dataset == ["a:c/test", "b"]
    path.write_text(start + "datasets:\n- path: a\n  columns: [prompt]\n")
    with pytest.raises(UserError, match="path with name and split, without columns"):
        load_config(SFTConfig, path)


def test_output_inside_of_a_data_set_is_refused_whatever_is_wanted_of_it(folder):
    config = SFTConfig(model="m", dataset=["hub/name", "data:hard/train"], output_dir="data/run")
    with pytest.raises(UserError, match="output_dir data/run lies in dataset 2 data"):
        check_train_config(config)


@pytest.mark.parametrize(("cls", "rest"), [
    (SFTConfig, {"completion": " 2"}), (DPOConfig, {"chosen": " 2", "rejected": " 3"}),
    (RewardModelConfig, {"chosen": " 2", "rejected": " 3"}),
])  # fmt: skip
def test_every_trainer_takes_its_prompts_from_another_column(home, cls, rest):
    train = {SFTConfig: train_sft, DPOConfig: train_dpo, RewardModelConfig: train_reward_model}[cls]
    rows = [{"question": f"{n}+1"} | rest for n in range(4)]
    config = cls(model="model", output_dir="run", max_steps=1, prompt_column="question")
    assert train(config, dataset=rows).steps == 1
    with pytest.raises(UserError, match="'question' is no column of the data, but 'prompt'"):
        train(dataclasses.replace(config, output_dir="other"), dataset=[{"prompt": "1"} | rest])


def test_another_column_can_be_the_prompt(home):
    rows = load_rows("rows.jsonl", prompt_column="question")
    assert rows[0] == {"prompt": "0+1"} and rows[[1, 2]] == {"prompt": ["1+1", "2+1"]}
    assert rows.where(3) == "rows.jsonl, line 4" and rows.column_names == ["prompt"]
    with pytest.raises(
        UserError, match=r"prompt_column 'problem' is no column of the data, but 'q"
    ):
        load_rows("more.jsonl", prompt_column="problem")


def test_several_data_sets_are_all_their_rows(home):
    rows = load_rows(["rows.jsonl", "more.jsonl"], prompt_column="question")
    assert len(rows) == 5 and rows["why"] == [None] * 4 + ["more"]
    assert rows.where(4) == "more.jsonl, line 1"
    assert (
        [row["prompt"] for row in rows] == rows["prompt"] == [rows[n]["prompt"] for n in range(5)]
    )
    assert rows[-1] == rows[4] and rows[[4, 0]]["prompt"] == ["9+1", "0+1"]
    with pytest.raises(IndexError):
        rows[5]


def test_tables_of_a_mixture_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    for path in paths:
        Dataset.from_list([{"prompt": f"{path}{n}"} for n in range(3)]).to_parquet(path)
    asked = []
    read = tables._Table.__getitem__
    monkeypatch.setattr(tables._Table, "__getitem__", lambda t, i: asked.append(i) or read(t, i))
    rows = load_rows(paths)
    assert rows[4]["prompt"] == f"{paths[1]}1" and len(asked) == 1


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dataset with two configurations, and splits of other names."""
    monkeypatch.chdir(tmp_path)
    for config in ("easy", "hard"):
        for split, count in (("train", 3), ("extra", 2)):
            path = tmp_path / "data" / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"prompt": f"{config} {split} {n}"}) for n in range(count)]
            path.write_text("\n".join(rows))
    configs = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": f"{config}/{split}.jsonl"} for split in ("train", "extra")
            ],
        }
        for config in ("easy", "hard")
    ]
    header = yaml.safe_dump({"configs": configs})
    (tmp_path / "data" / "README.md").write_text(f"---\n{header}---\n")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("data:hard", "hard train 0", 3),
        ("data:easy/extra", "easy extra 0", 2),
        ("data:hard/train[1:]", "hard train 1", 2),
        ("data:hard/train[-1:]", "hard train 2", 1),
        ("data:hard/train[:67%]", "hard train 0", 2),
    ],
)
def test_a_name_can_say_configuration_and_split(folder, name, first, count):
    rows = load_rows(name)
    assert len(rows) == count and rows[0]["prompt"] == first


def test_a_part_of_a_split_of_text_files_keeps_values_and_places(folder):
    file = folder / "hard" / "train.jsonl"
    rows = [{"prompt": str(n), "answer": answer} for n, answer in enumerate((7, "7", [7], None))]
    file.write_text("\n".join(map(json.dumps, rows)))
    part = load_rows("data:hard/train[1:3]")
    assert list(part) == rows[1:3] and part.where(1) == "data/train.jsonl, line 3"


@pytest.mark.parametrize(
    ("name", "said"),
    [("data:easy/tset", "has the splits train, extra, and not 'tset'"), ("data:esay", "esay")],
)
def test_a_configuration_or_split_that_is_not_there_is_named(folder, name, said):
    with pytest.raises(UserError, match=said):
        load_rows(name)
