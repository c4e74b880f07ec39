"""Adapters on frozen weights in 4 bit (QLoRA): refused without what it takes; the rest needs
bitsandbytes, and compares with the weights that 4 bit stand for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import sys

import pytest
import torch
from helpers.tiny import save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlcore.cli import main
from rlcore.demo.arithmetic import make_problem, triples
from rlcore.errors import UserError
from rlcore.models.loading import load_policy
from rlcore.runs.run_record import read_record
from rlcore.trainers import (
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

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# as wide as a block of 4-bit weights
WIDE = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.05}
SAME = {
    "qwen2": {},
    "llama": {"head_dim": 16},
    "gpt2": {"n_embd": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


@pytest.fixture
def options(tmp_path):
    rng = random.Random(0)
    problems = [make_problem(rng, triples()) for _ in range(6)]
    rows = [{"prompt": row["prompt"], "completion": row["working"][:12]} for row in problems]
    rows = [row | {"chosen": row["completion"], "rejected": "cards", "label": True} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": save_tiny(tmp_path / "model", **WIDE),
        "dataset": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "save_steps": 0,
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "peft": "lora",
        "load_in_4bit": True,
    }


def test_without_an_adapter_it_is_refused(options, tmp_path):
    with pytest.raises(UserError, match=r"load_in_4bit freezes the weights.*--peft lora"):
        train_sft(SFTConfig(**options | {"peft": None}))
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_it_says_what_to_install(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'rlcore\[quantization\]'"):
        train_sft(SFTConfig(**options))


@needs_bitsandbytes
def test_servers_cannot_be_given_its_weights(options):
    sampled = {"sampler": "vllm", "sampler_url": ["http://localhost:1"], "reward": ["exact_match"]}
    options = {k: v for k, v in options.items() if k != "per_device_train_batch_size"}
    with pytest.raises(UserError, match=r"load_in_4bit.*sampler"):
        train_grpo(GRPOConfig(**options | sampled))


@needs_bitsandbytes
def test_a_given_model_must_be_what_the_option_says(options):
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    given = {"model": model, "tokenizer": tiny_tokenizer()}
    options = options | {"model": None}
    with pytest.raises(UserError, match="load_in_4bit is set, but the model that was given"):
        train_sft(SFTConfig(**options), **given)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    given["model"] = AutoModelForCausalLM.from_pretrained(
        model.name_or_path, dtype=torch.float32, quantization_config=how
    )
    with pytest.raises(UserError, match="model is quantized"):
        train_sft(SFTConfig(**options | {"load_in_4bit": False}), **given)
    # evaluated, as a caller's may have been
    with torch.no_grad():
        given["model"].eval()(torch.arange(2, 9)[None])
    results = [train_sft(SFTConfig(**options), **given)]
    named = {"model": model.name_or_path, "output_dir": f"{options['output_dir']}-named"}
    results.append(train_sft(SFTConfig(**options | named)))
    # some CPUs round the blocks' scales as they evaluate
    for name in ("loss", "grad_norm"):
        assert results[0].metrics[name] == pytest.approx(results[1].metrics[name], rel=2e-2)


@needs_bitsandbytes
def test_a_checkpoint_that_is_quantized_already_is_refused(options, tmp_path):
    in_4bit(options["model"]).save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    with pytest.raises(UserError, match="is quantized already"):
        train_sft(SFTConfig(**options | {"model": str(tmp_path / "quantized")}))


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_model_is_told_as_without_it(tmp_path, monkeypatch, there):
    monkeypatch.setattr("rlcore.models.quantized.require_bitsandbytes", lambda: None)
    name = tmp_path / "model"
    if there:
        name.mkdir()
    said = []
    for four_bit in (None, "auto"):
        with pytest.raises(UserError) as raised:
            load_policy(str(name), four_bit=four_bit)
        said.append(str(raised.value))
    assert said[0] == said[1]


def in_4bit(name):
    return load_policy(name, four_bit="auto")


def dequantized(model):
    """A float32 copy of what the weights in 4 bit stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    for name, parameter in model.named_parameters():
        value = parameter.data
        if value.dtype == torch.uint8:
            value = dequantize_4bit(value, parameter.quant_state)
            # GPT-2's layers hold theirs the other way round
            value = value.T if "gpt2" in type(model).__module__ else value
        plain.get_parameter(name).data.copy_(value)
    return plain


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_adapter_trains_as_on_the_weights_that_4_bit_stand_for(
    options, tmp_path, kind, gradient_checkpointing
):
    options["model"] = save_tiny(tmp_path / kind, kind, **WIDE | SAME[kind])
    options["gradient_checkpointing"] = gradient_checkpointing
    small = in_4bit(options["model"])
    layers = 2 * (4 if kind == "gpt2" else 7)
    assert sum(p.dtype == torch.uint8 for p in small.parameters()) == layers
    plain = dequantized(small)
    given = AutoModelForCausalLM.from_pretrained(options["model"])
    name = next(n for n, p in small.named_parameters() if p.dtype == torch.uint8)
    before, after = (each.get_parameter(name).data for each in (given, plain))
    assert 0.01 < (after - before).norm() / before.norm() < 0.2
    plain.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    result = train_sft(SFTConfig(**options))
    other = {"model": str(tmp_path / "plain"), "output_dir": str(tmp_path / "other")}
    wanted = train_sft(SFTConfig(**options | other | {"load_in_4bit": False}))
    assert result.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-4)
    assert result.metrics["grad_norm"] == pytest.approx(wanted.metrics["grad_norm"], rel=1e-3)
    adapters = [load_file(r.output_dir / "adapter_model.safetensors") for r in (result, wanted)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], rtol=1e-2, atol=2e-4)


@needs_bitsandbytes
def test_what_is_saved_loads_and_merges_with_the_whole_base(options, tmp_path):
    result = train_sft(SFTConfig(**options))
    assert not (result.output_dir / "model.safetensors").exists()
    main(["merge", "--adapter", str(result.output_dir), "--output-dir", str(tmp_path / "whole")])
    loaded, merged = load_policy(str(result.output_dir)), load_policy(str(tmp_path / "whole"))
    base = AutoModelForCausalLM.from_pretrained(options["model"]).state_dict()
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    wanted = base[f"{name}.weight"] + 2.0 * b @ a
    assert (b @ a).abs().max() > 1e-4
    for model in (loaded, merged):
        torch.testing.assert_close(model.state_dict()[f"{name}.weight"], wanted)
        assert not getattr(model, "is_quantized", False)


@needs_bitsandbytes
def test_a_resumed_run_ends_where_an_unbroken_one_does(options, tmp_path):
    whole = train_sft(SFTConfig(**options | {"max_steps": 4, "lr_scheduler_type": "constant"}))
    halves = SFTConfig(
        **options | {"output_dir": str(tmp_path / "halves"), "save_steps": 2},
        lr_scheduler_type="constant",
    )
    train_sft(halves)
    resumed = train_sft(dataclasses.replace(halves, max_steps=4, resume=True))
    one, two = (load_file(r.output_dir / "adapter_model.safetensors") for r in (whole, resumed))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def score(prompts, completions, **columns):
    return [float(len(text) % 3) for text in completions]


TRAINERS = {
    "dpo": (DPOConfig, train_dpo, {}),
    "kto": (KTOConfig, train_kto, {}),
    "reward": (RewardModelConfig, train_reward_model, {}),
    "grpo": (GRPOConfig, train_grpo, {"num_generations": 2, "beta": 0.1}),
    "pg": (PGConfig, train_pg, {}),
    "ppo": (PPOConfig, train_ppo, {}),
    "trpo": (TRPOConfig, train_trpo, {"num_generations": 2}),
}


@needs_bitsandbytes
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_trains_an_adapter_on_it(options, name, bf16):
    kind, train, changes = TRAINERS[name]
    changes = changes | {"bf16": bf16}
    given = {} if name in ("dpo", "kto", "reward") else {"reward_funcs": score}
    if given:
        changes |= {"max_completion_length": 4}
    if name == "trpo":
        options = {key: value for key, value in options.items() if key != "learning_rate"}
    result = train(kind(**options | changes), **given)
    if name != "reward":
        whole = AutoModelForCausalLM.from_pretrained(options["model"]).num_parameters()
        trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
        assert read_record(result.output_dir).facts["parameters"] == whole + trained
    quantized = [p for p in result.model.parameters() if p.dtype == torch.uint8]
    assert quantized and not any(p.requires_grad for p in quantized)
    compute = {m.compute_dtype for m in result.model.modules() if hasattr(m, "compute_dtype")}
    assert compute - {None} == {torch.bfloat16 if bf16 else torch.float32}
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert result.metrics["step"] == 2
