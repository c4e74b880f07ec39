"""The adaptive KL coefficients: the papers' numbers, and what they hold in a loop."""

from __future__ import annotations

import math

import pytest

import rlcore as rl


@pytest.mark.parametrize(
    "kl, want",
    # error -0.1: 0.2 (1 - 0.01); beyond 20% either way it counts as 20%
    [(5.4, 0.198), (6.0, 0.2), (6.6, 0.202), (60.0, 0.204), (0.0, 0.196), (-3.0, 0.196)],
)
def test_the_proportional_rule_moves_by_the_clipped_relative_error(kl, want):
    assert rl.proportional_kl_coef(0.2, kl, target=6.0) == pytest.approx(want, rel=1e-12)


def test_gain_and_bound_scale_the_step():
    assert rl.proportional_kl_coef(1.0, 9.0, target=6.0, gain=0.5, bound=1.0) == 1.25


@pytest.mark.parametrize(
    "kl, want",
    [(0.02, 1.0), (0.0301, 2.0), (0.03, 1.0), (0.0134, 1.0), (0.0133, 0.5), (0.0, 0.5)],
)
def test_ppos_rule_doubles_above_and_halves_below_1_5_times_the_target(kl, want):
    assert rl.ppo_kl_coef(1.0, kl, target=0.02) == want


def test_ppos_factors_may_be_others():
    assert rl.ppo_kl_coef(1.0, 0.05, target=0.02, tolerance=2.0, factor=3.0) == 3.0
    assert rl.ppo_kl_coef(1.0, 0.035, target=0.02, tolerance=2.0, factor=3.0) == 1.0


@pytest.mark.parametrize("rule", [rl.proportional_kl_coef, rl.ppo_kl_coef])
def test_a_kl_that_falls_with_the_coefficient_is_brought_to_its_target(rule):
    coefficient = 10.0
    for _ in range(1000):
        coefficient = rule(coefficient, 0.3 / coefficient, target=0.3)
    assert 1 / 1.5 <= 0.3 / coefficient / 0.3 <= 1.5


@pytest.mark.parametrize("rule", [rl.proportional_kl_coef, rl.ppo_kl_coef])
@pytest.mark.parametrize(
    "arguments, name",
    [
        ((0.0, 1.0, 1.0), "kl_coef"),
        ((math.inf, 1.0, 1.0), "kl_coef"),
        ((1.0, math.nan, 1.0), "kl must"),
        ((1.0, math.inf, 1.0), "kl must"),
        ((1.0, 1.0, 0.0), "target"),
        ((1.0, 1.0, math.nan), "target"),
    ],
)
def test_what_is_no_coefficient_kl_or_target_is_refused(rule, arguments, name):
    coefficient, kl, target = arguments
    with pytest.raises(ValueError, match=name):
        rule(coefficient, kl, target=target)


@pytest.mark.parametrize("options", [{"gain": -0.1}, {"bound": 0.0}, {"gain": 5.0, "bound": 0.2}])
def test_a_gain_that_could_turn_the_coefficient_negative_is_refused(options):
    with pytest.raises(ValueError, match=r"gain.*bound"):
        rl.proportional_kl_coef(1.0, 1.0, target=1.0, **options)


@pytest.mark.parametrize("options", [{"tolerance": 0.9}, {"factor": 1.0}])
def test_factors_that_would_do_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r"tolerance.*factor"):
        rl.ppo_kl_coef(1.0, 1.0, target=1.0, **options)
