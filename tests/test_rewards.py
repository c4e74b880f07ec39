"""Reward functions: built in, imported, checked, and added up."""

from __future__ import annotations

import math
import sys
import time
import types

import pytest
import torch

from rlcore.errors import UserError
from rlcore.rewards import (
    REWARDS,
    code_runs,
    compute_rewards,
    exact_match,
    load_reward,
    math_verify,
    regex_match,
    think_format,
)
from rlcore.sandbox import run_python


def judged(functions, completions=("a", "bb"), weights=None, prompts=None, **columns):
    prompts = ["p"] * len(completions) if prompts is None else prompts
    return compute_rewards(functions, weights, prompts, completions, columns)


def length(prompts, completions, **_):
    return [float(len(completion)) for completion in completions]


def returning(*scores):
    def chosen(prompts, completions, **_):
        return list(scores)

    return chosen


def test_rewards_add_up_by_weight():
    rewards = judged([length, returning(1.0, 0.0)], weights=[0.5, 2.0])
    assert rewards.total.tolist() == [2.5, 1.0]
    assert rewards.per_function.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert judged([length, returning(1.0, 0.0)]).total.tolist() == [2.0, 2.0]


def test_none_leaves_a_function_out_of_that_completions_total():
    rewards = judged([returning(None, None), returning(0.25, None)], weights=[3.0, 2.0])
    assert rewards.total[0] == 0.5
    assert rewards.judged.tolist() == [True, False]
    assert math.isnan(rewards.total[1])
    assert rewards.per_function.isnan().tolist() == [[True, False], [True, True]]


def test_functions_get_prompts_completions_and_columns():
    seen = {}

    def spy(prompts, completions, answer, level):
        seen.update(prompts=prompts, completions=completions, answer=answer, level=level)
        return [0] * len(completions)

    judged([spy], prompts=["p", "q"], answer=["1", "2"], level=[3, 4])
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "bb"],
        "answer": ["1", "2"],
        "level": [3, 4],
    }


def test_chat_prompts_come_with_completions_as_messages():
    chat = [{"role": "user", "content": "hello"}]
    seen = []

    def spy(prompts, completions, **_):
        seen.extend(completions)
        return [1.0, 1.0]

    judged([spy], prompts=[chat, chat])
    assert seen == [[{"role": "assistant", "content": text}] for text in ("a", "bb")]
    assert judged([exact_match], prompts=[chat, chat], answer=["a", "b"]).total.tolist() == [1, 0]


def test_tensors_and_booleans_are_rewards_too():
    def tensor(prompts, completions, **_):
        return torch.tensor([1, 0])

    assert judged([tensor, returning(True, False)]).total.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    "function, message",
    [
        (returning(1.0), "'chosen' returned 1 rewards for 2 completions"),
        (returning(1.0, "good"), "'chosen' returned 'good' for completion 1"),
        (returning(1.0, "1"), "'chosen' returned '1' for completion 1"),
        (returning(math.nan, 1.0), "'chosen' returned nan for completion 0"),
        (returning(1.0, math.inf), "'chosen' returned inf for completion 1"),
        (returning(1.0, [1.0, 2.0]), "for completion 1"),
        (lambda prompts, completions: 3.0, "must return a list of 2 numbers, not float"),
        (lambda prompts, completions: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda prompts: [1.0, 2.0], "raised TypeError"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_what_came(function, message):
    with pytest.raises(UserError, match=message):
        judged([function])


def test_weights_must_be_as_many_as_functions():
    with pytest.raises(ValueError, match="2 reward weights for 1"):
        judged([length], weights=[1.0, 2.0])


def test_rewards_load_by_name_and_by_import_path(tmp_path, monkeypatch):
    assert load_reward("exact_match") is REWARDS["exact_match"]
    assert load_reward("rlcore.rewards:think_format") is think_format
    (tmp_path / "my_rewards_here.py").write_text("def short(prompts, completions): return [1]\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_rewards_here:short")([], ["a"]) == [1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("exact_mach", r"unknown reward 'exact_mach'.*'exact_match'.*package.module:function"),
        ("no_such_module_at_all:f", "cannot import 'no_such_module_at_all': ModuleNotFoundError"),
        ("rlcore.rewards:absent", "has no function 'absent'"),
        ("rlcore.rewards:CODE_SECONDS", "has no function 'CODE_SECONDS'"),
    ],
)
def test_a_reward_that_cannot_be_found_says_what_is_missing(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_a_module_that_fails_on_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards_here.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_reward("broken_rewards_here:f")


def test_exact_match_ignores_spaces_around():
    completions = [" 42\n", "42.", "4 2"]
    assert exact_match([], completions, answer=[42, "42", "42"]) == [1.0, 0.0, 0.0]


def test_regex_match_wants_the_whole_completion():
    completions = ["ab\ncd", "xab", "ab"]
    assert regex_match([], completions, pattern=["ab.*", "ab", "a"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>2+2</think> 4", 1.0),
        ("\n<think>\n2+2\n</think>\n4\n", 1.0),
        ("<think>2+2</think>", 0.0),
        ("2+2</think> 4", 0.0),
        ("<think><think>2</think> 4", 0.0),
        ("<think>2</think></think> 4", 0.0),
        ("so <think>2</think> 4", 0.0),
    ],
)
def test_think_format_wants_one_thought_and_then_an_answer(text, reward):
    assert think_format([], [text]) == [reward]


def test_math_verify_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        judged([math_verify], answer=["1", "2"])


def test_math_verify_compares_the_answer_first_and_skips_what_it_cannot_read(monkeypatch):
    library = types.SimpleNamespace(
        parse=lambda text: [text.strip()] if text.strip() != "?" else [],
        verify=lambda gold, given: gold == given,
    )
    monkeypatch.setitem(sys.modules, "math_verify", library)
    assert math_verify([], ["4 ", "5", "x"], answer=["4", "4", "?"]) == [1.0, 0.0, None]


def test_code_runs_takes_the_last_fenced_block_and_the_rows_tests():
    code = (
        "Try\n```python\nraise ValueError\n```\nor rather\n```python\ndef f(x): return x + 1\n```"
    )
    tests = ["assert f(1) == 2", "assert f(1) == 3", None]
    assert code_runs([], [code] * 3, tests=tests) == [1.0, 0.0, 1.0]
    assert code_runs([], ["print('hi')", "print("]) == [1.0, 0.0]


def test_a_program_that_does_not_end_is_stopped_with_its_children():
    started = time.monotonic()
    endless = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])"
    assert not run_python(endless, seconds=1.0)
    assert time.monotonic() - started < 5


def test_a_program_that_takes_too_much_memory_fails():
    assert run_python("x = bytearray(10_000_000)", seconds=5.0)
    assert not run_python("x = bytearray(2_000_000_000)", seconds=5.0)


def test_a_program_sees_neither_our_files_nor_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    monkeypatch.chdir(tmp_path)
    looks = "import os\nassert 'SECRET_OF_MINE' not in os.environ\n"
    looks += f"assert os.getcwd() != {str(tmp_path)!r}\nassert os.listdir() == ['program.py']"
    assert run_python(looks, seconds=5.0)
