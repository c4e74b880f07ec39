"""The embedded task: its problems, its verifier, and the recipes that go with it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore.demo.arithmetic import (
    MAX_COMPLETION_LENGTH,
    MAX_PROMPT_LENGTH,
    PairPaths,
    TaskPaths,
    accuracy,
    correct,
    demonstrate,
    make_problem,
    make_task,
    shuffled,
    split_triples,
    triples,
    with_first_step,
)
from rlcore.demo.recipes import (
    distill_config,
    dpo_config,
    grpo_config,
    kto_config,
    pg_config,
    ppo_config,
    reward_model_config,
    sft_config,
    trpo_config,
)
from rlcore.runs.config import load_config
from rlcore.sampling import rollout
from rlcore.sampling.rewards import compute_rewards, load_reward
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.options.base import check_train_config
from rlcore.trainers.options.distill import check_distill_config
from rlcore.trainers.options.dpo import check_dpo_config
from rlcore.trainers.options.grpo import check_grpo_config
from rlcore.trainers.options.kto import check_kto_config
from rlcore.trainers.options.pg import check_pg_config
from rlcore.trainers.options.ppo import check_ppo_config
from rlcore.trainers.options.trpo import check_trpo_config
from rlcore.trainers.sft import SFTConfig, train_sft

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BASE = Path("runs/arithmetic")
PATHS = TaskPaths(
    *(BASE / "task" / name for name in ("model", "sft.jsonl", "train.jsonl", "test.jsonl"))
)
PAIRS = PairPaths(*(BASE / "pairs" / name for name in ("train.jsonl", "test.jsonl")))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"), sft_rows=400, train_rows=300, test_rows=100)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [make_problem(rng, triples()) for _ in range(count)]


def test_the_working_is_right_and_the_answer_is_its_last_number():
    for row in problems(500):
        first, second = row["working"].split(",")
        assert first == row["first_step"]
        for step in (first, second):
            left, _, right = step.partition("=")
            assert eval(left) == int(right)
        middle = first.partition("=")[2]
        assert second.strip().startswith(f"{middle}{row['second_sign']}")
        assert second.partition("=")[2] == row["answer"]


def test_the_story_tells_the_numbers_in_order():
    for row in problems(200):
        numbers = re.findall(r"\d+", row["prompt"])
        start, first = re.findall(r"\d+", row["first_step"])[:2]
        assert numbers[:2] == [start, first]
        assert len(numbers) == 3


def test_both_signs_of_both_steps_are_equally_frequent():
    many = problems(4000)
    signs = [(re.sub(r"[^+-]", "", row["first_step"]), row["second_sign"]) for row in many]
    for pair in (("+", "+"), ("+", "-"), ("-", "+"), ("-", "-")):
        assert signs.count(pair) / len(many) == pytest.approx(0.25, abs=0.03)


def test_held_out_triples_are_never_trained_on(task):
    seen, held_out = split_triples(0)
    assert not set(seen) & set(held_out)
    assert len(held_out) == pytest.approx(0.15 * len(triples()), abs=1)

    def numbers(path):
        return {tuple(map(int, re.findall(r"\d+", row["prompt"]))) for row in rows(path)}

    assert numbers(task.test) <= set(held_out)
    assert numbers(task.sft) | numbers(task.train) <= set(seen)


def test_demonstrators_often_stop_early_and_more_so_before_a_subtraction():
    rng = random.Random(0)
    for sign, share in (("+", 0.7), ("-", 0.35)):
        chosen = [row for row in problems(4000) if row["second_sign"] == sign]
        shown = [demonstrate(rng, row)["completion"] for row in chosen]
        full = sum(text == row["working"] for text, row in zip(shown, chosen, strict=True))
        assert full / len(chosen) == pytest.approx(share, abs=0.03)
        halves = [row["first_step"] for row in chosen]
        rest = [text == half for text, half in zip(shown, halves, strict=True)]
        assert sum(rest) == len(chosen) - full


def test_a_seed_makes_the_same_files_and_another_makes_others(tmp_path):
    sizes = {"sft_rows": 20, "train_rows": 20, "test_rows": 20}
    one, two = (make_task(tmp_path / name, 3, **sizes) for name in ("one", "two"))
    other = make_task(tmp_path / "other", 4, **sizes)
    names = ("sft.jsonl", "train.jsonl", "test.jsonl", "model/model.safetensors")
    for name in names:
        read = [(path.sft.parent / name).read_bytes() for path in (one, two, other)]
        assert read[0] == read[1] != read[2]


def test_the_model_is_small_and_loads_like_any_other(task):
    model = AutoModelForCausalLM.from_pretrained(task.model)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    assert sum(p.numel() for p in model.parameters()) < 0.5e6
    assert model.config.vocab_size == len(tokenizer) < 400
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_every_digit_is_a_token_and_nothing_is_longer_than_the_limits():
    tokenizer = tiny_tokenizer()
    tokens = [tokenizer.decode([token]) for token in tokenizer(" 12+8=20")["input_ids"]]
    assert [token for token in tokens if token.strip()] == list("12+8=20")
    for row in problems(500):
        assert len(tokenizer(row["prompt"])["input_ids"]) <= 20 <= MAX_PROMPT_LENGTH
        # and one for eos
        assert len(tokenizer(row["working"])["input_ids"]) < MAX_COMPLETION_LENGTH
        text = row["prompt"] + row["working"] + " naïve 日本"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "completion, reward",
    [
        (" 9+8=17, 17+8=25", 1.0),
        ("=25 ", 1.0),
        (" 9+8=17", 0.0),
        (" 9+8=17, 17+8=125", 0.0),
        (" 9+8=17, 17+8=-25", 0.0),
        (" 9+8=17, 17+8=25, so", 0.0),
        ("25", 0.0),
        ("=25=", 0.0),
        ("", 0.0),
    ],
)
def test_the_verifier_reads_the_number_after_the_last_equals_sign(completion, reward):
    assert correct(["?"], [completion], ["25"]) == [reward]


def test_a_first_step_alone_is_never_right():
    many = problems(500)
    firsts = [row["first_step"] for row in many]
    assert sum(correct([""] * 500, firsts, [row["answer"] for row in many])) == 0
    assert (
        sum(correct([""] * 500, [r["working"] for r in many], [r["answer"] for r in many])) == 500
    )


def test_the_control_deals_the_same_rewards_to_other_completions():
    many = problems(200)
    completions = [row["working"] if n % 2 else row["first_step"] for n, row in enumerate(many)]
    columns = {"answer": [row["answer"] for row in many]}
    true, dealt = (
        compute_rewards([load_reward(name)], None, [""] * 200, completions, columns).total
        for name in ("arithmetic", "rlcore.demo.arithmetic:shuffled")
    )
    assert true.sum() == dealt.sum() == 100
    # an honest deal agrees on about half of them
    assert 70 < (true == dealt).sum() < 130
    again = shuffled([""] * 200, completions, columns["answer"])
    assert again == dealt.tolist()
    assert shuffled([""] * 200, completions[::-1], columns["answer"][::-1]) != again


def test_accuracy_is_the_verifiers_mean_over_all_rows(monkeypatch):
    many = problems(5)
    answers = {row["prompt"]: row["working"] for row in many[:2] + many[3:4]}
    calls = []

    def scripted(model, tokenizer, prompts, *, greedy, seed, max_new_tokens):
        calls.append((len(prompts), greedy, seed, max_new_tokens))
        return SimpleNamespace(completions=[answers.get(prompt, "=?") for prompt in prompts])

    monkeypatch.setattr(rollout, "generate", scripted)
    assert accuracy(None, None, many, greedy=False, batch_size=2, seed=7) == 3 / 5
    # every batch samples with a seed of its own
    assert calls == [(2, False, 7, 18), (2, False, 9, 18), (1, False, 11, 18)]


def test_accuracy_of_a_model_that_cannot_count_is_zero(task):
    assert accuracy(tiny_model(), tiny_tokenizer(), rows(task.test)[:8]) == 0.0


def test_the_first_step_can_be_given(task):
    row = rows(task.test)[0]
    (given,) = with_first_step([row])
    assert given["prompt"] == f"{row['prompt']}{row['first_step']},"
    assert given["answer"] == row["answer"]


def test_the_trainers_run_on_it_as_on_any_data(task, tmp_path):
    sft = sft_config(task, tmp_path / "sft")
    trained = train_sft(dataclasses.replace(sft, max_steps=3, warmup_steps=1))
    grpo = grpo_config(task, trained.output_dir, tmp_path / "grpo")
    small = dataclasses.replace(grpo, max_steps=2, per_device_train_batch_size=16)
    result = train_grpo(dataclasses.replace(small, num_generations=4))
    assert {"eval/reward", "reward", "rewards/arithmetic/mean"} <= set(result.metrics)


@pytest.mark.parametrize(
    "name, config, check",
    [
        ("sft", sft_config(PATHS, BASE / "sft"), check_train_config),
        (
            "grpo",
            grpo_config(PATHS, BASE / "sft", BASE / "grpo"),
            lambda config: check_grpo_config(config, 1),
        ),
        (
            "pg",
            pg_config(PATHS, BASE / "sft", BASE / "pg"),
            lambda config: check_pg_config(config, 1),
        ),
        (
            "trpo",
            trpo_config(PATHS, BASE / "sft", BASE / "trpo"),
            lambda config: check_trpo_config(config, 1),
        ),
        (
            "ppo",
            ppo_config(PATHS, BASE / "sft", BASE / "ppo"),
            lambda config: check_ppo_config(config, 1),
        ),
        (
            "dpo",
            dpo_config(PAIRS, BASE / "sft", BASE / "dpo"),
            lambda config: check_dpo_config(config, 0),
        ),
        (
            "kto",
            kto_config(PAIRS, BASE / "sft", BASE / "kto"),
            check_kto_config,
        ),
        (
            "distill",
            distill_config(PATHS, BASE / "sft", BASE / "grpo", BASE / "distill"),
            lambda config: check_distill_config(config, 1),
        ),
        (
            "reward_model",
            reward_model_config(PAIRS, BASE / "sft", BASE / "reward_model"),
            check_train_config,
        ),
    ],
)
def test_the_recipes_say_what_the_demo_runs(name, config, check, tmp_path):
    loaded = load_config(type(config), RECIPES / f"arithmetic_{name}.yaml")
    assert loaded == config
    check(dataclasses.replace(loaded, output_dir=str(tmp_path / "free")))


def test_the_demos_configs_take_the_seed():
    sft: SFTConfig = sft_config(PATHS, "x", seed=5)
    grpo: GRPOConfig = grpo_config(PATHS, "x", "y", seed=6)
    assert (sft.seed, grpo.seed) == (5, 6)
