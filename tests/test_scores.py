"""pass@k and intervals, held to their definitions by counting and by drawing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlcore.sampling.scores import estimate, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_the_k_subsets_in_which_one_passes(n):
    rows = torch.tensor(list(itertools.product([False, True], repeat=n)))
    for k in range(1, n + 1):
        expected = [
            sum(any(subset) for subset in itertools.combinations(row, k)) / math.comb(n, k)
            for row in rows.tolist()
        ]
        assert pass_at_k(rows, k).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_k_lies_among_the_samples(k):
    with pytest.raises(ValueError, match="from 1 to the 2 samples"):
        pass_at_k(torch.zeros(1, 2, dtype=torch.bool), k)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_an_interval_holds_the_truth_about_95_times_in_100(share, spread):
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        values = (torch.rand(60, generator=generator) < share).double()
        values += spread * torch.randn(60, generator=generator)
        mean, low, high = estimate(values)
        assert low <= mean <= high
        held += low <= share <= high
    assert held / 400 >= 0.91


def test_an_interval_of_all_or_nothing_still_says_how_little_is_known():
    assert estimate(torch.ones(10)).low == pytest.approx(0.722, abs=1e-3)
    assert estimate(torch.zeros(10)).high == pytest.approx(0.278, abs=1e-3)
    assert estimate(torch.tensor([0.3])).high == math.inf
    assert math.isnan(estimate(torch.tensor([math.nan])).mean)


def test_a_difference_of_two_models_is_no_share():
    values = torch.tensor([0.0, 1.0] * 10)
    _, low, high = estimate(values, is_difference=True)
    assert low + high == pytest.approx(1.0) and high - low > 0.44
