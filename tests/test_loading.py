"""Models come whole or not at all: no weight of a run is one that was drawn while loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from rlcore.errors import UserError
from rlcore.models.adapters import ADAPTER_WEIGHTS, add_lora
from rlcore.models.loading import load_classifier, load_policy, load_reference, load_tokenizer
from rlcore.models.reward_model import RewardModel
from rlcore.models.value_model import load_value_model

WEIGHTS = "model.safetensors"


def save_classifier(directory: Path, **changes) -> str:
    """A reward model with its tokenizer, its score drawn from a fixed seed."""
    base = save_tiny(directory.with_name(f"{directory.name}-base"), "llama", **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = load_classifier(base, new_head="random")
    classifier.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def edit(path: Path, change) -> None:
    """Write the tensors of a safetensors file anew as `change` gives them."""
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_reward(path: str) -> None:
    RewardModel(path).prepare(tiny_tokenizer(), torch.device("cpu"))


def as_value(path: str) -> torch.nn.Module:
    return load_value_model(path, tiny_tokenizer())


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification.*lacks score\.weight"):
        as_reward(save_tiny(tmp_path, "llama"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("load", [load_policy, load_reference])
def test_a_reward_model_is_no_policy(tmp_path, load, tied):
    path = save_classifier(tmp_path / "rm", tie_word_embeddings=tied)
    with pytest.raises(UserError, match="rm' is a reward or value model"):
        load(path)


def without_layer(weights: dict) -> dict:
    return {name: w for name, w in weights.items() if ".layers.1." not in name}


def narrower(weights: dict) -> dict:
    name = "model.layers.0.mlp.up_proj.weight"
    return weights | {name: weights[name][:-8].clone()}


@pytest.mark.parametrize(
    "change, message",
    [
        (without_layer, r"lacks model\.layers\.1\.input_layernorm\.weight, .* and 6 more"),
        (narrower, r"lacks model\.layers\.0\.mlp\.up_proj\.weight \(\(40, 32\), not \(48, 32\)\)"),
    ],
)
def test_a_weight_that_is_missing_or_of_another_shape_is_named_whoever_loads(
    tmp_path, change, message
):
    path = save_tiny(tmp_path / "lm", "llama", tie_word_embeddings=False)
    scores = save_classifier(tmp_path / "rm")
    for directory in (path, scores):
        edit(Path(directory) / WEIGHTS, change)
    for load in (load_policy, load_reference, as_value):
        with pytest.raises(UserError, match=f"'{path}' does not hold all.*{message}"):
            load(path)
    for load in (as_reward, as_value):
        with pytest.raises(UserError, match=f"'{scores}' does not hold all.*{message}"):
            load(scores)


def test_an_untied_head_that_is_missing_is_named_and_a_tied_one_is_not(tmp_path):
    tied = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(Path(tied) / WEIGHTS)
    load_policy(tied)
    path = save_tiny(tmp_path / "lm", "llama", tie_word_embeddings=False)
    edit(Path(path) / WEIGHTS, lambda w: {n: v for n, v in w.items() if n != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load_policy(path)


def test_weights_that_nobody_uses_are_counted_on_one_line(tmp_path, caplog):
    path = save_tiny(tmp_path, "llama", tie_word_embeddings=False)
    edit(tmp_path / WEIGHTS, lambda w: w | {"vision.b": torch.ones(2), "vision.a": torch.ones(2)})
    load_policy(path)
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == "rlcore.models.loading"
    ]
    assert "2 weights" in line and "vision.a" in line and path in line


def small(kind: str, **changes):
    """A random model of that configuration class, as freshly initialised."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, d_model=32, num_hidden_layers=1,
        decoder_layers=1, num_attention_heads=4, decoder_attention_heads=4, intermediate_size=48,
        decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "XLM"])
def test_a_model_that_is_not_causal_is_refused_before_anything_trains(tmp_path, kind):
    small(kind).save_pretrained(tmp_path)
    for load in (load_policy, load_reference):
        with pytest.raises(UserError, match=f"'{tmp_path}' .*not causal.*{kind}"):
            load(str(tmp_path))


def test_bert_as_a_decoder_is_causal(tmp_path):
    small("Bert", is_decoder=True).save_pretrained(tmp_path)
    load_policy(str(tmp_path))


@pytest.mark.parametrize("kind", ["Bart", "Roberta"])
def test_a_model_whose_positions_count_padding_is_refused(tmp_path, kind):
    small(kind, is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"padding on the left changes the logits of a {kind}"):
        load_policy(str(tmp_path))


def test_a_new_head_is_random_or_zero_as_asked_and_a_trained_one_stays(tmp_path):
    base = save_tiny(tmp_path / "lm", "llama")
    assert load_classifier(base, new_head="random").score.weight.abs().min() > 0
    assert not load_classifier(base, new_head="zero").score.weight.any()
    trained = save_classifier(tmp_path / "rm")
    want = load_file(Path(trained) / WEIGHTS)["score.weight"]
    for new_head in ("random", "zero", None):
        assert torch.equal(load_classifier(trained, new_head=new_head).score.weight, want)


def test_a_head_of_several_labels_is_not_replaced_by_a_new_one(tmp_path):
    path = save_classifier(tmp_path / "rm")
    edit(
        tmp_path / "rm" / WEIGHTS,
        lambda w: w | {"score.weight": w["score.weight"].repeat(2, 1)},
    )
    for load in (as_value, as_reward):
        with pytest.raises(UserError, match=r"score\.weight \(\(2, 32\), not \(1, 32\)\)"):
            load(path)


def save_adapter(directory: Path, model) -> str:
    add_lora(model, r=2, alpha=4)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_an_adapter_is_held_to_the_same(tmp_path):
    base = save_tiny(tmp_path / "lm", "llama")
    policy = save_adapter(tmp_path / "policy", load_policy(base))
    reward = save_adapter(tmp_path / "reward", load_classifier(base, new_head="random"))
    load_policy(policy)
    as_reward(reward)
    as_value(policy)
    with pytest.raises(UserError, match="reward' is a reward or value model"):
        load_policy(reward)
    with pytest.raises(UserError, match=r"policy' .*lacks score\.weight"):
        as_reward(policy)
    weight = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    edit(
        tmp_path / "policy" / ADAPTER_WEIGHTS,
        lambda w: {name: value for name, value in w.items() if name != weight},
    )
    with pytest.raises(UserError, match=r"policy' .*lacks .*up_proj\.lora_B"):
        load_policy(policy)
    edit(Path(base) / WEIGHTS, without_layer)
    with pytest.raises(UserError, match=r"reward' .*lacks model\.layers\.1\."):
        as_reward(reward)


def test_what_another_library_says_is_shown_whole(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"backend tokenizer from one of: \(1\) .* \(3\)") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(ran)!r}, 'w')\n"
        "class Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    # nor does anybody at the terminal get asked
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_policy, load_classifier, load_tokenizer):
        with pytest.raises(UserError, match="cannot load"):
            load(str(tmp_path))
    assert not ran.exists()
