"""The reward model: its loss, its use as a reward, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from helpers.tiny import most_of, save_tiny, tiny_tokenizer

from rlcore.cli import main
from rlcore.data.encoding import pad
from rlcore.data.pairs import collate_pairs, load_pairs
from rlcore.demo.arithmetic import make_tokenizer
from rlcore.demo.tiny_model import train_tokenizer
from rlcore.errors import UserError
from rlcore.models.loading import check_tokenizer, load_classifier, load_tokenizer
from rlcore.models.reward_model import RewardModel, sequence_scores
from rlcore.runs.tracking import read_metrics
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.reward_model import (
    RewardModelConfig,
    load_ended_pairs,
    train_reward_model,
)
from rlcore.trainers.shared.metrics import Moments

ROWS = [
    {"prompt": f"Ben has {n} pears.", "chosen": f" {n}+1={n + 1}", "rejected": f" {n}, {n}"}
    for n in range(16)
]
KINDS = ["qwen2", "llama", "gpt2", "gemma2"]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(directory, pairs, kind="qwen2", **changes):
    """From a classifier with a score, so that a run starts where a test can follow it."""
    model = directory / kind
    if not model.exists():
        base = save_tiny(directory / f"{kind}-lm", kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier = load_classifier(base, new_head="random")
        classifier.config.pad_token_id = tiny_tokenizer().pad_token_id
        classifier.save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    options = dict(
        model=str(model),
        dataset=pairs,
        output_dir=str(directory / "rm"),
        save_steps=0,
        overwrite_output_dir=True,
        max_steps=1,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
    )
    return RewardModelConfig(**(options | changes))


def weights(result):
    return [parameter.detach().clone() for parameter in result.model.parameters()]


def naive_scores(model, rows):
    """One row at a time, without padding: the score at its last token."""
    scores = []
    for ids in rows:
        hidden = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state
        scores.append(model.score(hidden[0, -1]).squeeze())
    return torch.stack(scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_last_real_tokens_wherever_the_padding_is(tmp_path, pairs, kind):
    config = make_config(tmp_path, pairs, kind)
    tokenizer, model = load_tokenizer(config.model), load_classifier(config.model).eval()
    # an eos that doubles as padding, as in many tokenizers
    eos = tokenizer.eos_token_id
    rows = [[7, 9, 30, eos], [12, 41, eos], [5, eos, 8, 19, 22, eos]]
    expected = naive_scores(model, rows)
    for side in ("left", "right"):
        ids, mask = pad(rows, eos, side), pad([[1] * len(row) for row in rows], 0, side)
        scores = sequence_scores(model, model, ids, mask)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    model.config.pad_token_id = eos
    pooled = model(ids, attention_mask=mask).logits.squeeze(-1)
    assert (pooled - expected).abs().max() > 1e-3  # what transformers' own pooling makes of it


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_the_papers_loss_and_gradient(tmp_path, pairs, kind):
    rows = [row | {"margin": 0.25} for row in ROWS]
    with_margin = write(tmp_path / "margins.jsonl", rows)
    config = make_config(
        tmp_path, with_margin, kind, center_rewards_coefficient=0.1, max_grad_norm=0.0
    )
    metrics = train_reward_model(config).metrics
    tokenizer, model = load_tokenizer(config.model), load_classifier(config.model).eval()
    loaded = load_pairs(tokenizer, with_margin, None)
    chosen, rejected = (
        naive_scores(model, [e.prompt + e.completion for e in side])
        for side in ([p.chosen for p in loaded], [p.rejected for p in loaded])
    )
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - 0.25).mean()
    loss = loss + 0.1 * (chosen + rejected).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    norm = torch.stack([grad.norm() for grad in grads]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3)
    scores = torch.cat([chosen, rejected])
    named = {"min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max()}
    for name, score in named.items():
        assert metrics[name] == pytest.approx(score.item(), rel=1e-3, abs=1e-5)


def test_the_held_out_metrics_are_those_of_all_pairs_whatever_the_batches(tmp_path, pairs):
    # 15 pairs in batches of 4: the last one is smaller
    held_out = most_of(pairs)
    config = make_config(tmp_path, pairs, eval_dataset=held_out, learning_rate=1e-12)
    pieces = train_reward_model(dataclasses.replace(config, per_device_train_batch_size=4)).metrics
    all_of_them = {"dataset": held_out, "eval_dataset": None, "per_device_train_batch_size": 15}
    whole = train_reward_model(dataclasses.replace(config, **all_of_them)).metrics
    for name in ("loss", "margin", "mean_reward", "min_reward", "max_reward", "accuracy"):
        assert pieces[f"eval/{name}"] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)


def test_pairs_that_are_too_long_are_left_out_and_not_cut(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[0] | {"rejected": " 0, 0" * 9}])
    short, long = load_pairs(tokenizer, path, None)
    fits, just = len(long.rejected), max(len(short.chosen), len(short.rejected))
    assert load_ended_pairs(tokenizer, path, fits) == [short, long]
    assert load_ended_pairs(tokenizer, path, fits - 1) == [short]
    assert load_ended_pairs(tokenizer, path, just) == [short]
    with pytest.raises(UserError, match=r"no pair is left: of 2 rows .* max_length .*line 1"):
        load_ended_pairs(tokenizer, path, just - 1)


def test_a_chat_answer_ends_where_a_policy_ends_it(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    eos = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + eos + "\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = [{"role": "user", "content": "Ben has 9 pears."}]
    sides = {"chosen": "17", "rejected": "16"}
    row = {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
    path = write(tmp_path / "chat.jsonl", [{"prompt": prompt} | row])
    (pair,) = load_ended_pairs(tokenizer, path, None)
    for side, text in sides.items():
        assert tokenizer.decode(getattr(pair, side).completion) == text + eos
    assert tokenizer.decode(pair.chosen.prompt).endswith("<assistant>")


def test_micro_batches_change_nothing(tmp_path, pairs):
    whole = make_config(tmp_path, pairs, per_device_train_batch_size=8, max_steps=2)
    pieces = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    results = [train_reward_model(dataclasses.replace(whole, **c)) for c in ({}, pieces)]
    torch.testing.assert_close(*map(weights, results), rtol=1e-4, atol=1e-6)


def test_it_learns_and_the_exchanged_pairs_teach_the_opposite(tmp_path, pairs):
    exchanged = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS]
    options = dict(eval_dataset=most_of(pairs), max_steps=15, learning_rate=3e-3)
    right = train_reward_model(make_config(tmp_path, pairs, **options)).metrics
    assert right["eval/accuracy"] == 1.0 and right["eval/margin"] > 1
    other = write(tmp_path / "exchanged.jsonl", exchanged)
    wrong = train_reward_model(make_config(tmp_path, other, **options)).metrics
    assert wrong["eval/accuracy"] == 0.0 and wrong["eval/margin"] < -1


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, pairs):
    config = make_config(tmp_path, pairs, max_steps=4, save_steps=2)
    whole = weights(train_reward_model(config))
    shutil.rmtree(tmp_path / "rm" / "checkpoint-4")
    resumed = dataclasses.replace(config, resume=True, overwrite_output_dir=False)
    assert all(map(torch.equal, weights(train_reward_model(resumed)), whole))


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_reward_it_scores_the_tokens_that_were_sampled(tmp_path, pairs, kind):
    config = make_config(tmp_path, pairs, kind)
    tokenizer = load_tokenizer(config.model)
    reward = RewardModel(config.model)
    reward.prepare(tokenizer, torch.device("cpu"))
    (pair, *_) = load_pairs(tokenizer, pairs, None)
    ended, cut = pair.chosen.completion, pair.chosen.completion[:-1]
    given = [[ended, cut], [ROWS[0]["prompt"]] * 2, [ROWS[0]["chosen"]] * 2]
    scores = reward(prompts=given[1], completions=given[2], completion_ids=given[0])
    expected = naive_scores(reward.model, [pair.chosen.prompt + ids for ids in (ended, cut)])
    assert scores == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3
    # without tokens a text has ended
    assert reward(prompts=given[1], completions=given[2])[0] == pytest.approx(scores[0], rel=1e-5)


def grpo_config(directory, reward_model, **changes):
    prompts = write(directory / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    options = dict(
        model=str(directory / "qwen2-lm"),
        dataset=prompts,
        output_dir=str(directory / "grpo"),
        save_steps=0,
        overwrite_output_dir=True,
        reward_model=reward_model,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=5,
        max_steps=4,
    )
    return GRPOConfig(**(options | changes))


def policy_of(directory, pairs):
    """A policy's directory with its tokenizer, and a reward model beside it."""
    reward_model = train_reward_model(make_config(directory, pairs)).output_dir
    return str(reward_model)


def test_a_run_can_be_judged_by_it_and_normalized_and_resumed(tmp_path, pairs):
    reward_model = policy_of(tmp_path, pairs)
    config = grpo_config(tmp_path, reward_model, normalize_rewards=True, save_steps=2)
    whole = train_grpo(config)
    lines = read_metrics(tmp_path / "grpo" / "metrics.jsonl")
    assert "rewards/reward_model/mean" in lines[0]
    shutil.rmtree(tmp_path / "grpo" / "checkpoint-4")
    resumed = train_grpo(dataclasses.replace(config, resume=True, overwrite_output_dir=False))
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_running_moments_are_those_of_everything_so_far():
    generator = torch.Generator().manual_seed(0)
    parts = [5 + 3 * torch.randn(n, generator=generator) for n in (1, 7, 0, 12)]
    moments = Moments()
    for part in parts:
        moments.add(part)
    whole = torch.cat(parts).double()
    expected = (parts[1].double() - whole.mean()) / whole.std()
    torch.testing.assert_close(moments.normalized(parts[1].double()), expected)
    alone = Moments()
    alone.add(torch.tensor([2.0]))
    assert alone.normalized(torch.tensor([2.0])).item() == 0.0


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path, pairs):
    reward_model = tmp_path / "other"
    shutil.copytree(make_config(tmp_path, pairs).model, reward_model)
    train_tokenizer(["some other words", "entirely"]).save_pretrained(reward_model)
    with pytest.raises(UserError, match="has another tokenizer than the policy"):
        train_grpo(grpo_config(tmp_path, str(reward_model)))
    assert not (tmp_path / "grpo").exists()


def test_a_tokenizer_may_have_more_than_the_policys_tokens_but_none_elsewhere(tmp_path):
    policy = make_tokenizer()
    more = make_tokenizer()
    more.add_special_tokens({"pad_token": "[padding]"})
    more.save_pretrained(tmp_path / "more")
    assert check_tokenizer("reward_model", str(tmp_path / "more"), policy).pad_token == "[padding]"
    with pytest.raises(UserError, match=r"'\[padding\]' is \d+ for the policy and no token there"):
        policy.save_pretrained(tmp_path / "policy")
        check_tokenizer("ref_model", str(tmp_path / "policy"), more)
    swapped = json.loads((tmp_path / "policy" / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    one, two = (token for token, index in vocabulary.items() if index in (300, 301))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "policy" / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(UserError, match="is 300 for the policy and 301 there"):
        check_tokenizer("ref_model", str(tmp_path / "policy"), policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"model": "/no/such/place"}, "no tokenizer at"),
        ({"eval_steps": 2}, "no eval_dataset"),
    ],
)
def test_options_are_checked(tmp_path, pairs, changes, message):
    with pytest.raises(UserError, match=message):
        train_reward_model(make_config(tmp_path, pairs, **changes))


def test_a_classifier_of_two_labels_gives_no_score(tmp_path, pairs):
    from transformers import AutoModelForSequenceClassification

    base = save_tiny(tmp_path / "lm", "qwen2")
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="two"):
        train_reward_model(make_config(tmp_path, pairs, model=str(tmp_path / "two")))


def test_with_lora_the_score_is_trained_whole_and_comes_along(tmp_path, pairs):
    config = make_config(tmp_path, pairs, peft="lora", lora_r=4, max_steps=10, learning_rate=1e-2)
    config = dataclasses.replace(config, eval_dataset=most_of(pairs))
    result = train_reward_model(config)
    assert result.metrics["eval/accuracy"] == 1.0
    tokenizer = load_tokenizer(config.model)
    batch = collate_pairs(load_pairs(tokenizer, pairs, None), tokenizer.pad_token_id)
    asked = batch.input_ids, batch.attention_mask
    trained = sequence_scores(result.model.eval(), result.model, *asked)
    loaded = load_classifier(str(result.output_dir)).eval()
    torch.testing.assert_close(
        sequence_scores(loaded, loaded, *asked), trained, rtol=1e-4, atol=1e-4
    )


def test_the_command_trains_one(tmp_path, pairs, capsys):
    config = make_config(tmp_path, pairs)
    flags = ["--model", config.model, "--dataset", pairs, "--output-dir", str(tmp_path / "cli")]
    assert main(["train", "reward_model", *flags, "--max-steps", "1"]) == 0
    assert (tmp_path / "cli" / "config.json").exists()


def test_a_reward_model_that_names_no_pad_token_scores_batches(tmp_path):
    base = save_tiny(tmp_path / "lm", "llama")
    model = load_classifier(base, new_head="random").eval()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    judge = RewardModel(str(tmp_path / "rm"))
    judge.prepare(tiny_tokenizer(), torch.device("cpu"))
    rows = [[7, 30, 5], [12, 8, 3, 41, 9]]
    scores = judge(["7", "7"], ["", ""], completion_ids=rows)
    prompt = tiny_tokenizer()("7")["input_ids"]
    expected = naive_scores(model, [prompt + row for row in rows])
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)
