"""DPO's trainer: what it computes, what it refuses, and that it learns."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.tiny import most_of, save_tiny

import rlcore as rl
from rlcore.data.pairs import collate_pairs, load_pairs
from rlcore.errors import UserError
from rlcore.models.forward import completion_logits
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.tracking import read_metrics
from rlcore.trainers.dpo import DPOConfig, train_dpo

ROWS = [
    {"prompt": f"Ben has {n} pears.", "chosen": f" {n}+1={n + 1}", "rejected": f" {n}, {n}"}
    for n in range(16)
]
KINDS = ["qwen2", "llama", "gpt2", "gemma2"]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def make_config(directory, pairs, kind="qwen2", **changes):
    model = directory / kind
    if not model.exists():
        save_tiny(model, kind)
    options = dict(
        model=str(model),
        dataset=pairs,
        output_dir=str(directory / "out"),
        save_steps=0,
        overwrite_output_dir=True,
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
    )
    return DPOConfig(**(options | changes))


def weights(result):
    return [parameter.detach().clone() for parameter in result.model.parameters()]


def sums(model, tokenizer, path, rows=slice(None)):
    """(2B,) summed log-probabilities of the answers, from the logits."""
    batch = collate_pairs(load_pairs(tokenizer, path, None)[rows], tokenizer.pad_token_id)
    logits = completion_logits(model, batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    logp = logits.log_softmax(-1).gather(-1, batch.target[..., None]).squeeze(-1)
    return torch.where(batch.mask, logp, 0.0).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_the_first_steps_loss_and_gradient_are_the_papers(tmp_path, pairs, kind, fused_head):
    save_tiny(tmp_path / "other", kind, seed=1)
    config = make_config(
        tmp_path, pairs, kind, ref_model=str(tmp_path / "other"), per_device_train_batch_size=16,
        fused_head=fused_head, learning_rate=1e-12, max_grad_norm=0.0, beta=0.3,
    )  # fmt: skip
    metrics = train_dpo(config).metrics
    tokenizer = load_tokenizer(config.model)
    policy, reference = (load_policy(path).eval() for path in (config.model, config.ref_model))
    chosen, rejected = (sums(policy, tokenizer, pairs) - sums(reference, tokenizer, pairs)).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * chosen.mean().item(), rel=1e-3)
    assert metrics["rewards/margins"] == pytest.approx(
        0.3 * (chosen - rejected).mean().item(), rel=1e-3
    )
    accuracy = (chosen > rejected).float().mean().item()
    assert metrics["rewards/accuracies"] == pytest.approx(accuracy)


def test_micro_batches_precomputed_references_and_packing_change_nothing(tmp_path, pairs):
    save_tiny(tmp_path / "other", "qwen2", seed=1)
    common = {"ref_model": str(tmp_path / "other"), "max_steps": 2, "beta": 0.3}
    whole = make_config(tmp_path, pairs, per_device_train_batch_size=8, **common)
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    expected = weights(train_dpo(whole))
    for changes in (
        one_by_one,
        {"precompute_ref_log_probs": True},
        {"padding_free": True},
        {"fused_head": "off"},
        {"fused_head": "off", "padding_free": True, "precompute_ref_log_probs": True},
    ):
        result = weights(train_dpo(dataclasses.replace(whole, **changes)))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_with_an_adapter_the_reference_is_the_model_without_it(tmp_path, pairs):
    config = make_config(tmp_path, pairs, peft="lora", lora_r=4, max_steps=3, learning_rate=1e-2)
    with_reference = dataclasses.replace(config, ref_model=config.model)
    without, given = train_dpo(config), train_dpo(with_reference)
    assert without.metrics["rewards/margins"] != 0
    assert without.metrics == pytest.approx(
        given.metrics | {k: without.metrics[k] for k in ("step_time", "tokens_per_second")},
        rel=1e-4,
    )


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, pairs):
    config = make_config(tmp_path, pairs, max_steps=4, save_steps=2, learning_rate=1e-2)
    whole = weights(train_dpo(config))
    for path in (tmp_path / "out" / "checkpoint-4").iterdir():
        path.unlink()
    resumed = dataclasses.replace(config, resume=True, overwrite_output_dir=False)
    assert all(map(torch.equal, weights(train_dpo(resumed)), whole))


def test_it_learns_to_prefer_on_held_out_pairs_too(tmp_path, pairs):
    config = make_config(
        tmp_path,
        pairs,
        eval_dataset=most_of(pairs),
        max_steps=12,
        learning_rate=3e-3,
        beta=0.5,
    )
    metrics = train_dpo(config).metrics
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["eval/loss"] == pytest.approx(0.693147, rel=1e-4)
    assert metrics["eval/loss"] < 0.2
    assert metrics["eval/rewards/accuracies"] == 1.0
    # a wrong sign, or answers told apart by nothing, would have neither
    assert metrics["eval/rewards/chosen"] > metrics["eval/rewards/rejected"]


@pytest.mark.parametrize("loss_type", ["simpo", "orpo", "ipo_avg", "aot", "hinge"])
def test_other_losses_train(tmp_path, pairs, loss_type):
    config = make_config(tmp_path, pairs, loss_type=[loss_type], max_steps=6, learning_rate=3e-3)
    config.max_steps, config.eval_dataset = 6, most_of(pairs)
    train_dpo(config)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def vowels(prompts, completions, **_):
    return [float(sum(map("aeiou".count, completion))) for completion in completions]


def test_online_pairs_are_the_best_and_the_worst_of_what_was_sampled(tmp_path, pairs):
    config = make_config(
        tmp_path, pairs, online=True, num_generations=4, max_completion_length=8, max_steps=25,
        learning_rate=3e-3, beta=0.1, seed=3,
    )  # fmt: skip
    train_dpo(config, reward_funcs=[vowels])
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last > 1.5 * first
    assert lines[0]["frac_pairs"] > 0.5


def no_difference(prompts, completions, **_):
    return [1.0] * len(completions)


def test_online_completions_that_nobody_tells_apart_move_nothing(tmp_path, pairs):
    config = make_config(tmp_path, pairs, online=True, max_completion_length=4)
    result = train_dpo(config, reward_funcs=[no_difference])
    before = [parameter.detach() for parameter in load_policy(config.model).parameters()]
    assert all(map(torch.equal, weights(result), before))
    assert result.metrics["frac_pairs"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ["sigmoidal"]}, "sigmoid"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights must have an entry"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"loss_type": ["simpo"], "ref_model": "somewhere"}, "uses no reference"),
        ({"loss_type": ["orpo"], "precompute_ref_log_probs": True}, "uses a reference"),
        ({"num_generations": 4}, "num_generations is for sampled pairs: add --online"),
        ({"reward": ["arithmetic"]}, "reward is for sampled pairs"),
        ({"online": True}, "no reward"),
        ({"online": True, "num_generations": 1, "reward": ["arithmetic"]}, "at least 2"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"peft": "lora", "lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(tmp_path, pairs, changes, message):
    config = make_config(tmp_path, pairs)
    changes = {"model": str(tmp_path / "not-there")} | changes
    with pytest.raises(UserError, match=message):
        train_dpo(dataclasses.replace(config, **changes))


def test_a_dataset_without_pairs_is_refused(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError, match="'chosen' \\+ 'rejected'"):
        train_dpo(make_config(tmp_path, str(path)))


def test_the_functional_loss_is_what_the_trainer_takes():
    ratios = torch.tensor([0.5, -1.0]), torch.tensor([0.0, 0.3])
    zero = torch.zeros(2)
    loss = rl.preference_loss(*ratios, zero, zero, beta=0.3).loss
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])).mean()
    torch.testing.assert_close(loss, expected)
