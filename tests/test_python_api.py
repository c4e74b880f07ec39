"""The trainers from Python: objects as well as names, callbacks, configs that answer."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlcore.trainers
from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import (
    Callback,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    PGConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    TRPOConfig,
    train_dpo,
    train_grpo,
    train_kto,
    train_pg,
    train_ppo,
    train_reward_model,
    train_sft,
    train_trpo,
)

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(8)]


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("m") / "model", initializer_range=0.05)


SAMPLING = {"max_completion_length": 3, "num_generations": 4, "per_device_train_batch_size": 8}
TRAINERS = {
    "sft": (SFTConfig, train_sft, ROWS, {}),
    "pg": (PGConfig, train_pg, ROWS, SAMPLING),
    "trpo": (TRPOConfig, train_trpo, ROWS, SAMPLING),
    "ppo": (PPOConfig, train_ppo, ROWS, SAMPLING | {"value_backbone": "shared"}),
    "grpo": (GRPOConfig, train_grpo, ROWS, SAMPLING | {"beta": 0.1}),
    "dpo": (DPOConfig, train_dpo, PAIRS, {}),
    "kto": (KTOConfig, train_kto, PAIRS, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_objects_train_as_their_names_do(name, model, tmp_path):
    cls, train, rows, options = TRAINERS[name]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rewards = {"reward_funcs": length} if options else {}
    options = options | {"max_steps": 2} | ({"learning_rate": 1e-2} if name != "trpo" else {})
    named = train(
        cls(
            model=model,
            dataset=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "a"),
            **options,
        ),
        **({"reward_funcs": [length]} if rewards else {}),
    )
    policy = AutoModelForCausalLM.from_pretrained(model)
    given = train(
        cls(output_dir=str(tmp_path / "b"), **options),
        model=policy,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_list(rows),
        **rewards,
    )
    assert given.model is policy, "it is trained in place"
    expected = named.model.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in policy.state_dict().items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_a_reward_model_is_trained_from_a_classifier(model, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    before = copy.deepcopy(classifier.state_dict())
    config = RewardModelConfig(output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=1e-2)
    given = {"dataset": PAIRS, "tokenizer": AutoTokenizer.from_pretrained(model)}
    assert train_reward_model(config, model=classifier, **given).model is classifier
    assert not torch.equal(before["score.weight"], classifier.score.weight)


def test_a_tokenizer_comes_from_where_its_model_does(model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model)
    train_sft(SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1), model=policy, dataset=ROWS)
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    policy.config.name_or_path = ""
    with pytest.raises(UserError, match="tokenizer: give the model's"):
        train_sft(SFTConfig(output_dir=str(tmp_path / "other")), model=policy, dataset=ROWS)


class Listener(Callback):
    def __init__(self):
        self.heard = []

    def on_step(self, step, metrics):
        self.heard.append(("step", step, sorted(metrics)[:1]))

    def on_evaluate(self, step, metrics):
        self.heard.append(("evaluate", step, sorted(metrics)))

    def on_save(self, step, directory):
        assert (directory / "config.json").is_file()
        self.heard.append(("save", step, directory.name))


def test_callbacks_hear_of_steps_evaluations_and_saves(model, tmp_path):
    listener = Listener()
    config = SFTConfig(
        model=model, output_dir=str(tmp_path / "run"), max_steps=2, eval_steps=1, save_steps=1,
        logging_steps=2, save_total_limit=1,
    )  # fmt: skip
    train_sft(config, dataset=ROWS, eval_dataset=ROWS[:2], callbacks=[listener])
    evaluated = ["eval/loss"]
    assert listener.heard == [
        ("evaluate", 0, evaluated),
        ("step", 1, ["epoch"]), ("evaluate", 1, evaluated), ("save", 1, "checkpoint-1"),
        ("step", 2, ["epoch"]), ("evaluate", 2, evaluated), ("save", 2, "checkpoint-2"),
        ("save", 2, "run"),
    ]  # fmt: skip


class Steps:
    def __init__(self):
        self.seen = []

    def on_step(self, step, metrics):
        self.seen.append(step)


def test_one_object_with_one_of_the_methods_is_a_callback(model, tmp_path):
    steps = Steps()
    config = SFTConfig(model=model, output_dir=str(tmp_path / "run"), max_steps=2)
    train_sft(config, dataset=ROWS, callbacks=steps)
    assert steps.seen == [1, 2]


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [("float32", torch.float32), ("auto", torch.bfloat16), ("bfloat16", torch.bfloat16)],
)
def test_a_model_is_trained_in_the_dtype_asked_for_and_a_tokenizer_stays_as_it_is(
    model, tmp_path, dtype, trained
):
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    config = SFTConfig(output_dir=tmp_path / "run", max_steps=1, dtype=dtype)
    train_sft(config, model=policy, tokenizer=tokenizer, dataset=ROWS)
    assert {parameter.dtype for parameter in policy.parameters()} == {trained}
    assert tokenizer.padding_side == "right"


def test_an_adapter_needs_a_model_with_a_name(model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model)
    config = SFTConfig(output_dir=tmp_path / "run", max_steps=1, peft="lora")
    given = {"dataset": ROWS, "tokenizer": AutoTokenizer.from_pretrained(model)}
    policy.name_or_path = ""
    with pytest.raises(UserError, match="the model that was given has no name"):
        train_sft(config, model=policy, **given)
    policy.name_or_path = model
    train_sft(config, model=policy, **given)
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == model
    with pytest.raises(UserError, match="model has an adapter"):
        train_sft(SFTConfig(output_dir=tmp_path / "next"), model=policy, **given)


@pytest.mark.parametrize("kind", ["objects", "mixture"])
def test_a_resumed_run_wants_the_same_rows_of_objects_and_of_mixtures(model, tmp_path, kind):
    def data(count):
        if kind == "objects":
            return ROWS[:count]
        (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, ROWS[4:count])))
        (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, ROWS[:4])))
        return [str(tmp_path / "some.jsonl"), tmp_path / "more.jsonl"]

    def resumed(count):
        config = SFTConfig(output_dir=tmp_path / "run", max_steps=2, save_steps=1, resume=True)
        policy = AutoModelForCausalLM.from_pretrained(model)
        return train_sft(config, model=policy, dataset=data(count))

    config = SFTConfig(output_dir=tmp_path / "run", max_steps=1, save_steps=1)
    train_sft(config, model=AutoModelForCausalLM.from_pretrained(model), dataset=data(8))
    with pytest.raises(UserError, match=r"cannot be resumed: dataset .* is not what the run began"):
        resumed(7)
    assert resumed(8).steps == 2


async def slowly(prompts, completions, **_):
    await asyncio.sleep(0)
    return length(prompts, completions)


def as_array(prompts, completions, **_):
    return np.array(length(prompts, completions), dtype=np.float32)


def of_numbers(prompts, completions, **_):
    return [np.float64(len(text)) for text in completions]


@pytest.mark.parametrize("reward", [slowly, as_array, of_numbers, f"{__file__}:length"])
def test_rewards_may_be_asynchronous_and_arrays(model, tmp_path, reward):
    options = SAMPLING | {"max_steps": 1, "model": model, "dataset": ROWS}

    def first_line(reward, name):
        config = GRPOConfig(output_dir=str(tmp_path / name), **options)
        train_grpo(config, reward_funcs=reward)
        return read_metrics(tmp_path / name / "metrics.jsonl")[0]["reward"]

    assert first_line(reward, "a") == first_line(length, "b")


def test_an_asynchronous_reward_runs_beside_a_loop_that_runs_already(model, tmp_path):
    async def within():
        config = GRPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, model=model, **SAMPLING)
        return train_grpo(config, reward_funcs=slowly, dataset=ROWS)

    assert asyncio.run(within()).steps == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"modle": 1}, "unknown argument 'modle'. Did you mean 'model'"),
        ({"dataset": 7}, "dataset must be a name, a datasets.Dataset or a list of rows, not int"),
        ({"dataset": ["a.jsonl"]}, "no data file at 'a.jsonl'"),
        ({}, "dataset is not given: name it in the GRPOConfig"),
        ({"dataset": ROWS, "reward_funcs": "length"}, "unknown reward 'length'"),
        ({"dataset": ROWS, "reward_funcs": [7]}, "holds 7, which is neither function nor name"),
        (
            {"dataset": ROWS, "reward_funcs": torch.nn.Linear(1, 1)},
            "name its directory as reward_m",
        ),
        ({"dataset": ROWS, "callbacks": [length]}, "no object with one of the methods on_step"),
        ({"dataset": ROWS, "callbacks": Callback}, "no object with one of the methods on_step"),
        ({"dataset": DatasetDict()}, r"not DatasetDict: give one of its splits"),
        ({"dataset": ROWS, "eval_dataset": [*ROWS]}, r"holds .* \(eval_dataset, dataset\)"),
        ({"dataset": ROWS, "eval_dataset": [{"q": 1}]}, "eval_dataset, row 1: needs the column"),
        ({"dataset": ROWS, "model": torch.nn.Linear(1, 1)}, "model is given twice"),
    ],
)
def test_what_cannot_be_taken_is_answered(model, tmp_path, arguments, said):
    config = GRPOConfig(model=model, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=said):
        train_grpo(config, **({"reward_funcs": length} | arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda model: torch.nn.Linear(1, 1), "language model of transformers, not a Linear"),
        (lambda model: AutoModelForSequenceClassification.from_pretrained(model),
         "model must be a causal language model, not a Qwen2ForSequenceClassification"),
    ],
)  # fmt: skip
def test_an_object_that_is_no_policy_is_refused(model, tmp_path, given, said):
    config = SFTConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=said):
        train_sft(
            config, model=given(model), dataset=ROWS, tokenizer=AutoTokenizer.from_pretrained(model)
        )


def test_a_value_model_of_its_own_starts_from_the_object_too(model, tmp_path):
    def trained(name, **given):
        config = PPOConfig(output_dir=tmp_path / name, max_steps=1, **SAMPLING)
        train_ppo(config, dataset=ROWS, reward_funcs=length, **given)
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name / "value_model"
        ).state_dict()

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():  # no longer what lies where it comes from
        policy.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    policy.save_pretrained(tmp_path / "now")
    tokenizer.save_pretrained(tmp_path / "now")
    given = trained("a", model=policy, tokenizer=tokenizer)
    named = trained("b", model=tmp_path / "now")
    assert all(torch.equal(named[name], value) for name, value in given.items())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: GRPOConfig(lerning_rate=1),
            "GRPOConfig has no option 'lerning_rate'; did you mean 'learning_rate'",
        ),
        (lambda: SFTConfig("model"), "options of a SFTConfig are given by name: not 'model'"),
        (
            lambda: SFTConfig(model_name_or_path="m"),
            "'model_name_or_path': it is called 'model' here",
        ),
        (lambda: SFTConfig(fp16=True), "say --bf16"),
    ],
)
def test_a_config_answers_in_a_sentence(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_config_is_copied_and_pickled_as_any_other():
    config = GRPOConfig(model="m", dataset="d", output_dir="o", beta=0.5)
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
    ):
        assert other == config


def test_the_written_names_are_those_that_can_be_imported():
    assert sorted(rlcore.trainers._MODULES) == rlcore.trainers.__all__
    assert all(hasattr(rlcore.trainers, name) for name in rlcore.trainers.__all__)


def test_training_yaml_tells_an_object_by_its_class(model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model)
    train_sft(SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1), model=policy, dataset=ROWS)
    text = (Path(tmp_path) / "run" / "training.yaml").read_text()
    assert "model: <Qwen2ForCausalLM>" in text and "dataset: <list>" in text
