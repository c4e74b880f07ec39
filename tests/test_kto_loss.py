"""rl.kto_loss against the paper in float64, against TRL's words, and with its formulas changed."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload

import rlcore as rl

LOGP = torch.tensor([-3.0, -4.5, -1.0, -7.25, -2.0], dtype=torch.float64)
REF = torch.tensor([-2.5, -6.0, -1.5, -7.0, -2.0], dtype=torch.float64)
GOOD = torch.tensor([True, True, False, False, True])
OPTIONS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
MUTANTS = read_mutants(TESTS / "mutants" / "pairs" / "kto_loss.txt")


def exact(loss_type: str, kl: float) -> tuple[float, list[float]]:
    """Loss and gradient from numbers alone, one answer at a time."""
    point = kl if loss_type == "kto" else 0.0
    total, gradient = 0.0, []
    for logp, ref, good in zip(LOGP.tolist(), REF.tolist(), GOOD.tolist(), strict=True):
        sign, weight = (1, 1.5) if good else (-1, 0.75)
        win = 1 / (1 + math.exp(-0.3 * sign * (logp - ref - max(point, 0.0))))
        total += weight * (1 - win) / len(LOGP)
        gradient.append(-weight * sign * 0.3 * win * (1 - win) / len(LOGP))
    return total, gradient


def check(kto_loss, loss_type: str, kl: float) -> None:
    logp = LOGP.clone().requires_grad_()
    loss = kto_loss(logp, REF, GOOD, loss_type=loss_type, kl=kl, **OPTIONS)
    loss.backward()
    total, gradient = exact(loss_type, kl)
    torch.testing.assert_close(loss.item(), total)
    torch.testing.assert_close(logp.grad.tolist(), gradient)


CASES = [("kto", 0.7), ("kto", 0.0), ("kto", -1.0), ("apo_zero_unpaired", 0.0)]


@pytest.mark.parametrize(("loss_type", "kl"), CASES)
def test_loss_and_gradient_are_the_papers(loss_type, kl):
    check(rl.kto_loss, loss_type, kl)
    assert torch.autograd.gradcheck(
        lambda x: rl.kto_loss(x, REF, GOOD, loss_type=loss_type, kl=kl, **OPTIONS),
        LOGP.clone().requires_grad_(),
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_formula_is_refused(mutant, tmp_path):
    wrong = function(load_kernels(tmp_path, mutant), "kto_loss")
    try:
        with pytest.raises(AssertionError):
            for case in CASES:
                check(wrong, *case)
    finally:
        unload()


def test_apo_zero_is_the_same_of_pairs_and_of_their_answers():
    half = {"loss_type": "apo_zero_unpaired", "beta": 0.3}
    chosen, rejected = (
        rl.kto_loss(LOGP, REF, GOOD | True, **half),
        rl.kto_loss(LOGP, REF, GOOD & False, **half),
    )
    both = rl.preference_loss(LOGP, LOGP, REF, REF, loss_type="apo_zero", beta=0.3).loss
    torch.testing.assert_close(chosen + rejected, both)


def test_what_a_loss_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="loss_type must be one of"):
        rl.kto_loss(LOGP, REF, GOOD, loss_type="kot")
    for kl in (0.5, torch.tensor(0.5)):
        with pytest.raises(ValueError, match="apo_zero_unpaired has no reference point"):
            rl.kto_loss(LOGP, REF, GOOD, loss_type="apo_zero_unpaired", kl=kl)
