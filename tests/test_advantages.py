"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlcore as rl


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_group_advantage_is_the_reward_in_units_of_the_groups_std():
    # mean 0.5, unbiased std sqrt(1/3); mean 4, std sqrt(8)
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 6.0, 2.0, 6.0])
    one, two = 0.5 / (math.sqrt(1 / 3) + 1e-4), 2 / (math.sqrt(16 / 3) + 1e-4)
    close(rl.group_advantage(reward, 4), [one, -one, one, -one, -two, two, -two, two])


def test_group_advantage_can_divide_by_the_batch_or_by_nothing():
    reward = torch.tensor([1.0, 0.0, 4.0, 3.0])
    std = math.sqrt(10 / 3)  # of 1, 0, 4, 3 about their mean 2
    scaled = 0.5 / (std + 1e-4)
    close(rl.group_advantage(reward, 2, scale_rewards="batch"), [scaled, -scaled] * 2)
    close(rl.group_advantage(reward, 2, scale_rewards="none"), [0.5, -0.5] * 2)


@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero(scale):
    # the mean of three tenths is not a tenth in binary
    reward = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.0])
    advantage = rl.group_advantage(reward, 3, scale_rewards=scale)
    assert advantage[:3].tolist() == [0.0, 0.0, 0.0]
    assert torch.all(advantage[3:] != 0)


@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
def test_a_completion_that_nobody_judged_has_no_part_in_its_group(scale):
    nan = math.nan
    reward = torch.tensor([1.0, nan, 0.0, 3.0, 2.0, nan, nan, nan, nan])
    advantage = rl.group_advantage(reward, 3, scale_rewards=scale)
    judged = rl.group_advantage(torch.tensor([1.0, 0.0, 3.0, 2.0]), 2, scale_rewards=scale)
    close(advantage[[0, 2, 3, 4]], judged.tolist())
    assert advantage[[1, 5, 6, 7, 8]].tolist() == [0.0] * 5


def test_divided_by_the_mean_the_gradient_is_that_of_the_log_of_the_success_probability():
    # sum_i r_i S_i / K over the K successes, less the mean score: MaxRL's estimator
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    advantage = rl.group_advantage(reward, 4, scale_rewards="mean")
    close(advantage, [3.0, -1.0, -1.0, -1.0, 1 / 3, 1 / 3, -1.0, 1 / 3])
    score = torch.randn(4)  # any scores
    wanted = score[0] - score.mean()
    torch.testing.assert_close((advantage[:4] * score).mean(), wanted)
    assert rl.group_advantage(torch.zeros(4), 4, scale_rewards="mean").tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="'mean' needs rewards of at least 0, got -1"):
        rl.group_advantage(torch.tensor([1.0, -1.0]), 2, scale_rewards="mean")


# two groups of three; GDPO's point: 1 + 0 and 0 + 1 are told apart where the two are rare unequally
TWO = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0], [0.0, 0.5]])


def naive_gdpo(reward, groups, weight):
    """Row by row, as the paper says it."""
    total = torch.zeros(len(reward), dtype=torch.float64)
    for start in range(0, len(reward), groups):
        for column, factor in enumerate(weight):
            part = reward[start : start + groups, column].double()
            mean, std = part[~part.isnan()].mean(), part[~part.isnan()].std()
            for i, value in enumerate(part):
                if not value.isnan():
                    total[start + i] += factor * (value - mean) / (std + 1e-4)
    judged = ~reward.isnan().all(1)
    rest = total[judged]
    return torch.where(judged, (total - rest.mean()) / (rest.std() + 1e-4), 0.0)


@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("holes", [False, True])
def test_each_reward_is_normalized_in_its_group_before_the_sum(weight, holes):
    reward = TWO.double().clone()
    if holes:
        reward[1, 0] = reward[4, 0] = reward[4, 1] = math.nan
    found = rl.decoupled_group_advantage(reward, 3, weight=torch.tensor(weight))
    torch.testing.assert_close(found, naive_gdpo(reward, 3, weight), rtol=1e-6, atol=1e-9)
    assert found.dtype == torch.float64


def test_rewards_of_another_scale_have_the_same_say():
    found = rl.decoupled_group_advantage(TWO, 3)
    scaled = rl.decoupled_group_advantage(TWO * torch.tensor([1.0, 1e3]), 3)
    torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-3)
    summed = [rl.group_advantage((TWO * torch.tensor(x)).sum(1), 3) for x in ([1, 1], [1, 1e3])]
    assert (summed[0] - summed[1]).abs().max() > 0.5


def test_of_one_reward_it_is_the_groups_advantage_over_the_batchs_std():
    reward = torch.tensor([1.0, 0.0, 0.0, 4.0, 3.0, 3.0])
    alone = rl.group_advantage(reward, 3)
    found = rl.decoupled_group_advantage(reward[:, None], 3)
    torch.testing.assert_close(found, alone / (alone.std() + 1e-4))
    equal = torch.full((6, 2), 0.1)
    assert rl.decoupled_group_advantage(equal, 3).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    "reward, options, message",
    [
        (torch.zeros(6), {}, r"reward must be \(B, F\)"),
        (torch.zeros(6, 2), {"weight": torch.ones(3)}, r"weight must hold .* \(2,\), not \(3,\)"),
        (torch.zeros(5, 2), {}, "does not divide into groups"),
    ],
)
def test_rewards_that_do_not_fit_are_named(reward, options, message):
    with pytest.raises(ValueError, match=message):
        rl.decoupled_group_advantage(reward, 3, **options)


def test_one_generation_has_nothing_to_be_compared_with():
    assert rl.group_advantage(torch.tensor([1.0, 5.0]), 1).tolist() == [0.0, 0.0]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    reward = torch.tensor([3.0, 0.0, 0.0, 1.0, 2.0, 6.0])
    close(rl.leave_one_out_advantage(reward, 3), [3.0, -1.5, -1.5, -3.0, -1.5, 4.5])


def test_advantages_keep_double_precision_and_lift_lower_ones():
    for dtype, result in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        reward = torch.tensor([1.0, 0.0], dtype=dtype)
        assert rl.group_advantage(reward, 2).dtype == result
        assert rl.leave_one_out_advantage(reward, 2).dtype == result


@pytest.mark.parametrize("function", [rl.group_advantage, rl.leave_one_out_advantage])
def test_rewards_that_do_not_divide_into_groups_are_refused(function):
    with pytest.raises(ValueError, match=r"\(5,\).*num_generations=2"):
        function(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="one number a completion"):
        function(torch.zeros(2, 2), 2)


def test_leave_one_out_needs_others():
    with pytest.raises(ValueError, match="num_generations >= 2"):
        rl.leave_one_out_advantage(torch.zeros(3), 1)


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'grup'.*'group'.*batch, group, mean, none"):
        rl.group_advantage(torch.zeros(2), 2, scale_rewards="grup")


def test_whitening_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # mean 2, unbiased variance 1
    close(rl.whiten(x, mask), [[-1.0, 0.0], [1.0, 0.0]])
    close(rl.whiten(x, mask, shift_mean=False), [[1.0, 2.0], [3.0, 0.0]])
    close(rl.whiten(torch.tensor([0.0, 4.0])), [-math.sqrt(0.5), math.sqrt(0.5)])


def test_whitening_adds_its_epsilon_to_the_variance():
    x = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    # unbiased variance 5e-9
    expected = 0.5e-4 / math.sqrt(5e-9 + 1e-8)
    assert rl.whiten(x)[1].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_gives_zero_for_one_entry_and_for_none(shift_mean):
    x = torch.tensor([3.0, math.nan])
    for mask in ([True, False], [False, False]):
        whitened = rl.whiten(x, torch.tensor(mask), shift_mean=shift_mean)
        assert whitened.tolist() == [0.0, 0.0]


def test_whitening_ignores_what_stands_off_the_mask():
    x = torch.tensor([1.0, math.nan, 2.0, math.inf, 4.0])
    mask = torch.tensor([True, False, True, False, True])
    close(rl.whiten(x, mask)[mask], rl.whiten(x[mask]).tolist())
    assert rl.whiten(x, mask)[~mask].tolist() == [0.0, 0.0]


def test_whitening_keeps_the_dtype_and_refuses_another_shape():
    assert rl.whiten(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"mask \(2,\).*x \(3,\)"):
        rl.whiten(torch.ones(3), torch.ones(2, dtype=torch.bool))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20))
def test_whitened_values_have_mean_zero_and_variance_at_most_one(values):
    whitened = rl.whiten(torch.tensor(values, dtype=torch.float64))
    assert abs(whitened.mean().item()) < 1e-6
    assert whitened.var().item() <= 1 + 1e-9


def test_whitening_refuses_a_mask_that_is_not_bool():
    with pytest.raises(ValueError, match=r"mask must be bool.*float32"):
        rl.whiten(torch.ones(3), torch.tensor([0.5, 1.0, 0.0]))
