"""The distilling trainer: what it computes, whom it listens to, what it refuses, that it learns."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.distributions import categorical_divergence
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

from rlcore.cli import main
from rlcore.data.encoding import collate, encode_completions
from rlcore.errors import UserError
from rlcore.models.forward import completion_logits
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.tracking import read_metrics
from rlcore.sampling.rollout import generate
from rlcore.trainers import DistillConfig, train_distill
from rlcore.trainers.shared.order import batch_indices, mix_seed

ROWS = [{"prompt": f"Ben has {n} pears.", "completion": f" {n}+1={n + 1}"} for n in range(8)]
DIVERGENCES = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_tiny(directory / "student", "qwen2", initializer_range=0.2)
    save_tiny(directory / "teacher", "llama", seed=1, initializer_range=0.2)
    return directory


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(directory, models, **changes):
    options = dict(
        model=str(models / "student"),
        teacher=str(models / "teacher"),
        dataset=write(directory / "rows.jsonl"),
        output_dir=str(directory / "out"),
        save_steps=0,
        overwrite_output_dir=True,
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_completion_length=6,
    )
    return DistillConfig(**(options | changes))


def definition(config, input_ids, attention_mask, mask):
    """(loss, gradient's norm) of the mean over tokens of the divergence, from both logits."""
    student, teacher = (load_policy(path).eval() for path in (config.model, config.teacher))
    logits = completion_logits(student, input_ids, attention_mask, mask.shape[1])
    with torch.no_grad():
        other = completion_logits(teacher, input_ids, attention_mask, mask.shape[1])
    kind = DIVERGENCES.get(config.beta, {"kind": "jsd", "jsd_beta": config.beta})
    given = {"temperature": config.temperature, "mask": mask}
    loss = categorical_divergence(logits, other, **kind, **given).sum() / mask.sum()
    loss.backward()
    return loss.item(), torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_first_steps_loss_and_gradient_are_the_papers(tmp_path, models, beta, fused_head):
    config = make_config(
        tmp_path, models, beta=beta, fused_head=fused_head, lmbda=0.0, temperature=1.3,
        learning_rate=1e-12, max_grad_norm=0.0, max_completion_length=20,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    metrics = train_distill(config).metrics
    tokenizer = load_tokenizer(config.model)
    batch = collate(encode_completions(tokenizer, ROWS), tokenizer.pad_token_id)
    loss, norm = definition(config, batch.input_ids, batch.attention_mask, batch.mask)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["on_policy"] == 0


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_sequences_are_sampled_by_the_student_or_with_seq_kd_by_the_teacher(
    tmp_path, models, source
):
    sampled = source == "student"
    prompts = [{"prompt": row["prompt"]} for row in ROWS]
    config = make_config(
        tmp_path, models, lmbda=float(sampled), seq_kd=not sampled, learning_rate=1e-12,
        max_grad_norm=0.0, dataset=write(tmp_path / "prompts.jsonl", prompts),
    )  # fmt: skip
    metrics = train_distill(config).metrics
    tokenizer = load_tokenizer(config.model)
    chosen = batch_indices(len(ROWS), 8, 0, config.seed)
    rollout = generate(
        load_policy(str(models / source)), tokenizer, [ROWS[index]["prompt"] for index in chosen],
        max_new_tokens=6, temperature=config.temperature,
        seed=mix_seed(mix_seed(config.seed, 0), 0),
    )  # fmt: skip
    loss, norm = definition(
        config, rollout.input_ids, rollout.attention_mask, rollout.completion_mask
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["on_policy"] == sampled
    assert ("completions/mean_length" in metrics) == sampled


def test_lmbda_is_the_share_of_steps_on_what_the_student_samples(tmp_path, models):
    train_distill(make_config(tmp_path, models, lmbda=0.3, max_steps=40, learning_rate=1e-5))
    steps = [line["on_policy"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert len(steps) == 40 and 4 <= sum(steps) <= 20


def weights(result):
    return [parameter.detach().clone() for parameter in result.model.parameters()]


def test_resuming_goes_on_bit_for_bit_and_micro_batches_change_nothing(tmp_path, models):
    whole = make_config(tmp_path, models, max_steps=4, save_steps=2)
    expected = weights(train_distill(whole))
    for path in (tmp_path / "out" / "checkpoint-4").iterdir():
        path.unlink()
    resumed = dataclasses.replace(whole, resume=True, overwrite_output_dir=False)
    assert all(map(torch.equal, weights(train_distill(resumed)), expected))
    other = dataclasses.replace(resumed, teacher=whole.model)
    with pytest.raises(UserError, match="teacher"):
        train_distill(other)
    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    result = train_distill(dataclasses.replace(whole, **cut))
    torch.testing.assert_close(weights(result), expected, rtol=1e-4, atol=1e-4)


def answers(prompts, completions, **_):
    return [float("1" in text) for text in completions]


def test_the_student_comes_to_the_teacher_on_held_out_prompts(tmp_path, models):
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": f"Ana has {n}"} for n in range(6)])
    prompts = [{"prompt": f"Ana has {n}"} for n in range(6, 70)]
    teacher = tiny_model("llama", seed=1, initializer_range=0.2)
    before = [p.detach().clone() for p in teacher.parameters()]
    config = make_config(
        tmp_path, models, teacher=None, lmbda=0.7, seq_kd=True, eval_dataset=held_out,
        dataset=write(tmp_path / "prompts.jsonl", prompts), per_device_train_batch_size=32,
        max_steps=150, learning_rate=1e-2,
    )  # fmt: skip
    result = train_distill(config, teacher=teacher)
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert result.metrics["eval/loss"] < 0.5 * first["eval/loss"]
    assert all(map(torch.equal, teacher.parameters(), before))
    assert not any(p.requires_grad and p.grad is not None for p in teacher.parameters())
    assert '"eval"' in (tmp_path / "out" / "completions.jsonl").read_text()


def test_rewards_measure_and_teach_nothing(tmp_path, models):
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": f"Ana has {n}"} for n in range(6)])
    config = make_config(tmp_path, models, lmbda=1.0, eval_dataset=held_out, max_steps=2)
    expected = weights(train_distill(config))
    judged = train_distill(config, reward_funcs=answers)
    assert all(map(torch.equal, weights(judged), expected))
    assert {"reward", "eval/reward", "rewards/answers/mean"} <= judged.metrics.keys()


def test_an_adapter_is_trained_and_the_teacher_may_be_wider(tmp_path, models):
    save_tiny(tmp_path / "wide", "qwen2", seed=2, hidden_size=64, intermediate_size=96)
    config = make_config(
        tmp_path, models, teacher=str(tmp_path / "wide"), peft="lora", lora_r=4, max_steps=3,
        learning_rate=1e-2, lmbda=0.0,
    )  # fmt: skip
    train_distill(config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_rows_of_the_head_that_are_no_words_are_left_out(tmp_path, models, fused_head):
    """Families pad the vocabularies of their sizes to different numbers of rows."""
    words = len(tiny_tokenizer())
    padded = tiny_model("llama", seed=1, initializer_range=0.2)
    padded.resize_token_embeddings(words + 13, mean_resizing=False)
    config = make_config(tmp_path, models, lmbda=0.0, fused_head=fused_head, max_grad_norm=0.0)
    plain = train_distill(config).metrics
    wide = train_distill(dataclasses.replace(config, teacher=None), teacher=padded).metrics
    for name in ("loss", "grad_norm"):
        assert wide[name] == pytest.approx(plain[name], rel=1e-4)


def test_a_teacher_of_other_words_is_refused_before_anything_is_written(tmp_path, models):
    few = tiny_model("llama")
    few.resize_token_embeddings(len(tiny_tokenizer()) - 5)
    config = make_config(tmp_path, models, teacher=None)
    with pytest.raises(UserError, match=r"teacher has .* the tokenizer has"):
        train_distill(config, teacher=few)
    tokenizer = load_tokenizer(str(models / "teacher"))
    save_tiny(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = (token for token, index in vocab.items() if index in (100, 101))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    assert len(load_tokenizer(str(tmp_path / "other"))) == len(tokenizer)
    config = dataclasses.replace(config, teacher=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"teacher .* has another tokenizer than the policy"):
        train_distill(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher is not given"),
        ({"lmbda": 1.2}, "lmbda must be"),
        ({"beta": -0.1}, "beta must be"),
        ({"lmbda": 1.0, "seq_kd": True}, "seq_kd is set, but has no effect"),
        ({"num_generations": 2}, "num_generations .*seq_kd"),
        ({"ref_model": "m"}, "ref_model is set, but has no effect"),
        ({"importance_sampling_correction": "token_mask"}, "importance_sampling_correction is set"),
        ({"normalize_rewards": True}, "normalize_rewards is set, but has no effect"),
        ({"reward_weights": [1.0]}, "reward_weights is set, but has no effect"),
        ({"eval_num_generations": 2}, "eval_num_generations is set, but has no effect"),
        ({"peft": "lora", "lora_dropout": 0.1}, "lora_dropout must be 0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(tmp_path, models, changes, message):
    config = make_config(tmp_path, models, model=str(tmp_path / "not-there"))
    with pytest.raises(UserError, match=message):
        train_distill(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}] * 8, "completion.* lmbda 1"),
        ([{"prompt": "a", "completion": None}] * 8, "completion"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}], "must both be"),
    ],
)
def test_data_without_completions_is_refused_where_they_are_learned_from(
    tmp_path, models, rows, message
):
    config = make_config(tmp_path, models, dataset=write(tmp_path / "bad.jsonl", rows))
    with pytest.raises(UserError, match=message):
        train_distill(config)


def test_the_command_takes_trls_names(tmp_path, models, capsys):
    words = ["--model_name_or_path", str(models / "student"), "--teacher_model_name_or_path",
             str(models / "teacher"), "--dataset_name", write(tmp_path / "rows.jsonl"),
             "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--lmbda", "0.25",
             "--beta", "0.1", "--max_new_tokens", "5", "--seq_kd"]  # fmt: skip
    assert main(["train", "distill", *words]) == 0
    options = (tmp_path / "out" / "training.yaml").read_text()
    assert "lmbda: 0.25" in options and "max_completion_length: 5" in options
    card = (tmp_path / "out" / "README.md").read_text()
    assert "https://arxiv.org/abs/2306.13649" in card and str(models / "teacher") in card
    assert main(["train", "distill", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--lmbda float" in shown and "--teacher str" in shown
