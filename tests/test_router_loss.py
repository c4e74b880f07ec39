"""The load-balancing loss of experts: beside each trainer's loss, refused where there is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.architectures import MIXTURES, tiny_architecture
from helpers.tiny import most_of, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlcore.errors import UserError
from rlcore.models.router_loss import RouterLoss
from rlcore.runs.tracking import read_metrics
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

ADAMW_STEP = torch.optim.AdamW.step
ROWS = [("9 pears", "17 and 25"), ("Ana has 5", "7"), ("8", "12 coins and 8 more"), ("7 + 8", "1")]


def save_mixture(directory, kind):
    tiny_architecture(kind, initializer_range=0.05).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def options(tmp_path):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS]
    pairs = {"rejected": "cards?", "label": True}
    rows = [row | {"chosen": row["completion"]} | pairs for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": save_mixture(tmp_path / "model", "Mixtral"),
        "dataset": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "save_steps": 0,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "router_aux_loss_coef": 0.5,
    }


def balance(logits, top_k):
    """Experts x sum over experts of (share of choices) x (mean probability), float64.

    All layers' tokens are counted together (Switch Transformers, arXiv:2101.03961, equation 4).
    """
    probability = torch.cat(logits).softmax(-1)
    count = probability.shape[-1]
    chosen = torch.zeros_like(probability).scatter(1, probability.topk(top_k).indices, 1.0)
    return count * (chosen.mean(0) * probability.mean(0)).sum()


def reference(config, sequences, fed):
    """Loss of completions, load-balancing loss of the tokens that are fed, gradients of both."""
    model = AutoModelForCausalLM.from_pretrained(config.model, experts_implementation="eager")
    model.double()
    logits, losses = [], []
    for (prompt, completion), length in zip(sequences, fed, strict=True):
        ids = torch.tensor([prompt + completion])
        outputs = model(ids, output_router_logits=True)
        logits += [each.view(ids.shape[1], -1)[:length] for each in outputs.router_logits]
        predicted = outputs.logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(completion)
        losses.append(torch.nn.functional.cross_entropy(predicted, target, reduction="none"))
    loss, aux = torch.cat(losses).mean(), balance(logits, 2)
    (loss + config.router_aux_loss_coef * aux).backward()
    return loss.item(), aux.item(), [parameter.grad for parameter in model.parameters()]


# of Qwen3Next linear attention sees from one sequence of a row into the next
@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind != "Qwen3Next"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fused_head": "off"},
        {"padding_free": True},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_sft_adds_the_load_balancing_loss_and_its_gradient(
    options, monkeypatch, tmp_path, kind, changes
):
    model = save_mixture(tmp_path / kind, kind)
    config = SFTConfig(**options | changes | {"model": model})
    tokenizer = tiny_tokenizer()
    sequences = [
        (tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        for prompt, answer in ROWS
    ]
    longest = max(len(answer) for _, answer in sequences)
    # the last column of a batch, or each sequence's last token, predicts nothing and is not fed
    fed = [
        len(prompt + answer) - (config.padding_free or len(answer) == longest)
        for prompt, answer in sequences
    ]
    loss, aux, gradients = reference(config, sequences, fed)
    taken = []

    def spy(self, *args, **kwargs):
        taken.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
        return ADAMW_STEP(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    result = train_sft(config)
    assert result.metrics["aux_loss"] == pytest.approx(aux, rel=1e-4)
    assert result.metrics["loss"] == pytest.approx(loss + 0.5 * aux, rel=1e-4)
    matrices = [grad for grad in gradients if grad.dim() >= 2]
    for found, want in zip(
        taken, matrices + [grad for grad in gradients if grad.dim() < 2], strict=True
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-5)


def test_micro_batches_and_evaluation(options):
    """A step has the mean of its micro-batches' balances; held-out losses are without it."""
    config = SFTConfig(
        **options | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        eval_dataset=most_of(options["dataset"]),
        learning_rate=1e-12,
    )
    with_it = train_sft(config)
    without = train_sft(
        dataclasses.replace(config, router_aux_loss_coef=0.0, overwrite_output_dir=True)
    )
    assert "aux_loss" not in without.metrics
    assert with_it.metrics["eval/loss"] == pytest.approx(without.metrics["eval/loss"], rel=1e-6)
    expected = without.metrics["loss"] + 0.5 * with_it.metrics["aux_loss"]
    assert with_it.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    # as balanced as can be is 2 choices of 4 experts, and a 4th of the probability each
    assert 1.9 < with_it.metrics["aux_loss"] < 4.0


TRAINERS = {
    "dpo": (DPOConfig, train_dpo, {}),
    "dpo without padding": (DPOConfig, train_dpo, {"padding_free": True}),
    "kto": (KTOConfig, train_kto, {}),
    "reward": (RewardModelConfig, train_reward_model, {}),
    "grpo": (GRPOConfig, train_grpo, {"num_generations": 2}),
    "pg": (PGConfig, train_pg, {}),
    "ppo": (PPOConfig, train_ppo, {}),
    "ppo, shared": (PPOConfig, train_ppo, {"value_backbone": "shared"}),
}


def score(prompts, completions, **columns):
    return [float(len(text) % 3) for text in completions]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_adds_it(options, name):
    kind, train, changes = TRAINERS[name]
    sampled = {"max_completion_length": 4} if hasattr(kind, "max_completion_length") else {}
    given = {} if name.startswith(("dpo", "kto", "reward")) else {"reward_funcs": score}
    if given:
        changes = changes | sampled
    config = kind(**options | changes)
    result = train(config, **given)
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    assert 1.5 < lines[-1]["aux_loss"] < 8.0
    again = dataclasses.replace(config, router_aux_loss_coef=0.0, overwrite_output_dir=True)
    without = read_metrics(train(again, **given).output_dir / "metrics.jsonl")
    expected = without[-1]["loss"] + 0.5 * lines[-1]["aux_loss"]
    assert lines[-1]["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    parts = ("loss/policy_avg", "loss/value_avg")
    for part in [part for part in parts if part in without[-1]]:
        assert lines[-1][part] == pytest.approx(without[-1][part], rel=1e-4, abs=1e-5)


def test_a_classifiers_is_its_language_models():
    model = tiny_architecture("Mixtral").train()
    classifier = AutoModelForSequenceClassification.from_config(model.config).train()
    classifier.model.load_state_dict(model.model.state_dict())
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    for each in (model, classifier):
        router = RouterLoss(each, 2.0)
        each(ids, attention_mask=mask)
        with torch.no_grad():
            each(ids)
        torch.testing.assert_close(router.take(), 2.0 * wanted)
        assert router.take() is None


def test_an_adapters_run_adds_it(options):
    result = train_sft(SFTConfig(**options, peft="lora"))
    assert 1.5 < result.metrics["aux_loss"] < 8.0
    assert result.model.config.output_router_logits is False


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_dense_model_is_refused(options, tmp_path, kind):
    model = save_tiny(tmp_path / kind, kind)
    message = "router_aux_loss_coef is set, but a .* has no experts to balance"
    for config, train in ((SFTConfig, train_sft), (RewardModelConfig, train_reward_model)):
        with pytest.raises(UserError, match=message):
            train(config(**options | {"model": model}))
    assert not Path(options["output_dir"]).exists()


def test_trpo_has_no_place_for_it(options):
    options = {name: value for name, value in options.items() if name != "max_grad_norm"}
    with pytest.raises(UserError, match="router_aux_loss_coef is set, but"):
        train_trpo(TRPOConfig(**options), reward_funcs=score)
