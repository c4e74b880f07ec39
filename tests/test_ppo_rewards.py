"""What PPO makes of a judged batch: rewards, advantages and coefficients by hand; its options."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import actor_critic as make
from helpers import grpo as grpo_make
from helpers.tiny import tiny_model

import rlcore as rl
from rlcore.errors import UserError
from rlcore.trainers.options.ppo import check_ppo_config
from rlcore.trainers.ppo import _adapt, _experience
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.credit import whitened
from rlcore.trainers.shared.critic import explained_variance
from rlcore.trainers.shared.policies import Policy

SCORES = [1.0, 0.0, float("nan"), 2.0, -1.0, 0.5, 1.5, 0.0]
TRUNCATED = torch.tensor([True, False, False, False, True, False, False, True])


def sampled(made):
    return Sampled(made, TRUNCATED, torch.tensor(SCORES), 0, {})


def judged(tmp_path, made, **changes):
    """(experience, metrics) that PPO makes of a sampled batch, with a reference."""
    run, critic = make.make_run(make.ppo_config(tmp_path, kl_coef=0.1, **changes))
    reference = Policy(tiny_model("gpt2", seed=5), run.head)
    run.coefficients = {"kl_coef": 0.1}
    return _experience(run, critic, reference, sampled(made))


def naive_rows(made, bootstrap=False, gamma=0.9, lam=0.8, penalty=0.0):
    """Each judged row's (rewards, advantages), one token at a time."""
    logp = grpo_make.naive_logp(tiny_model("gpt2"), made, 1.0)[0].detach()
    ref_logp = grpo_make.naive_logp(tiny_model("gpt2", seed=5), made, 1.0)[0].detach()
    states = make.naive_states(make.tiny_classifier(), made).detach()
    rows = {}
    for row, score in enumerate(SCORES):
        places = made.mask[row].nonzero().squeeze(1).tolist()
        if score != score or not places:
            continue
        first = made.attention_mask.shape[1] - made.mask.shape[1]
        value = [states[row, first + t - 1].item() for t in places]
        reward = [-0.1 * (logp - ref_logp)[row, t].item() for t in places]
        going_on = bootstrap and bool(TRUNCATED[row])
        reward[-1] += -penalty if going_on else score
        following = states[row, first + places[-1]].item() if going_on else 0.0
        advantage, tail = [], 0.0
        for t in reversed(range(len(places))):
            delta = reward[t] + gamma * following - value[t]
            tail = delta + gamma * lam * tail
            advantage.insert(0, tail)
            following = value[t]
        rows[row] = (places, reward, value, advantage)
    return rows


@pytest.mark.parametrize("bootstrap", [False, True])
def test_rewards_and_advantages_are_the_recursions(tmp_path, bootstrap):
    made = grpo_make.experience()
    options = {"missing_eos_penalty": 0.3} if bootstrap else {}
    experience, _ = judged(
        tmp_path, made, gamma=0.9, lam=0.8, whiten_advantages=False,
        bootstrap_truncated=bootstrap, **options,
    )  # fmt: skip
    rows = naive_rows(made, bootstrap, penalty=0.3)
    # row 2 was not judged, row 3 is out of the loss
    assert sorted(rows) == [0, 1, 4, 5, 6, 7]
    assert torch.equal(experience.mask.any(1).nonzero().squeeze(1), torch.tensor(sorted(rows)))
    for row, (places, _, value, advantage) in rows.items():
        expected = torch.tensor(advantage)
        assert torch.allclose(experience.advantage[row, places], expected, atol=1e-4)
        expected = expected + torch.tensor(value)
        assert torch.allclose(experience.returns[row, places], expected, atol=1e-4)


def test_whitened_advantages_have_mean_zero_and_variance_one(tmp_path):
    made = grpo_make.experience()
    plain, _ = judged(tmp_path, made, whiten_advantages=False)
    experience, _ = judged(tmp_path, made)
    assert torch.equal(experience.returns, plain.returns)
    expected = rl.whiten(plain.advantage, plain.mask)
    assert torch.allclose(experience.advantage, expected, atol=1e-6)
    counted = experience.advantage[experience.mask]
    assert counted.mean().abs() < 1e-5 and counted.std() == pytest.approx(1.0, rel=1e-4)


def test_whitened_rewards_keep_their_mean(tmp_path, monkeypatch):
    seen, gae = [], rl.gae

    def spy(reward, *arguments, **options):
        seen.append(reward)
        return gae(reward, *arguments, **options)

    monkeypatch.setattr(rl, "gae", spy)
    made = grpo_make.experience()
    experience, metrics = judged(tmp_path, made)
    judged(tmp_path, made, whiten_rewards=True)
    plain, white = (reward[experience.mask] for reward in seen)
    assert white.std().item() == pytest.approx(1.0, rel=1e-4) != plain.std().item()
    assert white.mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(plain.sum().item() / 6, rel=1e-5)


def test_the_objectives_metrics_are_means_over_judged_completions(tmp_path):
    made = grpo_make.experience()
    _, metrics = judged(tmp_path, made)
    rows = naive_rows(made)
    logp = grpo_make.naive_logp(tiny_model("gpt2"), made, 1.0)[0]
    scores = sum(SCORES[row] for row in rows) / 6
    total = sum(sum(reward) for _, reward, _, _ in rows.values()) / 6
    assert metrics["objective/scores"] == pytest.approx(scores)
    assert metrics["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(total - scores, abs=1e-5)
    assert metrics["objective/kl"] == pytest.approx((scores - total) / 0.1, abs=1e-4)
    entropy = -sum(logp[row, places].sum().item() for row, (places, *_) in rows.items()) / 6
    assert metrics["objective/entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["val/num_eos_tokens"] == 5


def test_a_value_model_that_knows_the_returns_explains_their_variance(tmp_path):
    made = make.experience()
    run, _ = make.make_run(make.ppo_config(tmp_path))
    noise = (made.returns - made.value)[made.mask].var() / made.returns[made.mask].var()
    found = explained_variance(run, made)
    assert found == pytest.approx(1 - noise.item(), rel=1e-4)
    perfect = dataclasses.replace(made, value=made.returns)
    assert explained_variance(run, perfect) == pytest.approx(1.0)


def test_the_coefficients_follow_the_papers_rules(tmp_path):
    made = make.experience(old=0.5)
    options = {"kl_coef": 0.1, "kl_target": 6.0, "kl_mode": "penalty", "penalty_target": 1e-3}
    run, _ = make.make_run(make.ppo_config(tmp_path, **options))
    run.coefficients = {"kl_coef": 0.2, "penalty_coef": 3.0}
    metrics = {"objective/kl": 60.0}
    _adapt(run, 1, made, metrics)
    # both far too far: 20% of error at a gain of 0.1, and doubled
    assert run.coefficients == pytest.approx({"kl_coef": 0.204, "penalty_coef": 6.0})
    logp = grpo_make.naive_logp(tiny_model("gpt2"), made, 1.0)[0]
    log_ratio = (logp - made.old_logp)[made.mask]
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert metrics["policy/kl"] == pytest.approx(expected, rel=1e-4)
    still = make.experience(old=0.0)
    _adapt(run, 1, still, {"objective/kl": 0.0})
    assert run.coefficients == pytest.approx({"kl_coef": 0.204 * 0.98, "penalty_coef": 3.0})


def test_the_penalty_never_vanishes_and_a_warm_up_adapts_nothing(tmp_path):
    made = make.experience(old=0.0)
    run, _ = make.make_run(make.ppo_config(tmp_path, kl_mode="penalty", value_warmup_steps=3))
    run.coefficients = {"penalty_coef": 1.5e-6}
    _adapt(run, 3, made, {})
    assert run.coefficients["penalty_coef"] == 1.5e-6
    _adapt(run, 4, made, {})
    assert run.coefficients["penalty_coef"] == 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kl_mode": "clp"}, "unknown kl_mode 'clp'. Did you mean 'clip'"),
        ({"kl_estimator": "k4"}, "unknown kl_estimator"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
        ({"num_mini_batches": 0}, "num_mini_batches must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"cliprange": 0.0}, "cliprange must be positive"),
        ({"cliprange_value": -1.0}, "cliprange_value must be positive"),
        ({"target_kl": 0.0}, "target_kl must be positive"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\]"),
        ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target is set, but has no effect here"),
        ({"kl_gain": 0.2}, "without a kl_target kl_coef is fixed"),
        ({"kl_target": 6.0, "kl_gain": 5.0}, "kl_gain must be below 5"),
        ({"penalty_coef": 2.0}, "penalty_coef is set, but .* goes with kl_mode 'penalty'"),
        ({"kl_mode": "penalty", "cliprange": 0.1}, "cliprange is set, but .* kl_mode 'clip'"),
        ({"vf_coef": 0.5}, "vf_coef is set, but has no effect here"),
        ({"value_backbone": "shard"}, "unknown value_backbone 'shard'. Did you mean 'shared'"),
        ({"value_backbone": "shared", "value_model": "x"}, "value_model is set, but"),
        ({"value_backbone": "shared", "value_warmup_steps": 1}, "needs value_backbone own"),
        ({"kl_coef": 0.0, "ref_model": "x"}, "with kl_coef 0 no reference is used"),
        ({"value_learning_rate": 0.0}, "value_learning_rate must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_ppo_config(make.ppo_config(tmp_path, **({"kl_coef": 0.1} | changes)), 1)


def test_the_default_options_are_fine(tmp_path):
    for kl_mode in ("clip", "penalty"):
        check_ppo_config(make.ppo_config(tmp_path, kl_coef=0.05, kl_mode=kl_mode), 1)


def test_a_mask_padded_to_the_other_processes_length_stays_bool():
    mask = torch.tensor([[True, False, True]])

    class Accelerator:
        process_index = 0

        def pad_across_processes(self, x, dim):
            # accelerate's own: zeros of x's dtype plus an integer
            padded = x.new_zeros(len(x), x.shape[1] + 1) + 0
            padded[:, :-1] = x
            return padded

        def gather(self, x):
            return x

    run = SimpleNamespace(accelerator=Accelerator())
    got = whitened(run, torch.tensor([[1.0, 9.0, 3.0]]), mask)
    torch.testing.assert_close(got, torch.tensor([[-(0.5**0.5), 0.0, 0.5**0.5]]))
