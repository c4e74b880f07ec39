"""How models and tokenizers are loaded: dtype, attention, remote code, chat templates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore.commands.chat import ChatConfig, chat
from rlcore.commands.evaluate import EvalConfig, evaluate_models
from rlcore.errors import UserError
from rlcore.models import loading
from rlcore.trainers.dpo import DPOConfig, train_dpo
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.ppo import PPOConfig, train_ppo
from rlcore.trainers.reward_model import RewardModelConfig, train_reward_model
from rlcore.trainers.sft import SFTConfig, train_sft

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(8)]
SAMPLING = {"max_completion_length": 3, "num_generations": 4, "per_device_train_batch_size": 8}


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("m") / "model", initializer_range=0.05)


def dtypes(directory: Path, name: str = "model.safetensors") -> set[torch.dtype]:
    return {value.dtype for value in load_file(directory / name).values()}


RUNS = {
    "sft": lambda c: train_sft(SFTConfig(dataset=ROWS, **c)),
    "grpo": lambda c: train_grpo(
        GRPOConfig(dataset=ROWS, beta=0.1, **SAMPLING, **c), reward_funcs=length
    ),
    "ppo": lambda c: train_ppo(PPOConfig(dataset=ROWS, **SAMPLING, **c), reward_funcs=length),
    "dpo": lambda c: train_dpo(DPOConfig(dataset=PAIRS, **c)),
    "reward_model": lambda c: train_reward_model(RewardModelConfig(dataset=PAIRS, **c)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_model_is_trained_and_saved_in_the_dtype_that_was_asked_for(name, model, tmp_path):
    options = {
        "model": model, "output_dir": str(tmp_path / "run"), "max_steps": 2, "learning_rate": 1e-2,
        "dtype": "bfloat16", "attn_implementation": "eager",
    }  # fmt: skip
    result = RUNS[name](options)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.model.config._attn_implementation == "eager"
    assert dtypes(tmp_path / "run") == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_auto_is_the_checkpoints_own_and_float16_is_refused(model, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        other = tmp_path / str(dtype)
        AutoModelForCausalLM.from_pretrained(model).to(dtype).save_pretrained(other)
        AutoTokenizer.from_pretrained(model).save_pretrained(other)
        config = SFTConfig(
            model=str(other), dataset=ROWS, output_dir=str(tmp_path / "run"), max_steps=1,
            dtype="auto",
        )  # fmt: skip
        if dtype == torch.float16:
            with pytest.raises(UserError, match=r"weights are float16.*say dtype bfloat16"):
                train_sft(dataclasses.replace(config, overwrite_output_dir=True))
        else:
            assert train_sft(config).model.dtype == dtype
    assert train_sft(
        SFTConfig(model=model, dataset=ROWS, output_dir=str(tmp_path / "whole"), max_steps=1)
    ).model.dtype == torch.float32  # fmt: skip


def test_an_adapter_stays_float32_beside_frozen_bfloat16(model, tmp_path):
    config = SFTConfig(
        model=model, dataset=ROWS, output_dir=str(tmp_path / "run"), max_steps=2, peft="lora",
        dtype="bfloat16", learning_rate=1e-2,
    )  # fmt: skip
    trained = train_sft(config).model
    kinds = {p.requires_grad: p.dtype for p in trained.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert dtypes(tmp_path / "run", "adapter_model.safetensors") == {torch.float32}


def test_code_of_a_model_runs_by_flag_alone(model, tmp_path, monkeypatch):
    asked = []
    load = loading.from_pretrained

    def noting(auto_class, what, name, **options):
        asked.append((what, options.get("trust_remote_code", False)))
        return load(auto_class, what, name, **options | {"trust_remote_code": False})

    monkeypatch.setattr(loading, "from_pretrained", noting)
    config = GRPOConfig(
        model=model, dataset=ROWS, output_dir=str(tmp_path / "run"), max_steps=1, beta=0.1,
        **SAMPLING,
    )  # fmt: skip
    train_grpo(config, reward_funcs=length)
    assert asked == [("tokenizer", False), ("model", False), ("model", False)]
    asked.clear()
    trusting = dataclasses.replace(config, trust_remote_code=True, overwrite_output_dir=True)
    train_grpo(trusting, reward_funcs=length)
    assert asked == [("tokenizer", True), ("model", True), ("model", True)]


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content }}{% endfor %}"
    "{% if loud %}!{% endif %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_template_and_its_variables_come_from_options_and_the_template_is_saved(
    model, tmp_path, as_file
):
    template = TEMPLATE
    if as_file:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        template = str(tmp_path / "template.jinja")
    seen = []

    def reward(prompts, completions, completion_ids, **_):
        seen.append(prompts)
        return [0.0] * len(prompts)

    config = GRPOConfig(
        model=model, dataset=[{"prompt": [{"role": "user", "content": "1+1"}]}],
        output_dir=str(tmp_path / "run"), max_steps=1, chat_template=template,
        chat_template_kwargs='{"loud": true}', log_completions=0, **SAMPLING,
    )  # fmt: skip
    result = train_grpo(config, reward_funcs=reward)
    saved = AutoTokenizer.from_pretrained(result.output_dir)
    assert saved.chat_template == TEMPLATE
    tokenizer = loading.load_tokenizer(model, **config.reading)
    from rlcore.data.chat import prompt_text

    assert prompt_text(tokenizer, seen[0][0]) == "<u>1+1!<a>"


def test_eval_and_chat_load_the_same_way(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = {"dtype": "bfloat16", "max_completion_length": 2, "chat_template": TEMPLATE}
    evaluate_models(
        EvalConfig(model=[model], dataset=str(tmp_path / "rows.jsonl"),
                   reward=["test_load_options:length"], **options)
    )  # fmt: skip
    chat(ChatConfig(model=model, system="hi", temperature=0, **options), iter(["1+1"]))
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "bf16"}, "unknown dtype 'bf16'.*bfloat16"),
        ({"attn_implementation": "fast"}, "cannot load a model.*fast"),
        ({"chat_template": "no_such.jinja"}, "neither a file .* nor a template"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs is not JSON"),
        ({"chat_template_kwargs": "[1]"}, "must be a JSON object"),
    ],
)
def test_what_cannot_be_loaded_so_is_answered(model, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train_sft(SFTConfig(model=model, dataset=ROWS, output_dir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
