"""What a run makes of its evaluations: the best model kept, an early end, both resumed exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_tiny
from safetensors.torch import load_file

from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import sft
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.sft import SFTConfig, train_sft


@pytest.fixture
def config(tmp_path) -> SFTConfig:
    rows = [json.dumps({"prompt": f"{n}+1=", "completion": "8"}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[:2]))
    return SFTConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        eval_dataset=str(tmp_path / "held.jsonl"),
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=6,
        save_steps=2,
        eval_steps=1,
        log_completions=0,
    )


@pytest.fixture
def measured(monkeypatch):
    """Sets what the evaluations will find, by step; returns the weights that each one saw."""
    seen = {}

    def measure(losses: list[float]):
        def evaluate(run, examples):
            step = len(seen) if run.first_step == 0 else max(seen) + 1
            seen[step] = {n: p.detach().clone() for n, p in run.policy.state_dict().items()}
            return losses[step]

        monkeypatch.setattr(sft, "_evaluate", evaluate)
        return seen

    return measure


def same(directory: Path, weights: dict[str, torch.Tensor]) -> bool:
    saved = load_file(directory / "model.safetensors")
    return all(torch.equal(value, weights[name]) for name, value in saved.items())


def steps(config) -> list[int]:
    return [
        line["step"] for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")
        if "loss" in line
    ]  # fmt: skip


def test_the_model_that_did_best_stays(config, measured):
    seen = measured([5.0, 4.0, 2.0, 3.0, math.nan, 2.0, 2.5])
    result = train_sft(config)
    assert result.best == Path(config.output_dir) / "best"
    assert same(result.best, seen[2]) and same(result.output_dir, seen[6])
    assert (result.best / "tokenizer.json").is_file() and (result.best / "config.json").is_file()


@pytest.mark.parametrize(
    ("losses", "changes"),
    [
        ([1.0, 4.0, 2.0, 3.0, 3.0, 2.0, 2.5], {}),  # nothing is better than the start
        ([5.0, 4.0, 2.0, 3.0, 3.0, 2.0, 2.5], {"keep_best": "none"}),
    ],
)
def test_nothing_is_kept_where_there_is_nothing_to_keep(config, measured, losses, changes):
    measured(losses)
    result = train_sft(dataclasses.replace(config, **changes))
    assert result.best is None and not (result.output_dir / "best").exists()


def test_the_last_of_one_evaluation_is_the_model_itself(config, measured):
    measured([5.0, 4.0])
    assert train_sft(dataclasses.replace(config, eval_steps=0)).best is None


def test_patience_ends_a_run_and_its_model_is_whole(config, measured, capsys):
    seen = measured([5.0, 2.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    config = dataclasses.replace(config, early_stopping_patience=2, logging_steps=2)
    result = train_sft(config)
    assert result.steps == 3 and steps(config) == [2, 3] and max(seen) == 3
    assert same(result.output_dir, seen[3]) and same(result.best, seen[1])
    assert "ended early: 2 evaluations since step 1 without a better eval/loss" in (
        capsys.readouterr().err
    )


def test_a_resumed_run_knows_the_best_and_its_patience(config, measured):
    measured([5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    train_sft(dataclasses.replace(config, max_steps=2))
    config = dataclasses.replace(config, early_stopping_patience=3, resume=True)
    assert train_sft(config).steps == 4
    assert steps(config) == [1, 2, 3, 4]


def test_a_batch_that_serves_several_updates_ends_early_too(config, tmp_path):
    config = GRPOConfig(
        model=config.model, dataset=config.dataset, eval_dataset=config.eval_dataset,
        output_dir=str(tmp_path / "grpo"), max_steps=12, num_iterations=4, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=2, learning_rate=1e-9, eval_steps=1,
        early_stopping_patience=3,
    )  # fmt: skip

    def length(prompts, completions, **_):
        return [float(len(text)) for text in completions]

    assert train_grpo(config, reward_funcs=[length]).steps == 3
    assert steps(config) == [1, 2, 3]


def test_several_sets_are_measured_each_and_their_mean_decides(config, tmp_path, measured):
    (tmp_path / "hard.jsonl").write_text(json.dumps({"prompt": "9+9=", "completion": "18"}))
    sets = [f"easy={config.eval_dataset}", f"hard={tmp_path / 'hard.jsonl'}"]
    config = dataclasses.replace(config, eval_dataset=sets, max_steps=2)
    result = train_sft(config)
    lines = [
        line for line in read_metrics(result.output_dir / "metrics.jsonl") if "eval/loss" in line
    ]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert set(line) == {"step", "eval/loss", "eval/easy/loss", "eval/hard/loss"}
        assert line["eval/loss"] == (line["eval/easy/loss"] + line["eval/hard/loss"]) / 2
        assert line["eval/easy/loss"] != line["eval/hard/loss"]
    alone = dataclasses.replace(
        config, eval_dataset=str(tmp_path / "hard.jsonl"), overwrite_output_dir=True
    )
    train_sft(alone)
    hard = [
        line for line in read_metrics(result.output_dir / "metrics.jsonl") if "eval/loss" in line
    ]
    assert [line["eval/loss"] for line in hard] == [line["eval/hard/loss"] for line in lines]


def test_sets_may_be_a_mapping_of_rows_and_none_may_be_the_training_rows(config):
    rows = [json.loads(line) for line in Path(config.dataset).read_text().splitlines()]
    config = dataclasses.replace(config, eval_dataset=None, max_steps=1)
    result = train_sft(config, eval_dataset={"a": rows[:1], "b": rows[1:3]})
    assert {"eval/loss", "eval/a/loss", "eval/b/loss"} <= result.metrics.keys()
    config = dataclasses.replace(config, overwrite_output_dir=True)
    with pytest.raises(UserError, match="holds the rows of dataset"):
        train_sft(config, eval_dataset={"a": rows[:1], "b": rows})


def uneven(prompts, completions, **_):
    """1 where the third character is a digit, nothing for an empty completion."""
    return [float(text[2:3].isdigit()) if text else None for text in completions]


def test_held_out_prompts_are_sampled_as_often_as_asked_and_the_same_each_time(config, tmp_path):
    asked = []

    def noting(prompts, completions, **_):
        asked.append((prompts, completions))
        return uneven(prompts, completions)

    config = GRPOConfig(
        model=config.model, dataset=config.dataset, eval_dataset=config.eval_dataset,
        output_dir=str(tmp_path / "grpo"), max_steps=2, num_generations=4, eval_steps=1,
        per_device_train_batch_size=8, max_completion_length=4, learning_rate=1e-12,
        eval_num_generations=3, per_device_eval_batch_size=1, save_steps=0,
    )  # fmt: skip
    train_grpo(config, reward_funcs=[noting])
    evaluated = [each for each in asked if len(each[0]) in (1, 3)]
    # two rows, one at a time, greedily and three times, at the start and after each step
    assert [len(prompts) for prompts, _ in evaluated] == [1, 3] * 2 * 3
    assert evaluated[:4] == evaluated[4:8] == evaluated[8:]
    rewards = torch.tensor(
        [[math.nan if r is None else r for r in uneven(*each)] for each in evaluated[1:4:2]]
    )
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    measured = [line for line in lines if "eval/reward" in line]
    assert len(measured) == 3
    for line in measured:
        assert line["eval/mean@3"] == pytest.approx(rewards.nanmean(1).nanmean().item())
        assert line["eval/pass@3"] == (rewards == 1).any(1).float().mean().item()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_dataset": None, "eval_steps": 0, "keep_best": "reward"}, "keep_best is set, but"),
        ({"eval_dataset": None}, "eval_steps is set, but there is no eval_dataset"),
        ({"eval_steps": 0, "early_stopping_patience": 2}, "set eval_steps"),
        ({"keep_best": "reward"}, "unknown metric in keep_best 'reward'.*Known: eval/loss"),
    ],
)
def test_options_that_ask_for_nothing_measured_are_refused(config, changes, said):
    with pytest.raises(UserError, match=said):
        train_sft(dataclasses.replace(config, **changes))
    assert not Path(config.output_dir).exists()


def test_sft_shows_what_the_model_makes_of_held_out_prompts(config):
    train_sft(dataclasses.replace(config, log_completions=1, max_steps=30, eval_steps=30))
    lines = [json.loads(line) for line in (Path(config.output_dir) / "completions.jsonl").open()]
    assert [(line["step"], line["split"], line["prompt"]) for line in lines] == [
        (0, "eval", "0+1="), (30, "eval", "0+1="),
    ]  # fmt: skip
    assert lines[1]["completion"] == "8" and not lines[1]["truncated"]
