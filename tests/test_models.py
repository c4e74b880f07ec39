"""Loading models, and the logits of a completion."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import tiny_architecture
from helpers.tiny import PROMPTS, save_tiny, tiny_model, tiny_tokenizer

from rlcore.data.encoding import Example, collate
from rlcore.errors import UserError
from rlcore.models import forward
from rlcore.models.dropout import disable_dropout
from rlcore.models.forward import completion_logits, position_ids
from rlcore.models.loading import load_policy, load_reference, load_tokenizer

KINDS = ["gpt2", "llama", "qwen2", "gemma2", "gemma3"]


def test_positions_count_attended_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def examples() -> list[Example]:
    ids = [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    return [Example(prompt, ids[0][: 2 + 3 * n]) for n, prompt in enumerate(ids)]


def alone(model, example: Example) -> torch.Tensor:
    """The completion's logits of one unpadded row, by a plain forward pass."""
    ids = torch.tensor([example.prompt + example.completion])
    return model(ids).logits[0, len(example.prompt) - 1 : -1]


def worst_difference(model) -> float:
    """Between padded rows in a batch and the same rows alone."""
    batch = collate(examples(), tiny_tokenizer().pad_token_id)
    length = batch.mask.shape[1]
    logits = completion_logits(model, batch.input_ids, batch.attention_mask, length)
    assert logits.shape == (len(PROMPTS), length, len(tiny_tokenizer()))
    pairs = zip(logits, examples(), strict=True)
    return max(
        (row[: len(example.completion)] - alone(model, example)).abs().max().item()
        for row, example in pairs
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_a_completions_logits(kind):
    assert worst_difference(tiny_model(kind)) < 1e-4


@torch.no_grad()
def test_without_position_ids_padding_would_change_them(monkeypatch):
    monkeypatch.setattr(forward, "position_ids", lambda mask: torch.arange(mask.shape[1])[None])
    assert worst_difference(tiny_model("gpt2")) > 0.1


class Plain(torch.nn.Module):
    """A model whose forward takes neither positions nor logits_to_keep."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, use_cache):
        return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@torch.no_grad()
def test_a_model_without_logits_to_keep_gives_the_same_logits():
    # rotary positions are relative, so that left padding does not matter to them
    model = tiny_model("llama")
    batch = collate(examples(), tiny_tokenizer().pad_token_id)
    arguments = (batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    whole, plain = completion_logits(model, *arguments), completion_logits(Plain(model), *arguments)
    assert (whole - plain)[batch.mask].abs().max() < 1e-4


@pytest.mark.parametrize("length", [0, 3])
def test_a_completion_must_leave_a_prompt(length):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="completion_length"):
        completion_logits(tiny_model(), ids, torch.ones_like(ids), length)


def test_only_completion_positions_pass_through_the_head():
    model, widths = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: widths.append(output.shape[1]))
    ids = torch.full((2, 9), 7)
    completion_logits(model, ids, torch.ones_like(ids), 4)
    assert widths == [4]


def test_a_reference_is_frozen_and_has_no_dropout(tmp_path):
    reference = load_reference(save_tiny(tmp_path, "gpt2"))
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize(
    "kind, changes",
    [("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5}), ("llama", {"attention_dropout": 0.5})],
)
def test_dropout_can_be_switched_off_in_training_mode(tmp_path, kind, changes):
    path = save_tiny(tmp_path, kind, **changes)
    ids = torch.full((1, 9), 7)
    noisy, quiet = load_policy(path), load_policy(path, dropout=False)
    assert noisy.training and quiet.training
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Bloom", "OPT", "BioGpt", "GPTNeoX", "XGLM", "Phimoe"])
def test_no_architecture_draws_dropout_once_it_is_switched_off(kind):
    def made(**rates):
        return tiny_architecture(kind, **rates).train()

    plain = made()
    rates = {
        name: 0.5
        for name, value in plain.config.to_dict().items()
        if ("drop" in name or "jitter" in name) and type(value) in (int, float)
    }
    ids = torch.arange(3, 12)[None]
    noisy, quiet = made(**rates), made(**rates)
    # a dropped layer may be the same one a few times
    assert len({float(noisy(ids).logits.double().sum()) for _ in range(8)}) > 1
    disable_dropout(quiet)
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)
    torch.testing.assert_close(quiet(ids).logits, plain.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_goes_on_drawing_dropout_is_refused_where_ratios_are_taken(tmp_path):
    # Falcon reads its rates in each forward pass
    tiny_architecture("Falcon", hidden_dropout=0.5).save_pretrained(tmp_path)
    load_policy(str(tmp_path))
    with pytest.raises(UserError, match=r"dropout of a FalconForCausalLM.*set hidden_dropout to 0"):
        load_policy(str(tmp_path), dropout=False)


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path):
    path, ids = save_tiny(tmp_path), torch.full((2, 9), 7)
    gradients = []
    for checkpointing in (False, True):
        model = load_policy(path, gradient_checkpointing=checkpointing)
        layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        assert any(layer.gradient_checkpointing for layer in layers) is checkpointing
        completion_logits(model, ids, torch.ones_like(ids), 4).square().sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    tokenizer = type(tiny_tokenizer())(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert loaded.padding_side == "left"


@pytest.mark.parametrize("load", [load_tokenizer, load_policy, load_reference])
def test_a_directory_that_is_not_there_is_named(load, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match=f"{missing}.*no such directory"):
        load(missing)


@pytest.mark.parametrize("load", [load_tokenizer, load_policy])
def test_a_directory_without_a_model_is_one_clear_error(load, tmp_path):
    with pytest.raises(UserError, match=f"cannot load a .* from '{tmp_path}': .*no config.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, load_policy])
def test_a_file_in_the_place_of_a_model_is_called_a_file(load, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"rows.jsonl': it is a file, not a model's directory"):
        load(str(tmp_path / "rows.jsonl"))


def test_a_mistyped_directory_is_not_told_as_a_fault_of_the_network_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'runs/stf': there is no such directory.*hub"):
        load_tokenizer("runs/stf")


def test_a_damaged_weight_file_is_one_clear_error(tmp_path):
    path = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(UserError, match="cannot load a model"):
        load_policy(path)
