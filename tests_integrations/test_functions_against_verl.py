"""rlcore's own functions, from the logits on, against verl's core_algos in float64."""

from __future__ import annotations

import math

import pytest
import torch
import verl
import verl.trainer.ppo.core_algos as core
import verl.utils.torch_functional as functional
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig, PolicyLossConfig

import rlcore as rl

VERSION = tuple(int(part) for part in verl.__version__.split(".")[:3])
CLIP = {"epsilon": 0.15, "epsilon_high": 0.3}
# verl divides by counts + 1e-8
CLOSE = {"rtol": 1e-7, "atol": 1e-10}
ROWS, LENGTH, VOCABULARY = 6, 8, 13
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
if VERSION >= (0, 7, 1):  # 0.7.0 does not divide it by the number of sequences
    MODES.append("seq-mean-token-sum-norm")
# verl averages these over sequences whatever the mode
BY_SEQUENCE = {"sapo", "geo_mean"} | ({"gspo"} if VERSION < (0, 9, 1) else set())


@pytest.fixture
def batch():
    generator = torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = draw(ROWS, LENGTH, VOCABULARY)
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    old_logp = logprobs(logits + 0.3 * draw(ROWS, LENGTH, VOCABULARY), target)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    mask[:, 0] = True
    return {
        "logits": logits.requires_grad_(),
        "target": target,
        "old_logp": old_logp,
        "mask": mask,
        "advantage": draw(ROWS),
    }


def logprobs(logits, target):
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def verls_loss(name: str, batch, mode: str = "token-mean", weights=None, clip=CLIP, **policy_loss):
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=clip["epsilon"],
        clip_ratio_high=clip["epsilon_high"],
        policy_loss=PolicyLossConfig(**policy_loss),
    )
    logits = batch["logits"]
    loss, _ = core.get_policy_loss_fn(name)(
        old_log_prob=batch["old_logp"],
        log_prob=logprobs(logits, batch["target"]),
        advantages=batch["advantage"][:, None].expand(ROWS, LENGTH).clone(),
        response_mask=batch["mask"],
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    return loss.detach(), *torch.autograd.grad(loss, logits)


def our_loss(batch, **options):
    arguments = {**batch, **options}
    loss = rl.policy_loss(**arguments).loss
    return loss.detach(), *torch.autograd.grad(loss, batch["logits"])


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


SEQUENCE = {"importance_sampling_level": "sequence"}
SURROGATES = {
    "vanilla": {"surrogate": "ppo_clip", "delta": 3.0, **CLIP},
    "gspo": {"surrogate": "ppo_clip", **CLIP, **SEQUENCE},
    "cispo": {"surrogate": "cispo", **CLIP},
    "sapo": {"surrogate": "sapo"},
    "geo_mean": {"surrogate": "gmpo", **CLIP, **SEQUENCE},
    "gpg": {"surrogate": "reinforce", "old_logp": None},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SURROGATES)
def test_policy_loss_and_its_gradient_in_the_logits(batch, name, mode):
    want = verls_loss(name, batch, mode)
    if name in BY_SEQUENCE:
        mode = "seq-mean-token-mean"
    assert want[1].abs().max() > 1e-3
    assert_same(our_loss(batch, **SURROGATES[name], loss_agg_mode=mode), want)


@pytest.mark.parametrize("name", ["vanilla", "cispo", "sapo", "gpg"])
def test_importance_weights_of_the_sampler(batch, name):
    weights = 0.5 + torch.rand(ROWS, LENGTH, dtype=torch.float64)
    mode = "seq-mean-token-mean"
    want = verls_loss(name, batch, mode, weights)
    options = {"importance_sampling_ratio": weights, "loss_agg_mode": mode}
    assert_same(our_loss(batch, **SURROGATES[name], **options), want)


@pytest.mark.skipif("dppo_tv" not in core.POLICY_LOSS_REGISTRY, reason="verl 0.7.0 has none")
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_has_verls_gradient_and_a_value_of_its_own(batch, name):
    """The gradient is -r A on the tokens kept by both. Ours is also the gradient of the value, the
    paper's -r A; verl's value is -r A log pi with r held constant, which is no estimate of it."""
    near = {"epsilon": 0.003, "epsilon_high": 0.004}
    value, gradient = verls_loss(name, batch, clip=near)
    got, our_gradient = our_loss(batch, surrogate=name, **near)
    dropped = rl.policy_loss(**batch, surrogate=name, **near).clipped
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(our_gradient, gradient, **CLOSE)
    assert abs(got - value) > 0.01


def test_kl_cov_by_two_losses_that_share_num_items(batch):
    want = verls_loss("kl_cov", batch, kl_cov_ratio=0.2, ppo_kl_coef=0.7)
    mask, advantage = batch["mask"], batch["advantage"]
    logp = logprobs(batch["logits"], batch["target"]).detach()
    chosen = rl.kl_cov_mask(logp, advantage, mask=mask, fraction=0.2)
    share = {"num_items": int(mask.sum())}
    others = our_loss(batch | {"mask": mask & ~chosen}, epsilon=math.inf, **share)
    penalty = {"surrogate": "kl_cov", "surrogate_params": {"kl_coef": 0.7}}
    penalized = our_loss(batch | {"mask": mask & chosen}, **penalty, **share)
    assert_same([a + b for a, b in zip(others, penalized, strict=True)], want)


def test_clip_cov_where_every_candidate_is_dropped(batch):
    """Which of the candidates are dropped is a draw; with fraction 1 it is all of them."""
    logp = logprobs(batch["logits"], batch["target"]).detach()
    batch["old_logp"] = logp
    bounds = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.0}
    want = verls_loss("clip_cov", batch, **bounds)
    weight = rl.clip_cov_weight(
        logp, batch["advantage"], mask=batch["mask"], fraction=1.0, low=0.1, high=1.0
    )
    assert 0 < (weight == 0).sum() < batch["mask"].sum()
    assert_same(our_loss(batch, importance_sampling_ratio=weight, **CLIP), want)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_kl_and_its_gradient(batch, estimator):
    logp = logprobs(batch["logits"], batch["target"]).detach().requires_grad_()

    def run(kl):
        return kl.detach(), *torch.autograd.grad(kl.sum(), logp)

    want = run(core.kl_penalty(logp, batch["old_logp"], estimator))
    assert_same(run(rl.token_kl(logp, batch["old_logp"], kl_estimator=estimator)), want)


def test_value_loss_and_its_gradient(batch):
    value, old_value, returns = torch.randn(3, ROWS, LENGTH, dtype=torch.float64)
    value.requires_grad_()
    mask = batch["mask"]

    def run(loss):
        return loss.detach(), *torch.autograd.grad(loss, value)

    want = run(core.compute_value_loss(value, returns, old_value, mask, 0.2)[0])
    assert_same(run(rl.value_loss(value, old_value, returns, epsilon=0.2, mask=mask)), want)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(batch, shift_mean):
    x, mask = torch.randn(ROWS, LENGTH, dtype=torch.float64), batch["mask"]
    want = functional.masked_whiten(x, mask, shift_mean=shift_mean)
    got = rl.whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-7, atol=1e-8)


def test_shaped_reward_with_the_score_on_the_last_token(batch):
    logp = logprobs(batch["logits"], batch["target"]).detach()
    mask, score = batch["mask"], batch["advantage"]
    last = LENGTH - 1 - mask.flip(1).int().argmax(1)
    scores = torch.zeros_like(logp)
    scores[torch.arange(ROWS), last] = score
    want = core.compute_rewards(scores, logp, batch["old_logp"], 0.3)
    got = rl.shaped_reward(score, logp, batch["old_logp"], mask, beta=0.3)
    torch.testing.assert_close(got[mask], want[mask], **CLOSE)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights(batch, level):
    logp = logprobs(batch["logits"], batch["target"]).detach()
    mask = batch["mask"]
    want, _ = compute_rollout_correction_weights(
        logp - batch["old_logp"], mask, rollout_is=level, rollout_is_threshold=1.2
    )
    got = rl.importance_weights(logp, batch["old_logp"], mask=mask, level=level, high=1.2)
    assert (got[mask] == 1.2).any() and (got[mask] < 1.2).any()
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.skipif(VERSION < (0, 8, 0), reason="verl had no lower bound")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_importance_weights(batch, level):
    logp = logprobs(batch["logits"], batch["target"]).detach()
    mask = batch["mask"]
    want, _ = compute_rollout_correction_weights(
        logp - batch["old_logp"], mask, rollout_is=level, rollout_is_threshold="0.9_1.2"
    )
    got = rl.importance_weights(
        logp, batch["old_logp"], mask=mask, level=level, mode="mask", low=0.9, high=1.2
    )
    assert (got[mask] == 0).any() and (got[mask] > 0).any()
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kl", [0.01, 0.09, 0.11, 5.0])
def test_the_proportional_kl_controller(kl):
    controller = core.AdaptiveKLController(0.2, target_kl=0.1, horizon=1000)
    controller.update(kl, n_steps=64)
    got = rl.proportional_kl_coef(0.2, kl, target=0.1, gain=64 / 1000)
    assert got == pytest.approx(controller.value, rel=1e-12)
