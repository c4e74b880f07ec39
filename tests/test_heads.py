"""Losses past the logits are the losses through them, for every kind of architecture."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from rlcore.demo.arithmetic import make_task
from rlcore.errors import UserError
from rlcore.models.heads import FusedHead, LogitsHead, choose_head
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.sft import SFTConfig, train_sft
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.order import mix_seed

KINDS = ("gpt2", "llama", "qwen2", "gemma2", "gemma3")


def a_batch(rows: int = 3, prompt: int = 4, completion: int = 5) -> Experience:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, prompt + completion)
    ids = torch.randint(len(tiny_tokenizer()), shape, generator=generator)
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    attention[1, -2:] = 0
    mask = attention[:, -completion:].bool()
    return Experience(ids, attention, mask, torch.randn(rows, generator=generator))


def loss_and_gradients(model, head, batch: Experience) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = head.policy_loss(model, batch, batch.advantage, entropy_coef=0.1, temperature=0.7).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_heads_give_the_same_loss_and_gradients(kind):
    model, batch = tiny_model(kind), a_batch()
    fused, reason = choose_head(model, fused=True)
    assert isinstance(fused, FusedHead), reason
    loss, gradients = loss_and_gradients(model, fused, batch)
    expected, expected_gradients = loss_and_gradients(model, LogitsHead(), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_both_heads_give_the_same_logprobs(kind):
    model, batch = tiny_model(kind), a_batch()
    fused, _ = choose_head(model, fused=True)
    with torch.no_grad():
        ours, theirs = (
            h.token_logprob(model, batch, temperature=0.7) for h in (fused, LogitsHead())
        )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


def test_the_softcap_of_gemma_is_read():
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    head, _ = choose_head(model, fused=True)
    assert head.softcap == 2.0


@pytest.mark.parametrize("kind, name", [("Cohere", "logit_scale"), ("Granite", "logits_scaling")])
def test_the_scale_of_cohere_and_granite_is_read(kind, name):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        **{name: 0.25},
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    head, reason = choose_head(model, fused=True)
    assert isinstance(head, FusedHead), reason
    assert head.logit_scale == {"logit_scale": 0.25, "logits_scaling": 4.0}[name]


def test_the_model_makes_its_logits_again_afterwards():
    model, batch = tiny_model(), a_batch()
    before = model(batch.input_ids).logits
    head, _ = choose_head(model, fused=True)
    head.token_logprob(model, batch)
    assert torch.equal(model(batch.input_ids).logits, before)


def test_an_unknown_step_after_the_head_is_noticed(monkeypatch):
    model = tiny_model()
    forward = type(model).forward

    def louder(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        outputs.logits = outputs.logits * 1.3
        return outputs

    monkeypatch.setattr(type(model), "forward", louder)
    head, reason = choose_head(model, fused=True)
    assert isinstance(head, LogitsHead)
    assert "more to its logits" in reason


def test_a_head_that_is_no_plain_linear_layer_is_left_alone():
    class Adapted(torch.nn.Linear):
        pass

    model = tiny_model()
    model.lm_head = Adapted(32, len(tiny_tokenizer()), bias=False)
    head, reason = choose_head(model, fused=True)
    assert isinstance(head, LogitsHead)
    assert "Adapted" in reason


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"), seed=0)


def curves(task, directory, fused_head: str) -> list[dict]:
    """The metrics of a few steps of SFT and then of GRPO."""
    seed = mix_seed(1) % 1000
    shared = {"fused_head": fused_head, "seed": seed, "learning_rate": 1e-3, "save_steps": 0}
    sft = train_sft(
        SFTConfig(
            model=str(task.model),
            dataset=str(task.sft),
            output_dir=str(directory / "sft"),
            max_steps=4,
            per_device_train_batch_size=8,
            **shared,
        )
    )
    grpo = train_grpo(
        GRPOConfig(
            model=str(sft.output_dir),
            dataset=str(task.train),
            reward=["arithmetic"],
            output_dir=str(directory / "grpo"),
            max_steps=4,
            per_device_train_batch_size=8,
            num_generations=4,
            num_iterations=2,
            beta=0.1,
            max_completion_length=6,
            entropy_coef=0.01,
            **shared,
        )
    )
    lines = []
    for run in (sft, grpo):
        lines += map(json.loads, (run.output_dir / "metrics.jsonl").read_text().splitlines())
    return lines


def test_trainers_give_the_same_curve_with_either_head(task, tmp_path):
    fused, plain = (curves(task, tmp_path / value, value) for value in ("on", "off"))
    assert len(fused) == len(plain) == 8
    for mine, other in zip(fused, plain, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "reward"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


def test_an_unknown_choice_of_head_is_refused(task, tmp_path):
    config = SFTConfig(
        model=str(task.model), dataset=str(task.sft), output_dir=str(tmp_path), fused_head="yes"
    )
    with pytest.raises(UserError, match=r"fused_head.*on"):
        train_sft(config)
