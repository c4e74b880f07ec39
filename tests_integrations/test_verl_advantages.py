"""rlcore's advantages under verl's registry and in its trainer's own call, against verl's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import verl
import verl.trainer.ppo.core_algos as core
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.ray_trainer import compute_advantage

from rlcore.integrations import verl as rl_verl

# verl divides by counts + 1e-8
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
# groups of 4, 3, 1 and 2, out of order
VERSION = tuple(int(part) for part in verl.__version__.split(".")[:3])
INDEX = np.array(["a", "b", "a", "c", "d", "b", "a", "d", "b", "a"], dtype=object)


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    rl_verl.register()


def random_batch(seed: int = 0, length: int = 12):
    """Rewards at the last counted token, and masks with tool tokens in between."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(INDEX)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    last = length - 1 - mask.flip(1).int().argmax(1)
    rewards = torch.zeros(rows, length, dtype=torch.float64)
    rewards[torch.arange(rows), last] = torch.randn(rows, generator=generator, dtype=torch.float64)
    return {"token_level_rewards": rewards, "response_mask": mask.long()}


def without_tool_tokens(batch):
    """Before 0.9 verl's reinforce_plus_plus stopped at the first masked token from the right."""
    if VERSION < (0, 9, 0):
        batch["response_mask"] = torch.ones_like(batch["response_mask"])
    return batch


def assert_same(got, want, mask):
    """On the tokens that count; on the others ours are 0, verl's whatever is carried across."""
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], **CLOSE)
        assert not ours[mask == 0].any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_is_verls(gamma, lam):
    batch = random_batch()
    values = torch.randn_like(batch["token_level_rewards"])
    want = core.compute_gae_advantage_return(**batch, values=values, gamma=gamma, lam=lam)
    estimator = core.get_adv_estimator_fn("rlcore_gae")
    mask = batch["response_mask"]
    assert_same(estimator(**batch, values=values, gamma=gamma, lam=lam), want, mask)
    config = AlgoConfig(gamma=gamma, lam=lam)
    assert_same(estimator(**batch, values=values, config=config), want, mask)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_group_estimators_are_verls(name):
    batch = random_batch(1)
    kept = batch["token_level_rewards"].clone()
    want = core.get_adv_estimator_fn(name)(**batch, index=INDEX)
    got = core.get_adv_estimator_fn(f"rlcore_{name}")(**batch, index=INDEX)
    assert_same(got, want, batch["response_mask"])
    assert torch.equal(batch["token_level_rewards"], kept)


def test_grpo_takes_std_and_epsilon_from_config_and_call():
    batch = random_batch(2)
    theirs, ours = core.get_adv_estimator_fn("grpo"), core.get_adv_estimator_fn("rlcore_grpo")
    mask = batch["response_mask"]
    want = theirs(**batch, index=INDEX, norm_adv_by_std_in_grpo=False)
    config = AlgoConfig(norm_adv_by_std_in_grpo=False)
    assert_same(ours(**batch, index=INDEX, config=config), want, mask)
    assert_same(ours(**batch, index=INDEX, norm_adv_by_std_in_grpo=False), want, mask)
    want = theirs(**batch, index=INDEX, epsilon=0.5)
    assert_same(ours(**batch, index=torch.tensor([0, 1, 0, 2, 3, 1, 0, 3, 1, 0]), epsilon=0.5),
                want, mask)  # fmt: skip


def test_grpo_gives_equal_rewards_exactly_zero():
    """verl's mean of three 0.1 is not 0.1, and 1e-6 in the place of a std makes 1e-2 of that."""
    rewards = torch.full((3, 1), 0.1)
    batch = {"token_level_rewards": rewards, "response_mask": torch.ones(3, 1)}
    advantage, _ = core.get_adv_estimator_fn("rlcore_grpo")(**batch, index=np.zeros(3))
    assert not advantage.any()


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_reinforce_plus_plus_is_verls(gamma):
    batch = without_tool_tokens(random_batch(3))
    config = AlgoConfig(gamma=gamma)
    want = core.get_adv_estimator_fn("reinforce_plus_plus")(**batch, config=config)
    got = core.get_adv_estimator_fn("rlcore_reinforce_plus_plus")(**batch, config=config)
    assert_same(got, want, batch["response_mask"])


def test_remax_is_verls():
    batch = random_batch(4)
    baselines = torch.randn(len(INDEX), dtype=torch.float64)
    want = core.get_adv_estimator_fn("remax")(**batch, reward_baselines=baselines)
    got = core.get_adv_estimator_fn("rlcore_remax")(**batch, reward_baselines=baselines)
    assert_same(got, want, batch["response_mask"])


def data_proto(batch, **tensors) -> DataProto:
    return DataProto.from_dict(
        tensors={name: x.clone() for name, x in batch.items()} | tensors,
        non_tensors={"uid": INDEX},
    )


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus"])
def test_verls_trainer_calls_ours_by_name(name):
    batch = without_tool_tokens(random_batch(5))
    config = AlgoConfig(gamma=0.9, lam=1.0)
    want, got = (
        compute_advantage(data_proto(batch), adv_estimator=adv_estimator, gamma=0.9, config=config)
        for adv_estimator in (name, f"rlcore_{name}")
    )
    keys = ("advantages", "returns")
    mask = batch["response_mask"]
    assert_same(*([data.batch[key] for key in keys] for data in (got, want)), mask)


def test_verls_trainer_serves_gae_by_ours_when_patched_and_says_why_not_by_name():
    batch = random_batch(6)
    values = torch.randn_like(batch["token_level_rewards"])
    config = AlgoConfig(gamma=0.9, lam=0.8)
    options = {"gamma": 0.9, "lam": 0.8, "config": config}

    def run(adv_estimator: str):
        data = data_proto(batch, values=values)
        data = compute_advantage(data, adv_estimator=adv_estimator, **options)
        return data.batch["advantages"], data.batch["returns"]

    want = run("gae")
    with rl_verl.patch():
        assert_same(run("gae"), want, batch["response_mask"])
    with pytest.raises(ValueError, match=r"leave it at gae and call .*patch\(\)"):
        run("rlcore_gae")
