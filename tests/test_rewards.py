"""Reward functions: built in, imported, checked, and added up."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers import grpo as make

from rlcore.errors import UserError
from rlcore.sampling import sandbox
from rlcore.sampling.code_reward import code_runs, code_runs_in
from rlcore.sampling.rewards import (
    REWARDS,
    compute_rewards,
    exact_match,
    load_reward,
    math_verify,
    regex_match,
    reward_name,
    think_format,
)
from rlcore.trainers.options.grpo import check_grpo_config
from rlcore.trainers.shared.judging import make_judge


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


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_arrays_are_rewards_too(dtype):
    assert judged([lambda **_: np.array([1, 0], dtype)]).total.tolist() == [1.0, 0.0]


def test_asynchronous_functions_run_side_by_side_and_while_others_do():
    met = {name: threading.Event() for name in ("first", "second", "plain")}

    def meeting(name):
        async def reward(prompts, completions, **_):
            met[name].set()
            # each waits for all of them: one after another they would never meet
            await asyncio.wait_for(everyone(), 5)
            return [1.0] * len(completions)

        return reward

    async def everyone():
        while not all(event.is_set() for event in met.values()):
            await asyncio.sleep(0)

    def plain(prompts, completions, **_):
        met["plain"].set()
        return [2.0] * len(completions)

    assert judged([meeting("first"), meeting("second"), plain]).total.tolist() == [4.0, 4.0]


def test_an_asynchronous_function_keeps_its_event_loop_and_runs_inside_of_another():
    loops = []

    async def reward(prompts, completions, **_):
        loops.append(asyncio.get_running_loop())
        return [0.5] * len(completions)

    async def notebook():
        return judged([reward])

    assert asyncio.run(notebook()).total.tolist() == [0.5, 0.5]
    judged([reward])
    assert loops[0] is loops[1]


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
        (lambda **_: np.ones((2, 1)), r"returned \[1.0\] for completion 0"),
        (lambda **_: np.float32(1), "must return a list of 2 numbers, not float"),
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
    assert load_reward("rlcore.sampling.rewards:think_format") is think_format
    (tmp_path / "my_rewards_here.py").write_text("def short(prompts, completions): return [1]\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_rewards_here:short")([], ["a"]) == [1]
    assert load_reward("my_rewards_here.short") is load_reward("my_rewards_here:short")


def test_a_reward_is_found_in_a_file_with_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("ONE = 1\n")
    file = tmp_path / "sub-folder.py"
    file.write_text(
        "from neighbour_of_rewards import ONE\ndef f(prompts, completions): return [ONE]\n"
    )
    assert load_reward(f"{file}:f")([], ["a"]) == [1]
    assert load_reward(f"{file}:f") is load_reward(f"{file}:f")


@pytest.mark.parametrize(
    "name, message",
    [
        ("exact_mach", r"unknown reward 'exact_mach'.*'exact_match'.*package.module:function"),
        ("no_such_module_at_all:f", "cannot import 'no_such_module_at_all': ModuleNotFoundError"),
        ("no_such_module_at_all.f", "cannot import 'no_such_module_at_all': ModuleNotFoundError"),
        ("rlcore.sampling.rewards.absent", "has no function 'absent'"),
        ("no/such/file.py:f", "there is no file 'no/such/file.py'"),
        ("trl-lib/Qwen2.5-RM", "a model of rewards is named as reward_model"),
        ("my/rewards.py", "is a file: name its function too, as my/rewards.py:function"),
        ("accuracy_reward", "is TRL's: take math_verify, which compares with the column 'answer'"),
        ("rlcore.sampling.rewards:absent", "has no function 'absent'"),
        ("rlcore.sampling.rewards:REGEX_SECONDS", "has no function 'REGEX_SECONDS'"),
    ],
)
def test_a_reward_that_cannot_be_found_says_what_is_missing(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    "code, reason", [("1 / 0", "ZeroDivisionError"), ("exit(0)", "SystemExit")]
)
def test_a_module_that_fails_on_import_says_why(tmp_path, monkeypatch, code, reason):
    (tmp_path / "broken_rewards_here.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for name in ("broken_rewards_here:f", "broken_rewards_here.py:f"):
        with pytest.raises(UserError, match=reason):
            load_reward(name)


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
    tests = ["assert f(1) == 2", "assert f(1) == 3", None, ["assert f(1) == 2", "assert f(2) == 2"]]
    assert code_runs([], [code] * 4, tests=tests) == [1.0, 0.0, 1.0, 0.0]
    assert code_runs([], ["print('hi')", "print("]) == [1.0, 0.0]


def test_code_runs_gives_nothing_for_leaving_before_the_tests():
    leaving = ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"]
    assert code_runs([], leaving, tests=["assert f(1) == 2"] * 4) == [0.0] * 4


def test_programs_run_several_at_a_time(monkeypatch):
    meeting = threading.Barrier(3, timeout=60)

    def passes(program, tests, seconds):
        meeting.wait()  # goes on only where three are here at once
        return True

    monkeypatch.setattr(sandbox, "cores", lambda: 3)
    monkeypatch.setattr(sandbox, "passes", passes)
    assert code_runs([], ["pass"] * 6) == [1.0] * 6


@pytest.fixture
def own_sandbox(tmp_path, monkeypatch):
    text = "def run(program, tests, seconds): return (program, tests, seconds) == ('p', 't', 5.0)\n"
    (tmp_path / "my_sandbox_here.py").write_text(f"{text}def broken(*_): return 1\n")
    monkeypatch.chdir(tmp_path)


def test_a_sandbox_of_ones_own_gives_the_verdict(own_sandbox):
    reward = code_runs_in("my_sandbox_here:run")
    assert reward([], ["p", "p", "```py\np```"], tests=["t", "u", "t"]) == [1.0, 0.0, 1.0]
    assert reward_name(reward) == "code_runs"
    with pytest.raises(UserError, match="code_sandbox returns True or False, not 1"):
        judged([code_runs_in("my_sandbox_here:broken")])
    with pytest.raises(UserError, match=r"code_sandbox 'my_sandbox_here:none': .* has no function"):
        code_runs_in("my_sandbox_here:none")


def test_the_option_names_it_and_is_refused_where_nothing_runs_code(tmp_path, own_sandbox):
    config = make.config(tmp_path, reward=["code_runs"], code_sandbox="my_sandbox_here:run")
    (function,) = make_judge(config).functions
    assert function([], ["p"], tests=["t"]) == [1.0]
    check_grpo_config(config, 1)
    config = make.config(tmp_path, reward=["exact_match"], code_sandbox="my_sandbox_here:run")
    with pytest.raises(UserError, match="code_sandbox is set, but the reward code_runs"):
        check_grpo_config(config, 1)


def test_a_run_that_runs_code_says_once_what_holds_it(tmp_path, capsys, monkeypatch):
    judge = make_judge(make.config(tmp_path, reward=["code_runs", "exact_match"]))
    judge.prepare(None, None)
    assert capsys.readouterr().err == f"{sandbox.describe()}\n"
    monkeypatch.setenv("RANK", "1")
    judge.prepare(None, None)
    make_judge(make.config(tmp_path, reward=["exact_match"])).prepare(None, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "pattern, text",
    [("(a+)+b", "a" * 60), ("(a|aa)+$", "a" * 80 + "c"), ("(a*)*b", "a" * 50 + "c")],
)
def test_a_pattern_that_would_take_years_is_no_match(pattern, text, monkeypatch):
    monkeypatch.setattr("rlcore.sampling.rewards.REGEX_SECONDS", 0.1)
    started = time.monotonic()
    assert regex_match([], [text, "ab"], pattern=[pattern, ".b"]) == [0.0, 1.0]
    assert time.monotonic() - started < 20


# A reward of the user's that raises

REWARD = """
def helper(text):
    return 1 / len(text)  # the line that raises


def inverse(prompts, completions, **columns):
    return [helper(text) for text in completions]


def exits(prompts, completions, **columns):
    raise SystemExit(0)


def by_json(prompts, completions, **columns):
    import json
    return [json.loads(text) for text in completions]


def together(prompts, completions, **columns):
    return [1.0] * (3 - 1 // (len(completions) - 2))


async def waits(prompts, completions, **columns):
    return inverse(prompts, completions)


async def leaves(prompts, completions, **columns):
    raise SystemExit(0)
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "rewards_that_raise.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return lambda name: load_reward(f"rewards_that_raise:{name}")


def said(function, completions, prompts=None, **columns) -> str:
    with pytest.raises(UserError) as caught:
        judged([function], completions, prompts=prompts, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_reward_raised_is_told_with_file_line_and_row(users, tmp_path):
    message = said(
        users("inverse"), ["ab", "", "c"], ["p", "q", "r"], answer=[1, 2, 3], level="xyz"
    )
    assert message == (
        "reward function 'inverse' raised ZeroDivisionError: division by zero at "
        f"{tmp_path / 'rewards_that_raise.py'}:3 (`return 1 / len(text)  # the line that raises`), "
        "for completion 1 of 3: prompt='q', completion='', columns: answer=2, level='y'"
    )


def test_the_line_is_the_users_own_where_a_library_raised(users):
    message = said(users("by_json"), ["1", "{"])
    assert (
        "rewards_that_raise.py:16 (`return [json.loads(text) for text in completions]`)" in message
    )
    assert "raised JSONDecodeError" in message and "completion='{', columns: none" in message


def test_a_reward_that_leaves_the_program_is_an_error_of_it(users):
    assert "raised SystemExit: 0 at" in said(users("exits"), ["a"])


def test_an_asynchronous_reward_that_raises_is_told_the_same_way(users):
    message = said(users("waits"), ["ab", ""], ["p", "q"])
    assert "ZeroDivisionError" in message and "rewards_that_raise.py:3" in message
    assert "for completion 1 of 2: prompt='q'" in message
    assert "raised SystemExit: 0 at" in said(users("leaves"), ["a"])


def test_where_no_single_row_raises_the_first_is_shown(users):
    message = said(users("together"), ["a", "b"], ["p", "q"])
    assert "ZeroDivisionError" in message and "completion 0 of 2: prompt='p'" in message


def test_a_reward_that_lacks_a_column_shows_those_there_are():
    def wants(prompts, completions, answer, **_):
        return []

    message = said(wants, ["a"], reply=["7"])
    assert "missing 1 required positional argument: 'answer'" in message
    assert "columns: reply='7'" in message
    assert f"{__file__}:{wants.__code__.co_firstlineno} (`def wants" in message


def test_long_values_are_cut_in_the_message(users):
    message = said(users("inverse"), [""], ["p" * 9999], answer=["q" * 9999])
    assert "ppp..." in message and "qqq..." in message and len(message) < 1500
