"""LoRA: an adapter trains, is saved, loads, merges, and switched off it is the reference."""

import dataclasses
import json

import pytest
import torch
from helpers.architectures import MIXTURES, tiny_architecture
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

from rlcore.cli import main
from rlcore.errors import UserError
from rlcore.models.adapters import (
    ADAPTER_CONFIG,
    adapter_off,
    add_lora,
    has_adapter,
    is_adapter,
    merge_adapter,
)
from rlcore.models.loading import load_classifier, load_policy, load_tokenizer
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.sft import SFTConfig, train_sft

IDS = torch.tensor([[5, 9, 30, 12, 7, 41]])
KINDS = ["qwen2", "llama", "gpt2", "gemma2"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(model):
    """The model with its adapter away from the zero that it starts at."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_and_merged_an_adapter_leaves_the_base_and_the_adapted_model(kind):
    base = logits(tiny_model(kind))
    model = tiny_model(kind)
    add_lora(model, r=4, alpha=8)
    assert torch.equal(logits(model), base)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    adapted = logits(moved(model))
    assert (adapted - base).abs().max() > 0.01
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    merged = merge_adapter(model)
    assert not has_adapter(merged)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(tiny_model(kind).state_dict())


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_adapter_on_every_layer_of_a_mixture_of_experts_switches_off_loads_and_merges(
    tmp_path, kind
):
    plain = tiny_architecture(kind)
    plain.save_pretrained(tmp_path / "model")
    base, model = logits(plain), load_policy(str(tmp_path / "model"))
    add_lora(model, r=2, alpha=4)
    adapted = logits(moved(model))
    assert (adapted - base).abs().max() > 0.01
    with adapter_off(model):
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(str(tmp_path / "adapter"))
    merged = merge_adapter(model)
    for each in (merged, loaded):
        torch.testing.assert_close(logits(each), adapted, rtol=1e-3, atol=1e-3)
        assert set(each.state_dict()) == set(plain.state_dict())


def test_a_weight_that_layers_have_in_common_gets_no_adapter():
    # what is added for the head would be added to the embedding as well
    tied = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head cannot be merged"):
        add_lora(tied, r=2, alpha=4, target_modules=("q_proj", "lm_head"))
    # Zamba's attention is one block that stands in several places, with weights of its own beside
    model = tiny_architecture(
        "Zamba", num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
        attention_head_dim=16, n_mamba_heads=2, mamba_dt_rank=8,
    )  # fmt: skip
    add_lora(model, r=2, alpha=4)
    adapted = logits(with_gradients_moved(model))
    torch.testing.assert_close(logits(merge_adapter(model)), adapted, rtol=1e-3, atol=1e-3)


def with_gradients_moved(model):
    """The model with those weights of its adapter changed that its output depends on."""
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    generator = torch.Generator().manual_seed(0)
    moving = [p for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    assert moving
    for parameter in moving:
        step = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data += step * (parameter.grad != 0)
    return model


def test_an_adapter_finds_its_model_from_another_folder(tmp_path, monkeypatch, capsys):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    save_tiny(there / "runs" / "start")
    # a model of the same name where the adapter is loaded, and another way up
    save_tiny(elsewhere / "runs" / "start", seed=1)
    monkeypatch.chdir(there)
    model = load_policy("runs/start")
    add_lora(model, r=2, alpha=4)
    adapted = logits(moved(model))
    adapter = there / "runs" / "lora"
    model.save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(there / "runs" / "start")
    monkeypatch.chdir(elsewhere)
    # as written from here on, as written before, and as seen from there
    for written, name in [
        (str(there / "runs" / "start"), str(adapter)),
        ("runs/start", str(adapter)),
        ("runs/start", "../there/runs/lora"),
    ]:
        config["base_model_name_or_path"] = written
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
        torch.testing.assert_close(logits(load_policy(name)), adapted, rtol=1e-4, atol=1e-4)
    assert main(["merge", "--adapter", "../there/runs/lora", "--output-dir", "whole"]) == 0
    torch.testing.assert_close(logits(load_policy("whole")), adapted, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_model_is_gone_says_so(tmp_path):
    model = load_policy(save_tiny(tmp_path / "model"))
    add_lora(model, r=2, alpha=4)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"adapter in '.*adapter' .* no model at '.*/model'"):
        load_policy(str(tmp_path / "adapter"))


def test_a_classifiers_adapter_brings_its_head_along_and_merges(tmp_path):
    base = save_tiny(tmp_path / "model", "llama")
    model = load_classifier(base, new_head="random")
    add_lora(model, r=4, alpha=8)
    adapted = logits(moved(model))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    whole = tmp_path / "whole"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output-dir", str(whole)]) == 0
    assert not is_adapter(whole)
    torch.testing.assert_close(logits(load_classifier(str(whole))), adapted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sft_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.jsonl"
    rows = [
        {"prompt": f"Ben has {n} pears.", "completion": f" {n}+1={n + 1}", "answer": str(n + 1)}
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_config(directory, rows, **changes):
    model = directory / "model"
    if not model.exists():
        save_tiny(model, "qwen2")
    options = dict(
        model=str(model),
        dataset=rows,
        output_dir=str(directory / "out"),
        save_steps=0,
        peft="lora",
        lora_r=4,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
    )
    return SFTConfig(**(options | changes))


def test_an_adapter_is_saved_alone_loads_as_a_model_and_merges(tmp_path, sft_rows, capsys):
    config = sft_config(tmp_path, sft_rows)
    result = train_sft(config)
    assert is_adapter(result.output_dir)
    assert not (result.output_dir / "model.safetensors").exists()
    base, adapted = logits(load_policy(config.model)), logits(result.model)
    assert (adapted - base).abs().max() > 0.01
    reloaded = load_policy(str(result.output_dir))
    torch.testing.assert_close(logits(reloaded), adapted, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in reloaded.parameters())
    whole = tmp_path / "whole"
    assert main(["merge", "--adapter", config.output_dir, "--output-dir", str(whole)]) == 0
    assert "whole" in capsys.readouterr().out.replace("\n", "")
    assert torch.equal(logits(load_policy(str(whole))), logits(reloaded))
    assert (whole / "model.safetensors").exists() and not is_adapter(whole)
    assert main(["merge", "--adapter", config.output_dir, "--output-dir", str(whole)]) == 2
    assert main(["merge", "--adapter", str(whole), "--output-dir", str(tmp_path / "again")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_a_run_with_an_adapter_resumes_exactly_from_a_checkpoint_without_frozen_weights(
    tmp_path, sft_rows
):
    whole = train_sft(sft_config(tmp_path, sft_rows, save_steps=2))
    checkpoint = whole.output_dir / "checkpoint-2"
    assert is_adapter(checkpoint) and not (checkpoint / "model.safetensors").exists()
    torch.testing.assert_close(
        logits(load_policy(str(whole.output_dir / "checkpoint-4"))), logits(whole.model)
    )
    for path in sorted((whole.output_dir / "checkpoint-4").iterdir()):
        path.unlink()
    resumed = train_sft(sft_config(tmp_path, sft_rows, save_steps=2, resume=True))
    assert torch.equal(logits(resumed.model), logits(whole.model))


def grpo_config(directory, rows, **changes):
    model = directory / "model"
    if not model.exists():
        save_tiny(model, "qwen2")
    options = dict(
        model=str(model),
        dataset=rows,
        output_dir=str(directory / "grpo"),
        save_steps=0,
        reward=["arithmetic"],
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=1e-2,
        beta=0.1,
    )
    return GRPOConfig(**(options | changes))


def length_reward(prompts, completions, **_):
    return [float(len(completion)) for completion in completions]


def test_the_reference_of_an_adapter_is_the_model_with_the_adapter_off(tmp_path, sft_rows):
    with_model = grpo_config(tmp_path, sft_rows, peft="lora", ref_model=str(tmp_path / "model"))
    without = dataclasses.replace(with_model, ref_model=None, output_dir=str(tmp_path / "off"))
    results = [train_grpo(config, reward_funcs=[length_reward]) for config in (with_model, without)]
    first, second = (result.metrics for result in results)
    assert first["kl"] > 1e-4
    assert first["kl"] == pytest.approx(second["kl"], rel=1e-4)
    torch.testing.assert_close(logits(results[0].model), logits(results[1].model))


def test_an_adapted_head_is_trained_through_its_logits(tmp_path, sft_rows):
    config = grpo_config(
        tmp_path, sft_rows, peft="lora", lora_target_modules=["q_proj", "lm_head"], max_steps=1
    )
    save_tiny(tmp_path / "untied", "qwen2", tie_word_embeddings=False)
    config.model = str(tmp_path / "untied")
    result = train_grpo(config, reward_funcs=[length_reward])
    assert is_adapter(result.output_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": "lore"}, "lora"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"lora_target_modules": []}, "lora_target_modules is empty"),
        ({"lora_target_modules": ["no_such"]}, "lora_target_modules no_such"),
    ],
)
def test_options_of_adapters_are_checked(tmp_path, sft_rows, changes, message):
    with pytest.raises(UserError, match=message):
        train_sft(sft_config(tmp_path, sft_rows, **changes))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.safetensors"))


def test_dropout_in_an_adapter_is_refused_where_ratios_are_taken(tmp_path, sft_rows):
    config = grpo_config(tmp_path, sft_rows, peft="lora", lora_dropout=0.1)
    with pytest.raises(UserError, match="lora_dropout"):
        train_grpo(config)


def test_an_adapter_on_an_adapter_is_refused(tmp_path, sft_rows):
    first = train_sft(sft_config(tmp_path, sft_rows, max_steps=1))
    second = sft_config(
        tmp_path, sft_rows, model=str(first.output_dir), output_dir=str(tmp_path / "second")
    )
    with pytest.raises(UserError, match="rlcore merge"):
        train_sft(second)


def test_without_peft_the_error_says_what_to_install(tmp_path, sft_rows, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="rlcore\\[peft\\]"):
        train_sft(sft_config(tmp_path, sft_rows))


def test_the_tokenizer_lies_beside_the_adapter(tmp_path, sft_rows):
    result = train_sft(sft_config(tmp_path, sft_rows, max_steps=1))
    assert load_tokenizer(str(result.output_dir)).get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapters_first_weights_depend_on_the_seed_alone():
    def first(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        torch.manual_seed(0)
        torch.rand(drawn)
        before = torch.get_rng_state()
        add_lora(model, r=4, alpha=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    one, same, other = first(3, 1), first(3, 2), first(4, 1)
    assert one and all(torch.equal(weight, same[name]) for name, weight in one.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in one.items())
