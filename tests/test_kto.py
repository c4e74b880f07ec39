"""KTO's trainer: what it computes, what it refuses, and that it learns."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.tiny import save_tiny

from rlcore.cli import main
from rlcore.data.encoding import collate
from rlcore.data.labelled import load_labelled, unrelated
from rlcore.errors import UserError
from rlcore.models.forward import completion_logits
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import KTOConfig, train_kto

ROWS = [
    {
        "prompt": f"Ben has {n} pears.",
        "completion": f" {n}+1={n + 1}" if n % 3 else f" {n}, {n}",
        "label": n % 3 > 0,
    }
    for n in range(16)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_tiny(directory / "policy", "qwen2")
    save_tiny(directory / "other", "qwen2", seed=1)
    return directory


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(directory, models, **changes):
    options = dict(
        model=str(models / "policy"),
        dataset=write(directory / "rows.jsonl"),
        output_dir=str(directory / "out"),
        save_steps=0,
        overwrite_output_dir=True,
        max_steps=1,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
    )
    return KTOConfig(**(options | changes))


def sums(model, tokenizer, examples):
    """(B,) summed log-probabilities of the completions, from the logits."""
    batch = collate(examples, tokenizer.pad_token_id)
    logits = completion_logits(model, batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    logp = logits.log_softmax(-1).gather(-1, batch.target[..., None]).squeeze(-1)
    return torch.where(batch.mask, logp, 0.0).sum(1)


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_first_steps_loss_and_gradient_are_the_papers(tmp_path, models, loss_type, fused_head):
    config = make_config(
        tmp_path, models, ref_model=str(models / "other"), fused_head=fused_head, beta=0.3,
        loss_type=loss_type, desirable_weight=0.7, undesirable_weight=1.4, learning_rate=1e-12,
        max_grad_norm=0.0,
    )  # fmt: skip
    metrics = train_kto(config).metrics
    tokenizer = load_tokenizer(config.model)
    policy, reference = (load_policy(path).eval() for path in (config.model, config.ref_model))
    data = load_labelled(tokenizer, config.dataset, None)
    own, foreign = [row.example for row in data], unrelated(data, config.seed)
    good = torch.tensor([row["label"] for row in ROWS])
    logp = sums(policy, tokenizer, own)
    ratio = logp - sums(reference, tokenizer, own).detach()
    point = (sums(policy, tokenizer, foreign) - sums(reference, tokenizer, foreign)).mean()
    point = point.item() if loss_type == "kto" else 0.0
    sign, weight = torch.where(good, 1.0, -1.0), torch.where(good, 0.7, 1.4)
    loss = (weight * (1 - torch.sigmoid(0.3 * sign * (ratio - max(point, 0.0))))).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    chosen, rejected = (0.3 * ratio[side].mean().item() for side in (good, ~good))
    assert metrics["rewards/chosen"] == pytest.approx(chosen, rel=1e-3)
    assert metrics["rewards/rejected"] == pytest.approx(rejected, rel=1e-3)
    assert metrics["rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-3)
    assert metrics["logps/chosen"] == pytest.approx(logp[good].mean().item(), rel=1e-4)
    assert metrics["entropy"] > 0
    if loss_type == "kto":
        assert metrics["kl"] == pytest.approx(max(point, 0.0), rel=1e-3)
    else:
        assert "kl" not in metrics


def weights(result):
    return [parameter.detach().clone() for parameter in result.model.parameters()]


def test_micro_batches_precomputed_references_and_resuming_change_nothing(tmp_path, models):
    whole = make_config(
        tmp_path, models, ref_model=str(models / "other"), max_steps=4, save_steps=2, beta=0.3,
        per_device_train_batch_size=8,
    )  # fmt: skip
    result = train_kto(whole)
    expected, metrics = weights(result), result.metrics
    for path in (tmp_path / "out" / "checkpoint-4").iterdir():
        path.unlink()
    resumed = dataclasses.replace(whole, resume=True, overwrite_output_dir=False)
    assert all(map(torch.equal, weights(train_kto(resumed)), expected))
    for changes in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"precompute_ref_log_probs": True},
    ):
        result = train_kto(dataclasses.replace(whole, **changes))
        torch.testing.assert_close(weights(result), expected, rtol=1e-4, atol=1e-5)
        # Adam does not see a loss of another scale
        for name in ("loss", "grad_norm", "kl", "rewards/margins"):
            assert result.metrics[name] == pytest.approx(metrics[name], rel=1e-3)


def test_it_learns_what_is_good_on_held_out_rows_too(tmp_path, models):
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:12])
    config = make_config(
        tmp_path, models, eval_dataset=held_out, max_steps=12, learning_rate=3e-3, beta=0.5
    )
    metrics = train_kto(config).metrics
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["eval/loss"] == pytest.approx(0.5, rel=1e-4)
    assert metrics["eval/loss"] < 0.2
    # a wrong sign would raise the loss; labels that nothing reads would leave no margin
    assert metrics["eval/rewards/margins"] > 2


def test_an_adapters_reference_is_the_model_without_it_and_one_label_has_no_margin(
    tmp_path, models
):
    config = make_config(tmp_path, models, peft="lora", lora_r=4, max_steps=2, learning_rate=1e-2)
    config.dataset = write(tmp_path / "good.jsonl", [row for row in ROWS if row["label"]])
    with_reference = dataclasses.replace(config, ref_model=config.model)
    without, given = train_kto(config).metrics, train_kto(with_reference).metrics
    times = {k: without[k] for k in ("step_time", "tokens_per_second")}
    assert without == pytest.approx(given | times, rel=1e-4)
    assert without["rewards/chosen"] != 0
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & without.keys()


def test_labels_are_read_in_every_form_and_pairs_are_one_of_each(tmp_path, models):
    tokenizer = load_tokenizer(str(models / "policy"))
    labels = [True, False, 1, 0, 1.0, "True", "false"]
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in labels]
    read = load_labelled(tokenizer, rows, None)
    assert [row.desirable for row in read] == [True, False, True, False, True, True, False]
    pairs = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    good, bad = load_labelled(tokenizer, pairs, None)
    assert good.desirable and not bad.desirable
    assert tokenizer.decode(good.example.completion[:-1]).strip() == "b"
    assert tokenizer.decode(bad.example.completion[:-1]).strip() == "c"


def test_a_foreign_completion_answers_another_prompt(tmp_path, models):
    tokenizer = load_tokenizer(str(models / "policy"))
    rows = [{"prompt": f"p{n // 4}", "completion": f" {n}", "label": True} for n in range(12)] + [
        {"prompt": "p0", "completion": " 12", "label": False}
    ]
    data = load_labelled(tokenizer, rows, None)
    for seed in range(5):
        own = {tuple(row.example.completion): row.example.prompt for row in data}
        for row, foreign in zip(data, unrelated(data, seed), strict=True):
            assert foreign.prompt == row.example.prompt
            assert own[tuple(foreign.completion)] != foreign.prompt
            assert len(foreign) <= data.extent.length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "kot"}, "loss_type"),
        ({"beta": 0.0}, "beta must be"),
        ({"desirable_weight": 0.0}, "desirable_weight must be"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"peft": "lora", "lora_dropout": 0.1}, "lora_dropout must be 0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(tmp_path, models, changes, message):
    config = make_config(tmp_path, models, model=str(tmp_path / "not-there"))
    with pytest.raises(UserError, match=message):
        train_kto(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "'label' must be true .*no such column"),
        ([{"prompt": "a", "completion": "b", "label": "good"}], "row 1.*not 'good'|not 'good'"),
        ([{"prompt": "a", "label": True}], "'prompt' \\+ 'completion'"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 3, "all rows have the same one"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(tmp_path, models, rows, message):
    config = make_config(tmp_path, models)
    config.dataset = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=message):
        train_kto(config)


def test_the_command_takes_trls_names_and_tells_of_unbalanced_labels(tmp_path, models, capsys):
    words = ["--model_name_or_path", str(models / "policy"), "--dataset_name",
             write(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out"),
             "--max_steps", "1", "--desirable_weight", "2", "--loss_type", "kto"]  # fmt: skip
    assert main(["train", "kto", *words]) == 0
    assert "10 completions are good and 6 bad" in capsys.readouterr().err
    assert "desirable_weight: 2.0" in (tmp_path / "out" / "training.yaml").read_text()
