"""Masks made before a policy loss, against loops over tokens and sequences in float64."""

from __future__ import annotations

import math

import pytest
import torch

import rlcore as rl

NAN = math.nan
CU_SEQLENS = torch.arange(0, 31, 5, dtype=torch.int32)


@pytest.fixture
def rows():
    """(logp, old_logp, advantage (B,), mask), one row without a counted token, NaN where masked."""
    torch.manual_seed(0)
    logp = -2 * torch.rand(6, 5, dtype=torch.float64)
    old_logp = logp + 0.4 * torch.randn(6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.7
    mask[2] = False
    logp[~mask], old_logp[~mask] = NAN, -math.inf
    return logp, old_logp, torch.tensor([1.0, -1.0, -0.5, 0.0, -2.0, -0.3]).double(), mask


MEASURES = {
    "k1": lambda r: r,
    "k2": lambda r: math.log(r) ** 2 / 2,
    "k3": lambda r: r - 1 - math.log(r),
}


def naive_rejection(logp, old_logp, mask, kind, lower, upper, level, reduction):
    """One token or one row after another."""
    keep = torch.zeros_like(mask)
    for b in range(len(logp)):
        ratios = {
            t: math.exp(logp[b, t] - old_logp[b, t]) for t in mask[b].nonzero().flatten().tolist()
        }
        for t, ratio in ratios.items():
            score = MEASURES[kind](ratio)
            if level == "sequence" and kind == "k1":
                power = 1 if reduction == "sum" else 1 / len(ratios)
                score = math.prod(ratios.values()) ** power
            elif level == "sequence":
                each = list(map(MEASURES[kind], ratios.values()))
                score = {"sum": sum(each), "mean": sum(each) / len(each), "max": max(each)}[
                    reduction
                ]
            keep[b, t] = (lower is None or score >= lower) and (upper is None or score <= upper)
    return keep


CASES = [
    ("k1", "token", None, 0.7, 1.4),
    ("k1", "token", None, 0.8, None),
    ("k2", "token", None, None, 0.05),
    ("k3", "token", None, None, 0.04),
    ("k1", "sequence", "sum", 0.6, 1.6),
    ("k1", "sequence", "mean", 0.9, 1.2),
    ("k2", "sequence", "sum", None, 0.3),
    ("k2", "sequence", "mean", None, 0.08),
    ("k2", "sequence", "max", None, 0.15),
    ("k3", "sequence", "sum", None, 0.3),
    ("k3", "sequence", "mean", None, 0.08),
    ("k3", "sequence", "max", None, 0.15),
]


@pytest.mark.parametrize("kind, level, reduction, lower, upper", CASES)
def test_rejection_is_its_definition_in_rows_and_packed(rows, kind, level, reduction, lower, upper):
    logp, old_logp, _, mask = rows
    want = naive_rejection(logp, old_logp, mask, kind, lower, upper, level, reduction)
    assert want[mask].any() and not want[mask].all()
    options = {"kind": kind, "lower": lower, "upper": upper, "level": level, "reduction": reduction}
    got = rl.rejection_mask(logp, old_logp, mask, **options)
    assert torch.equal(got, want)
    if level == "sequence":
        options["cu_seqlens"] = CU_SEQLENS
    packed = rl.rejection_mask(logp.flatten(), old_logp.flatten(), mask.flatten(), **options)
    assert torch.equal(packed, want.flatten())


def test_what_a_sequence_is_reduced_by_follows_from_the_kind(rows):
    logp, old_logp, _, mask = rows

    def of(kind, reduction=None, level="sequence", **bounds):
        return rl.rejection_mask(
            logp, old_logp, mask, kind=kind, level=level, reduction=reduction, **bounds
        )

    assert torch.equal(of("k1", upper=1.2), of("k1", "sum", upper=1.2))
    assert torch.equal(of("k3", upper=0.08), of("k3", "mean", upper=0.08))
    geometric = of("geometric", level="token", lower=0.9, upper=1.2)
    assert torch.equal(geometric, of("k1", "mean", lower=0.9, upper=1.2))
    assert not torch.equal(of("k1", upper=1.2), geometric)


def test_a_token_without_a_recorded_logp_is_kept():
    old_logp = torch.tensor([[NAN, -9.0]])
    kept = rl.rejection_mask(torch.tensor([[-1.0, -1.0]]), old_logp, kind="k1", upper=2.0)
    assert kept.tolist() == [[True, False]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "k4", "upper": 1.0}, "unknown kind 'k4'"),
        ({"kind": "k1"}, "a bound is needed"),
        ({"kind": "k2", "lower": 0.1}, "of which lower bounds nothing"),
        ({"kind": "k1", "lower": 2.0, "upper": 1.0}, "lower must not be above upper"),
        ({"kind": "k1", "upper": -1.0}, "upper must be positive"),
        ({"kind": "k2", "upper": 1.0, "reduction": "max"}, "set level to 'sequence'"),
        ({"kind": "k2", "upper": 1.0, "level": "word"}, "unknown level 'word'"),
        ({"kind": "k1", "upper": 1.0, "level": "sequence", "reduction": "max"}, "take kind 'k2'"),
        ({"kind": "geometric", "upper": 1.0, "reduction": "sum"}, "is a mean already"),
        ({"kind": "k2", "upper": 1.0, "cu_seqlens": CU_SEQLENS}, "cu_seqlens goes with"),
    ],
)
def test_a_rejection_that_makes_no_sense_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        rl.rejection_mask(*rows[:2], **options)


def test_sequences_that_the_policy_left_behind_are_dropped_if_they_were_bad(rows):
    logp, old_logp, advantage, mask = rows
    threshold, want = 0.02, mask.clone()
    for b in range(len(logp)):
        gaps = (old_logp[b] - logp[b])[mask[b]]
        if advantage[b] < 0 and len(gaps) and gaps.mean() > threshold:
            want[b] = False
    assert (want != mask).any()
    bad = (advantage < 0) & mask.any(1)
    assert want[bad].any()
    got = rl.off_policy_mask(logp, old_logp, advantage, mask, threshold=threshold)
    assert torch.equal(got, want)
    packed = rl.off_policy_mask(
        logp.flatten(), old_logp.flatten(), advantage.repeat_interleave(5), mask.flatten(),
        threshold=threshold, cu_seqlens=CU_SEQLENS,
    )  # fmt: skip
    assert torch.equal(packed, want.flatten())


def test_off_policy_sequences_are_trls(rows):
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    logp, old_logp, advantage, mask = (x.nan_to_num(0, 0, 0) for x in rows)
    theirs = trl.GRPOTrainer.get_off_policy_mask(advantage[:, None], logp, old_logp, mask, 0.02)
    ours = rl.off_policy_mask(logp, old_logp, advantage, mask, threshold=0.02)
    assert torch.equal(ours, mask & theirs.bool())


@pytest.mark.parametrize("threshold", [1e-6, 0.02, 0.05, 10.0])
def test_the_second_moment_is_bounded_by_dropping_the_fewest_tokens(rows, threshold):
    logp, old_logp, advantage, mask = rows
    left = [  # (log r)^2, place
        ((logp[b, t] - old_logp[b, t]).item() ** 2, (b, t))
        for b, t in mask.nonzero().tolist()
        if advantage[b] * (logp[b, t] - old_logp[b, t]) > 0
    ]
    want = mask.clone()
    while left and sum(square for square, _ in left) / len(left) > threshold:
        worst = max(left)
        left.remove(worst)
        want[worst[1]] = False
    got = rl.second_moment_mask(logp, old_logp, advantage, mask, threshold=threshold)
    assert torch.equal(got, want)
    assert (threshold == 10.0) == torch.equal(want, mask)


def test_a_second_moment_at_its_bound_is_within_it():
    logp, old_logp = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.25, -1.25, -1.5])
    for threshold, kept in (
        (0.0625, [True, True, False]),
        (0.125, [True] * 3),
        (0.06, [False] * 3),
    ):
        got = rl.second_moment_mask(logp, old_logp, torch.ones(3), threshold=threshold)
        assert got.tolist() == kept


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_the_highest_entropies_are_kept(share, rows):
    torch.manual_seed(1)
    mask = rows[3]
    entropy = torch.rand(6, 5)
    least = torch.quantile(entropy[mask].double(), 1 - share)
    want = mask & (entropy >= least)
    entropy[~mask] = NAN
    assert torch.equal(rl.high_entropy_mask(entropy, mask, top_entropy_quantile=share), want)
    assert want.sum() >= 1 and (share == 1) == torch.equal(want, mask)


def test_no_token_and_equal_entropies():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    entropy = torch.ones(2, 3)
    assert not rl.high_entropy_mask(entropy, nothing, top_entropy_quantile=0.2).any()
    assert rl.high_entropy_mask(entropy, top_entropy_quantile=0.2).all()
    with pytest.raises(ValueError, match=r"top_entropy_quantile must be in \[0, 1\], got 1.5"):
        rl.high_entropy_mask(entropy, top_entropy_quantile=1.5)
