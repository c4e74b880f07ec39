"""Supervised fine-tuning: its loss, its batches, its schedule, and exact resuming."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from helpers.tiny import most_of, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from rlcore.demo.arithmetic import make_problem, triples
from rlcore.errors import TrainingDiverged, UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import sft
from rlcore.trainers.options.schedules import learning_rate_scale
from rlcore.trainers.sft import SFTConfig, train_sft
from rlcore.trainers.shared import metrics, stepping
from rlcore.trainers.shared import run as common
from rlcore.trainers.shared.metrics import Clock, Means
from rlcore.trainers.shared.order import batch_indices, mix_seed

# Spies wrap this one, not each other.
ADAMW_STEP = torch.optim.AdamW.step


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    problems = [make_problem(rng, triples()) for _ in range(12)]
    lines = [
        json.dumps({"prompt": row["prompt"], "completion": row["working"][: 4 + 2 * n]})
        for n, row in enumerate(problems)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return SFTConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=4,
        max_grad_norm=0.0,
    )


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def assert_same_weights(one, two) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name]), name


def gradient(monkeypatch, config, **changes) -> dict[str, torch.Tensor]:
    """The gradient of the run's first optimizer step."""
    taken = {}

    def spy(self, *args, **kwargs):
        parameters = [p for group in self.param_groups for p in group["params"]]
        taken.update({index: p.grad.clone() for index, p in enumerate(parameters)})
        return ADAMW_STEP(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    changes = {"max_steps": 1, "overwrite_output_dir": True, **changes}
    train_sft(dataclasses.replace(config, **changes))
    return taken


def test_the_loss_is_the_mean_cross_entropy_of_completion_tokens(config):
    result = train_sft(dataclasses.replace(config, max_steps=1, per_device_train_batch_size=12))
    model = AutoModelForCausalLM.from_pretrained(config.model)
    total, count = 0.0, 0
    for line in Path(config.dataset).read_text().splitlines():
        row = json.loads(line)
        prompt = tiny_tokenizer()(row["prompt"])["input_ids"]
        ids = prompt + tiny_tokenizer()(row["completion"])["input_ids"]
        ids = torch.tensor([*ids, tiny_tokenizer().eos_token_id])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="sum")
        count += len(ids) - len(prompt)
    assert result.metrics["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert result.metrics["epoch"] == 1.0


def test_micro_steps_add_up_to_the_large_batch(config, monkeypatch):
    large = gradient(monkeypatch, config, per_device_train_batch_size=12)
    small = gradient(
        monkeypatch, config, per_device_train_batch_size=3, gradient_accumulation_steps=4
    )
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)


def test_micro_steps_weighed_by_their_own_counts_would_not_add_up(config, monkeypatch):
    large = gradient(monkeypatch, config, per_device_train_batch_size=12)
    loss = sft._loss
    monkeypatch.setattr(
        sft,
        "_loss",
        lambda run, batch, num_items: loss(run, batch, 4 * batch.mask.sum()),
    )
    small = gradient(
        monkeypatch, config, per_device_train_batch_size=3, gradient_accumulation_steps=4
    )
    with pytest.raises(AssertionError):
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_hold_rows_of_like_length(config, monkeypatch):
    padding = []
    loss = sft._loss

    def spy(run, batch, num_items):
        padding.append(int((1 - batch.attention_mask).sum()))
        return loss(run, batch, num_items)

    monkeypatch.setattr(sft, "_loss", spy)
    train_sft(dataclasses.replace(config, max_steps=1, gradient_accumulation_steps=3))
    sorted_padding = sum(padding)
    padding.clear()
    train_sft(
        dataclasses.replace(
            config, max_steps=1, per_device_train_batch_size=12, overwrite_output_dir=True
        )
    )
    assert sorted_padding < sum(padding) / 2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_padding_free_rows_give_the_same_losses_and_gradients(
    config, monkeypatch, tmp_path, kind, fused_head
):
    # dropout would fall on other tokens
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = save_tiny(tmp_path / kind, kind, initializer_range=0.05, **quiet)
    config = dataclasses.replace(
        config,
        model=model,
        fused_head=fused_head,
        gradient_accumulation_steps=3,
        eval_dataset=most_of(config.dataset),
    )
    taken, lines = {}, {}
    for padding_free in (False, True):
        changes = {"padding_free": padding_free}
        taken[padding_free] = gradient(monkeypatch, config, **changes)
        lines[padding_free] = read_metrics(f"{config.output_dir}/metrics.jsonl")
    for name, value in taken[False].items():
        torch.testing.assert_close(taken[True][name], value, rtol=1e-4, atol=1e-6)
    for padded, packed in zip(lines[False], lines[True], strict=True):
        for name in padded.keys() & {"loss", "eval/loss", "grad_norm", "num_tokens"}:
            assert packed[name] == pytest.approx(padded[name], rel=1e-4), name


def test_padding_free_passes_have_one_row_without_padding(config, monkeypatch):
    shapes, forward = [], Qwen2ForCausalLM.forward

    def spy(self, input_ids, **options):
        if self.training:
            shapes.append((tuple(input_ids.shape), options.get("attention_mask")))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", spy)
    result = train_sft(dataclasses.replace(config, max_steps=1, padding_free=True))
    # each of the four sequences goes without its last token, which predicts nothing
    assert shapes == [((1, result.metrics["num_tokens"] - 4), None)]


def test_a_model_whose_rows_see_each_other_is_not_trained_padding_free(config, monkeypatch):
    forward = Qwen2ForCausalLM.forward

    def without_positions(self, input_ids, position_ids=None, **options):
        return forward(self, input_ids, **options)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", without_positions)
    with pytest.raises(UserError, match="padding_free: Qwen2ForCausalLM lets the sequences"):
        train_sft(dataclasses.replace(config, padding_free=True))
    assert not Path(config.output_dir).exists()


def test_it_learns_and_leaves_a_model_that_transformers_loads(config):
    result = train_sft(
        dataclasses.replace(config, max_steps=30, eval_dataset=most_of(config.dataset))
    )
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    start, *trained, held_out = lines
    assert [line["step"] for line in lines] == [*range(31), 30]
    assert start["eval/loss"] == pytest.approx(trained[0]["loss"], rel=0.2)
    assert trained[-1]["loss"] < 0.4 * trained[0]["loss"]
    assert held_out["eval/loss"] < 0.4 * trained[0]["loss"]
    assert trained[-1] | held_out == result.metrics
    assert trained[-1]["num_tokens"] > 30 * 4 * 10
    for name, value in weights(result.output_dir).items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_an_evaluation_is_the_loss_of_the_model_as_it_is(config):
    held_out = most_of(config.dataset)
    # one step, without learning to speak of
    quick = dataclasses.replace(
        config, max_steps=1, per_device_train_batch_size=11, learning_rate=1e-12
    )
    evaluated = train_sft(dataclasses.replace(quick, eval_dataset=held_out))
    trained = train_sft(
        dataclasses.replace(quick, dataset=held_out, output_dir=f"{config.output_dir}-again")
    )
    assert evaluated.metrics["eval/loss"] == pytest.approx(trained.metrics["loss"], rel=1e-5)


def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path):
    dropout = save_tiny(tmp_path / "noisy", attention_dropout=0.2)
    config = dataclasses.replace(
        config, model=dropout, lr_scheduler_type="constant", max_steps=6, save_steps=3
    )
    train_sft(config)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    train_sft(dataclasses.replace(halves, max_steps=3))
    train_sft(dataclasses.replace(halves, resume=True))
    assert_same_weights(config.output_dir, halves.output_dir)
    whole, resumed = (read_metrics(f"{c.output_dir}/metrics.jsonl") for c in (config, halves))
    for name in ("step", "loss", "grad_norm", "num_tokens", "epoch"):
        assert [line[name] for line in whole] == [line[name] for line in resumed]


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(config, capsys):
    train_sft(dataclasses.replace(config, max_steps=1, save_steps=1))
    weights = Path(config.output_dir, "model.safetensors").read_bytes()
    assert "nothing is left to train" not in capsys.readouterr().err
    train_sft(dataclasses.replace(config, max_steps=1, save_steps=1, resume=True))
    assert "the run's 1 steps were done before: nothing is left to train" in capsys.readouterr().err
    assert Path(config.output_dir, "model.safetensors").read_bytes() == weights


def test_the_seed_decides_the_run(config, tmp_path):
    runs = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        path = str(tmp_path / name)
        train_sft(dataclasses.replace(config, output_dir=path, seed=seed))
        runs[name] = path
    assert_same_weights(runs["one"], runs["same"])
    with pytest.raises(AssertionError):
        assert_same_weights(runs["one"], runs["other"])


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(config, monkeypatch):
    loss = sft._loss
    calls = []

    def explode(run, batch, num_items):
        calls.append(batch)
        return loss(run, batch, num_items) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(sft, "_loss", explode)
    with pytest.raises(TrainingDiverged) as caught:
        train_sft(dataclasses.replace(config, save_steps=2))
    assert (caught.value.step, caught.value.quantity) == (3, "loss")
    assert caught.value.last_checkpoint.name == "checkpoint-2"
    assert str(caught.value.last_checkpoint) in str(caught.value)


def test_an_infinite_gradient_stops_the_run_before_its_step(config, monkeypatch):
    monkeypatch.setattr(stepping, "clip_gradients", lambda run: float("inf"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(TrainingDiverged, match="step 1: grad_norm is inf"):
        train_sft(config)


def test_gradients_are_clipped_to_the_norm_asked_for(config, monkeypatch):
    def norm(**changes):
        taken = gradient(monkeypatch, config, **changes)
        return torch.cat([value.flatten() for value in taken.values()]).norm().item()

    free = norm()
    assert norm(max_grad_norm=free / 2) == pytest.approx(free / 2, rel=1e-3)
    assert norm(max_grad_norm=2 * free) == pytest.approx(free, rel=1e-3)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(config):
    result = train_sft(dataclasses.replace(config, bf16=True))
    assert all(value.dtype == torch.float32 for value in result.model.state_dict().values())
    exact = train_sft(dataclasses.replace(config, overwrite_output_dir=True))
    assert result.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert result.metrics["loss"] != exact.metrics["loss"]


SCHEDULES = {
    ("constant", 0.0, None): [0.5, 1.0, 1.0, 1.0, 1.0],
    ("linear", 0.0, None): [0.5, 1.0, 1.0, 0.75, 0.25],
    ("linear", 0.2, None): [0.5, 1.0, 1.0, 0.8, 0.4],
    ("cosine", 0.0, None): [0.5, 1.0, 1.0, 0.853553, 0.146447],
    ("warmup_stable_decay", 0.0, 0.2): [0.5, 1.0, 1.0, 1.0, 0.5],
}


@pytest.mark.parametrize("options, expected", SCHEDULES.items())
def test_learning_rates_by_hand(config, options, expected):
    name, minimum, decay = options
    config = dataclasses.replace(
        config,
        warmup_steps=2,
        lr_scheduler_type=name,
        lr_min_ratio=minimum,
        lr_decay_ratio=decay,
    )
    as_ratio = dataclasses.replace(config, warmup_steps=0, warmup_ratio=0.2)
    for step in range(1, 11):
        assert learning_rate_scale(as_ratio, step, 10) == learning_rate_scale(config, step, 10)
    rates = [learning_rate_scale(config, step, 10) for step in (1, 2, 3, 5, 9)]
    if name == "warmup_stable_decay":
        rates[-1] = learning_rate_scale(config, 10, 10)
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr_scheduler_type": "liner"}, "'liner'. Did you mean 'linear'"),
        ({"lr_scheduler_type": "constant", "lr_min_ratio": 0.1}, "lr_min_ratio has no meaning"),
        ({"lr_min_ratio": 2.0}, "lr_min_ratio must be in"),
        ({"lr_decay_ratio": 0.5}, "lr_decay_ratio goes with"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_decay_ratio goes with"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "both say how long to warm up"),
        ({"eval_steps": 5}, "no eval_dataset"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1"),
        (
            {"report_to": ["tensorbord"], "model": "/nowhere/model"},
            "'tensorbord'. Did you mean 'tensorboard'",
        ),
        ({"dataset": "/nowhere/rows.jsonl"}, "no data file"),
        ({"model": "/nowhere/model"}, "no such directory"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(config, changes, message):
    with pytest.raises(UserError, match=message):
        train_sft(dataclasses.replace(config, **changes))
    assert not Path(config.output_dir).exists()


def test_epochs_say_how_many_steps_there_are(config):
    result = train_sft(dataclasses.replace(config, max_steps=-1, num_train_epochs=1.5))
    assert result.steps == 5  # 1.5 x 12 rows in batches of 4, the last one filled up
    assert result.metrics["step"] == 5


def test_every_epoch_is_a_permutation_and_batches_cut_one_endless_row():
    flat = [index for number in range(6) for index in batch_indices(8, 4, number, seed=3)]
    epochs = [flat[:8], flat[8:16], flat[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    odd = [index for number in range(8) for index in batch_indices(8, 3, number, seed=3)]
    assert odd == flat
    assert batch_indices(8, 8, 0, seed=4) != epochs[0]


def test_mixed_seeds_differ_and_fit_a_generator():
    seeds = {mix_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_means_count_what_the_mask_counts(config):
    accelerator = common.make_accelerator(config)
    means = Means()
    nan = float("nan")
    means.add(torch.tensor([[True, False]]), kl=torch.tensor([[1.0, nan]]), entropy=None)
    means.add(torch.tensor([[True, True]]), kl=torch.tensor([[2.0, 6.0]]))
    assert means.reduce(accelerator) == {"kl": 3.0}
    assert Means().reduce(accelerator) == {}


def test_metrics_are_averaged_over_the_steps_between_two_lines(config):
    every = train_sft(config)
    rare = train_sft(dataclasses.replace(config, logging_steps=3, overwrite_output_dir=True))
    lines = read_metrics(rare.output_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[-1]["loss"] == every.metrics["loss"]
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert lines[-1]["num_tokens"] == every.metrics["num_tokens"]


def test_an_evaluation_is_a_line_of_its_own_with_the_value_at_its_step(config, monkeypatch):
    measured = iter([5.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(sft, "_evaluate", lambda run, examples: next(measured))
    evaluated = {
        "eval_dataset": most_of(config.dataset),
        "eval_steps": 2,
        "logging_steps": 3,
    }
    result = train_sft(dataclasses.replace(config, max_steps=5, **evaluated))
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 5, 5]
    held_out = [line for line in lines if "eval/loss" in line]
    assert held_out == [
        {"step": step, "eval/loss": value}
        for step, value in ((0, 5.0), (2, 4.0), (4, 3.0), (5, 2.0))
    ]


def test_the_clock_leaves_out_what_is_skipped(monkeypatch):
    times = iter([0.0, 2.0, 2.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = Clock()
    assert clock.lap(10) == {"step_time": 2.0, "tokens_per_second": 5.0}
    clock.skip()
    assert clock.lap(30) == {"step_time": 2.0, "tokens_per_second": 10.0}
