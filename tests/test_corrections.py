"""Weights and masks made before a policy loss: importance weights, Clip-Cov and KL-Cov."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cases import batch, policy_inputs

import rlcore as rl

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def naive_weights(old, sampling, mask, level, mode, low, high):
    """One row of (B, T) after another."""
    weights = torch.zeros_like(old)
    for b in range(len(old)):
        counted = mask[b].nonzero().flatten().tolist()
        for t in counted:
            of = counted if level == "sequence" else [t]
            w = math.exp(sum(old[b, i].item() - sampling[b, i].item() for i in of))
            if mode == "truncate":
                w = min(max(w, low), high)
            elif not low <= w <= high:
                w = 0.0
            weights[b, t] = w
    return weights


@pytest.mark.parametrize("low, high", [(0.0, 2.0), (0.5, 1.5), (0.0, math.inf)])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_their_definition_in_rows_and_packed(level, mode, low, high):
    old, sampling = -torch.rand(2, 6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.7
    mask[2] = False
    options = {"level": level, "mode": mode, "low": low, "high": high}
    want = naive_weights(old, sampling, mask, **options)
    old[~mask], sampling[~mask] = NAN, -math.inf
    got = rl.importance_weights(old, sampling, mask=mask, **options)
    torch.testing.assert_close(got, want)
    if level == "sequence":
        options["cu_seqlens"] = torch.arange(0, 31, 5, dtype=torch.int32)
    packed = rl.importance_weights(
        old.flatten(), sampling.flatten(), mask=mask.flatten(), **options
    )
    torch.testing.assert_close(packed, want.flatten())


def test_a_token_without_a_sampling_logp_has_weight_one():
    old, sampling = torch.tensor([[-1.0, -2.0]]), torch.tensor([[NAN, -1.5]])
    weights = rl.importance_weights(old, sampling)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(-0.5)]]))


def test_importance_weights_carry_no_gradient_and_are_float32():
    old = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    weights = rl.importance_weights(old, old)
    assert not weights.requires_grad and weights.dtype == torch.float32


def test_importance_weights_correct_the_mean_under_another_sampler():
    policy, sampler, reward = torch.randn(3, 9, dtype=torch.float64)
    policy, sampler = torch.log_softmax(policy, 0), torch.log_softmax(sampler, 0)
    weights = rl.importance_weights(policy, sampler, high=math.inf)
    torch.testing.assert_close(sampler.exp() @ (weights * reward), policy.exp() @ reward)


def test_they_weigh_the_surrogate_of_a_policy_loss():
    inputs = policy_inputs(batch(3, 4, 20, torch.float64), "old_logp", "mask", masked=0.3)
    old, mask = inputs.options["old_logp"], inputs.options["mask"]
    weights = rl.importance_weights(old, old - 0.5, mask=mask, high=10.0)
    arguments = (inputs.logits, inputs.target, inputs.advantage)
    plain = rl.policy_loss(*arguments, **inputs.options)
    weighed = rl.policy_loss(*arguments, **inputs.options, importance_sampling_ratio=weights)
    torch.testing.assert_close(weighed.loss, plain.loss * math.exp(0.5))


def covariances(logp, advantage, mask):
    counted = [(logp[i].item(), advantage[i].item()) for i in mask.nonzero().flatten().tolist()]
    mean_logp = sum(x for x, _ in counted) / len(counted)
    mean_advantage = sum(a for _, a in counted) / len(counted)
    return torch.tensor([(x - mean_logp) * (a - mean_advantage) for x, a in counted])


@pytest.mark.parametrize("fraction, count", [(0.1, 5), (0.099, 4), (1e-6, 1), (1.0, 50)])
def test_kl_cov_takes_the_tokens_of_the_largest_covariance(fraction, count):
    logp, advantage = -torch.rand(80) * 3, torch.randn(80)
    mask = torch.zeros(80).bool()
    mask[torch.randperm(80)[:50]] = True
    cov = covariances(logp, advantage, mask)
    logp[~mask] = advantage[~mask] = NAN
    chosen = rl.kl_cov_mask(logp, advantage, mask=mask, fraction=fraction)
    assert not chosen[~mask].any() and chosen.sum() == count
    picked = chosen[mask]
    assert cov[picked].min() >= (cov[~picked].max() if count < 50 else -math.inf)


def test_clip_cov_zeroes_a_random_few_between_its_bounds():
    logp, advantage = -torch.rand(4, 50) * 6, torch.randn(4)
    mask = torch.rand(4, 50) < 0.8
    spread = advantage[:, None].expand(4, 50)
    cov = torch.zeros(4, 50)
    cov[mask] = covariances(logp.flatten(), spread.flatten(), mask.flatten())
    logp[~mask] = NAN
    between = mask & (cov > 0.3) & (cov < 1.0)
    options = {"mask": mask, "fraction": 0.05, "low": 0.3, "high": 1.0}
    picks = []
    for number in (0, 0, 1):
        generator = torch.Generator().manual_seed(number)
        weight = rl.clip_cov_weight(logp, advantage, generator=generator, **options)
        assert set(weight.unique().tolist()) == {0.0, 1.0}
        assert (weight == 0).sum() == int(0.05 * mask.sum()) < between.sum()
        assert between[weight == 0].all()
        picks.append(weight)
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])


def test_clip_cov_without_a_token_between_its_bounds_leaves_all():
    weight = rl.clip_cov_weight(torch.zeros(6), torch.ones(6), fraction=0.5)
    assert weight.tolist() == [1.0] * 6


@pytest.mark.parametrize("function", [rl.clip_cov_weight, rl.kl_cov_mask])
def test_with_every_token_masked_nothing_is_chosen(function):
    nothing = torch.full((5,), NAN)
    out = function(nothing, nothing, mask=torch.zeros(5).bool())
    assert (out == 1).all() if out.is_floating_point() else not out.any()


def test_clip_cov_stops_the_gradient_of_what_it_chose():
    inputs = policy_inputs(batch(2, 10, 20, torch.float32), "old_logp")
    weight = torch.ones(2, 10)
    weight[0, 3] = weight[1, 7] = 0
    z = inputs.logits.requires_grad_()
    out = rl.policy_loss(
        z, inputs.target, inputs.advantage, importance_sampling_ratio=weight,
        old_logp=inputs.options["old_logp"], epsilon=math.inf,
    )  # fmt: skip
    dz = torch.autograd.grad(out.loss, z)[0]
    assert torch.equal(dz.any(-1), weight.bool())


def test_kl_covs_two_losses_are_its_definition():
    inputs = policy_inputs(batch(3, 6, 20, torch.float64), "old_logp", "mask", masked=0.3)
    old, mask = inputs.options["old_logp"].double(), inputs.options["mask"]
    z = inputs.logits.requires_grad_()
    chosen = rl.kl_cov_mask(old, inputs.advantage, mask=mask, fraction=0.3)
    arguments = (z, inputs.target, inputs.advantage)
    shared = {"old_logp": old, "num_items": int(mask.sum())}
    others = rl.policy_loss(*arguments, mask=mask & ~chosen, epsilon=math.inf, **shared).loss
    penalized = rl.policy_loss(*arguments, mask=mask & chosen, surrogate="kl_cov", **shared).loss
    log_ratio = rl.token_logprob(z, inputs.target).logp - old
    loss = -log_ratio.exp() * inputs.advantage + torch.where(chosen, log_ratio.abs(), 0)
    want = loss[mask].mean()
    torch.testing.assert_close(others + penalized, want)
    got = torch.autograd.grad(others + penalized, z, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, z)[0])


FOUR, ROWS = torch.zeros(4), torch.zeros(2, 2)
BAD_WEIGHTS = {
    "level": ((FOUR, FOUR), {"level": "word"}, "unknown level 'word'.*sequence, token"),
    "mode": ((FOUR, FOUR), {"mode": "msk"}, "unknown mode 'msk'.*'mask'"),
    "bounds": ((FOUR, FOUR), {"low": 3.0}, "low and high.*3.0 and 2.0"),
    "negative bound": ((FOUR, FOUR), {"low": -1.0}, "low and high.*-1.0"),
    "packed": ((FOUR, FOUR), {"level": "sequence"}, "cu_seqlens.*packed"),
    "cu_seqlens of rows": (
        (ROWS, ROWS),
        {"level": "sequence", "cu_seqlens": torch.tensor([0, 4])},
        "cu_seqlens",
    ),
    "shape": ((FOUR, ROWS), {}, r"sampling_logp.*\(4,\).*\(2, 2\)"),
    "mask": ((FOUR, FOUR), {"mask": torch.ones(4)}, "mask.*bool"),
}
BAD_COVARIANCES = {
    "fraction zero": ((FOUR, FOUR), {"fraction": 0.0}, "fraction.*0.0"),
    "fraction above one": ((FOUR, FOUR), {"fraction": 1.5}, "fraction.*1.5"),
    "shape": ((FOUR, ROWS), {}, r"advantage.*\(4,\).*\(2, 2\)"),
    "mask": ((FOUR, FOUR), {"mask": torch.ones(3).bool()}, r"mask.*\(4,\).*\(3,\)"),
}


@pytest.mark.parametrize("given, options, message", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_arguments_of_importance_weights_are_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        rl.importance_weights(*given, **options)


@pytest.mark.parametrize("given, options, message", BAD_COVARIANCES.values(), ids=BAD_COVARIANCES)
@pytest.mark.parametrize("function", [rl.clip_cov_weight, rl.kl_cov_mask])
def test_bad_arguments_of_the_covariance_choices_are_named(function, given, options, message):
    with pytest.raises(ValueError, match=message):
        function(*given, **options)


def test_clip_covs_bounds_must_be_in_order():
    with pytest.raises(ValueError, match=r"low.*high"):
        rl.clip_cov_weight(FOUR, FOUR, low=5.0, high=1.0)


def test_a_banned_token_spoils_no_other():
    old, sampling = torch.tensor([[-math.inf, -1.0]]), torch.tensor([[-math.inf, -1.5]])
    want = torch.tensor([[1.0, math.exp(0.5)]])
    torch.testing.assert_close(rl.importance_weights(old, sampling), want)
    shared = rl.importance_weights(old, sampling, level="sequence")
    torch.testing.assert_close(shared, torch.full((1, 2), math.exp(0.5)))
    logp = torch.tensor([-math.inf, -3.0, -1.0, -2.0])
    advantage = torch.tensor([0.0, -1.0, 1.0, 0.0])
    chosen = rl.kl_cov_mask(logp, advantage, fraction=0.5)
    without = rl.kl_cov_mask(logp[1:], advantage[1:], fraction=1 / 3)
    assert chosen.tolist() == [False, *without.tolist()] and chosen.sum() == 1


@pytest.mark.parametrize("low, high", [(1.0, 1.2), (0.8, 1.2), (0.0, math.inf)])
def test_the_future_kls_weight_is_its_definition(low, high):
    logp, old_logp = -torch.rand(2, 5, 6, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1, 5])[:, None]
    want, inside = torch.zeros_like(logp), 0
    for b in range(5):
        for t in mask[b].nonzero().flatten().tolist():
            future = sum(
                2 ** (-(k - t) / 3) * (logp[b, k] - old_logp[b, k]).item()
                for k in range(t, int(mask[b].sum()))
            )
            want[b, t] = min(max(math.exp(future), low), high)
            inside += low < want[b, t] < high
    assert inside
    logp[~mask] = NAN
    got = rl.future_kl_weight(logp, old_logp, mask, half_life=3.0, low=low, high=high)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"logp must be \(B, T\), not \(6,\)"):
        rl.future_kl_weight(logp[0], old_logp[0])
    with pytest.raises(ValueError, match=r"0 <= low <= high, got 2\.0 and 1\.2"):
        rl.future_kl_weight(logp, old_logp, low=2.0)
