"""Rewards of a completion's tokens alone: its length, and its repetitions."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import grpo as make

from rlcore.errors import UserError
from rlcore.sampling.length_reward import soft_overlong_within
from rlcore.trainers.options.grpo import check_grpo_config
from rlcore.trainers.shared.judging import make_judge


def test_the_soft_overlong_punishment_falls_in_a_line_to_the_longest_completion(tmp_path):
    lengths = [0, 16, 17, 18, 20, 25]
    ids = [[7] * length for length in lengths]
    given = {"prompts": [""] * 6, "completions": [""] * 6, "completion_ids": ids}
    config = make.config(
        tmp_path, reward=["soft_overlong_punishment"], max_completion_length=20, soft_punish_cache=4
    )
    (function,) = make_judge(config).functions
    assert function(**given) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    config = dataclasses.replace(config, soft_punish_cache=None, max_completion_length=10)
    (function,) = make_judge(config).functions  # a fifth of 10
    nine = {"completion_ids": [[7] * n for n in (8, 9, 10)]}
    assert function(prompts=[], completions=[], **nine) == [0.0, -0.5, -1.0]
    assert make_judge(config).names == ("soft_overlong_punishment",)
    trl = pytest.importorskip("trl.rewards")
    theirs = trl.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=4)
    assert soft_overlong_within(20, 4)(**given) == theirs(ids)


def test_the_repetition_penalty_is_the_share_of_ngrams_that_were_there_before(tmp_path):
    ids = [[], [5], [1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1]]
    given = {"prompts": [""] * 5, "completions": [""] * 5, "completion_ids": ids}
    config = make.config(tmp_path, reward=["repetition_penalty"], repetition_ngram_size=2)
    (function,) = make_judge(config).functions
    assert function(**given) == [0.0, 0.0, 0.0, -0.75, -0.5]
    trl = pytest.importorskip("trl.rewards")
    if hasattr(trl, "get_repetition_penalty_reward"):
        assert function(**given) == trl.get_repetition_penalty_reward(ngram_size=2)(ids)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"soft_punish_cache": 3}, "soft_punish_cache is set, but the reward soft_overlong_puni"),
        ({"repetition_ngram_size": 4}, "repetition_ngram_size is set, but the reward repetition_"),
        (
            {"soft_punish_cache": 8, "reward": ["soft_overlong_punishment"]},
            r"soft_punish_cache \(8\) must be at most max_completion_length \(7\)",
        ),
        ({"soft_punish_cache": 0}, "soft_punish_cache must be at least 1"),
    ],
)
def test_options_of_rewards_that_are_not_there_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_grpo_config(make.config(tmp_path, **changes), 1)
