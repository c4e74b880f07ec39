"""rlcore in verl's registries and in the place of its functions, against verl's own in float64."""

from __future__ import annotations

import pytest
import torch
import verl
import verl.trainer.ppo.core_algos as core
from verl.workers.config import ActorConfig, PolicyLossConfig

from rlcore.integrations import verl as rl_verl
from rlcore.integrations.verl.losses import LOSSES

VERSION = tuple(int(part) for part in verl.__version__.split(".")[:3])
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
if VERSION >= (0, 7, 1):  # 0.7.0 does not divide it by the number of sequences
    MODES.append("seq-mean-token-sum-norm")
if VERSION >= (0, 9, 0):
    MODES.append("token-sum")
# verl divides by counts + 1e-8
CLOSE = {"rtol": 1e-7, "atol": 1e-12}
PAIRS = {
    "rlcore_ppo": "vanilla",
    "rlcore_gspo": "gspo",
    "rlcore_cispo": "cispo",
    "rlcore_sapo": "sapo",
    "rlcore_geo_mean": "geo_mean",
    "rlcore_dppo_tv": "dppo_tv",
    "rlcore_dppo_kl": "dppo_kl",
    "rlcore_reinforce": "gpg",
    "rlcore_kl_cov": "kl_cov",
}
PAIRS = {ours: theirs for ours, theirs in PAIRS.items() if theirs in core.POLICY_LOSS_REGISTRY}
# before 0.9.1 verl's gspo averaged over sequences whatever the mode, as its sapo does
CASES = [
    (name, mode)
    for name in PAIRS
    for mode in MODES
    if VERSION >= (0, 9, 1) or name != "rlcore_gspo" or mode == "seq-mean-token-mean"
]


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    rl_verl.register()


def actor_config(**options) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(kl_cov_ratio=0.1),
        **{"clip_ratio_low": 0.15, "clip_ratio_high": 0.3, **options},
    )


def random_batch(seed: int = 0, rows: int = 6, length: int = 9, spread: float = 0.5):
    """Log-probabilities with ratios on all sides of the clips, rows of all lengths, none empty."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(rows, length, generator=generator, dtype=torch.float64) for _ in range(2)]
    old_log_prob = -0.05 - draw[0].abs()
    log_prob = (old_log_prob + spread * draw[1]).clamp(max=-1e-3).requires_grad_()
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    response_mask = torch.arange(length) < lengths
    response_mask[0, : length // 2] = False
    response_mask[0, -1] = True
    return {
        "old_log_prob": old_log_prob,
        "log_prob": log_prob,
        "advantages": advantages.expand(rows, length).clone(),
        "response_mask": response_mask,
    }


def weights_like(batch, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + torch.rand(batch["log_prob"].shape, generator=generator, dtype=torch.float64)


def loss_and_gradient(name: str, batch, config, mode: str = "token-mean", weights=None):
    loss, metrics = core.get_policy_loss_fn(name)(
        **batch, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )
    (gradient,) = torch.autograd.grad(loss, batch["log_prob"])
    return loss.detach(), gradient, metrics


def assert_same_loss(ours: str, batch, config, mode: str, weights=None, metrics: bool = True):
    want = loss_and_gradient(PAIRS[ours], batch, config, mode, weights)
    got = loss_and_gradient(ours, batch, config, mode, weights)
    assert got[0].dtype == torch.float64
    assert want[1].abs().max() > 1e-4
    for one, other in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    if metrics:
        for key, value in want[2].items():
            assert got[2][key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_loss_gradient_and_metrics_are_verls(name, mode, weighted):
    batch = random_batch()
    weights = weights_like(batch) if weighted else None
    # the metric that verl's kl_cov calls ppo_kl is a mean of absolute values
    config = actor_config(clip_ratio_c=1.4)
    assert_same_loss(name, batch, config, mode, weights, metrics=name != "rlcore_kl_cov")


# verl's geo_mean is defined for one advantage a sequence
@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if "geo_mean" not in case[0]])
def test_losses_agree_where_advantages_differ_within_a_sequence(name, mode):
    batch = random_batch(3)
    batch["advantages"] = torch.randn_like(batch["advantages"])
    assert_same_loss(name, batch, actor_config(), mode, weights_like(batch), metrics=False)


@pytest.mark.parametrize("name", ["rlcore_ppo", "rlcore_gspo", "rlcore_cispo", "rlcore_sapo"])
def test_losses_agree_where_ratios_are_beyond_what_verl_clamps(name):
    batch = random_batch(4)
    with torch.no_grad():
        batch["log_prob"][1:3] = batch["old_log_prob"][1:3] + 30.0
        batch["log_prob"][3:5] = batch["old_log_prob"][3:5] - 30.0
    # verl's clamp at exp(-20) has no gradient; without it there is one of at most exp(-30)
    mode = "seq-mean-token-mean"
    want, gradient, _ = loss_and_gradient(PAIRS[name], batch, actor_config(), mode)
    got, our_gradient, _ = loss_and_gradient(name, batch, actor_config(), mode)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if "geo_mean" not in case[0]])
def test_losses_agree_under_global_counts_of_several_ranks(name, mode):
    batch = random_batch(5)
    info = {
        "dp_size": 4,
        "batch_num_tokens": 83,
        "global_batch_size": 24,
        "loss_scale_factor": 11,
    }
    config = actor_config(global_batch_info=info)
    assert_same_loss(name, batch, config, mode, weights_like(batch), metrics=False)


def rows_of(batch, start: int, stop: int):
    part = {name: x[start:stop] for name, x in batch.items()}
    part["log_prob"] = part["log_prob"].detach().requires_grad_()
    return part


def gradient_of_parts(name: str, batch, info, mode: str, size: int) -> torch.Tensor:
    config = actor_config(global_batch_info=info)
    starts = range(0, len(batch["log_prob"]), size)
    parts = [rows_of(batch, start, start + size) for start in starts]
    return torch.cat([loss_and_gradient(name, part, config, mode)[1] for part in parts])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "rlcore_kl_cov"])
def test_micro_batches_add_up_to_the_whole_batch(name, mode):
    batch = random_batch(6)
    tokens = int(batch["response_mask"].sum())
    info = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": len(batch["log_prob"])}
    whole = loss_and_gradient(name, batch, actor_config(), mode)[1]
    parts = gradient_of_parts(name, batch, info, mode, 2)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.skipif("geo_mean" not in core.POLICY_LOSS_REGISTRY, reason="this verl has none")
def test_geo_mean_differs_from_verls_under_micro_batches_on_purpose():
    """verl averages over the micro-batch whatever the global counts: 3 of them, 3 times the step.

    Ours divides by global_batch_size, as verl's other losses do.
    """
    batch = random_batch(7)
    info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": 6}
    whole = loss_and_gradient("geo_mean", batch, actor_config())[1]
    theirs = gradient_of_parts("geo_mean", batch, info, "seq-mean-token-mean", 2)
    ours = gradient_of_parts("rlcore_geo_mean", batch, info, "seq-mean-token-mean", 2)
    torch.testing.assert_close(theirs, 3 * whole, **CLOSE)
    torch.testing.assert_close(ours, whole, **CLOSE)


def test_geo_mean_differs_from_verls_on_empty_rows_on_purpose():
    """verl's mean counts a row without a token; ours leaves it out, as verl's agg_loss does."""
    batch = random_batch(8)
    batch["response_mask"][2:4] = False
    theirs = loss_and_gradient("geo_mean", batch, actor_config())[1]
    ours = loss_and_gradient("rlcore_geo_mean", batch, actor_config())[1]
    torch.testing.assert_close(ours, theirs * 6 / 4, **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_at_masked_tokens_has_no_effect(name):
    batch = random_batch(9)
    masked = ~batch["response_mask"]
    weights, mode = weights_like(batch), "seq-mean-token-mean"
    clean = loss_and_gradient(name, batch, actor_config(), mode, weights)
    with torch.no_grad():
        for tensor in (batch["log_prob"], batch["old_log_prob"], batch["advantages"], weights):
            tensor[masked] = torch.nan
    dirty = loss_and_gradient(name, batch, actor_config(), mode, weights)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert clean[2] == dirty[2]
    assert not dirty[1][masked].any()


def test_bad_configs_are_refused_with_their_names():
    batch = random_batch()
    run = core.get_policy_loss_fn("rlcore_ppo")
    with pytest.raises(ValueError, match="needs the actor's config"):
        run(**batch, config=None)
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of .*'token-mean'"):
        run(**batch, config=actor_config(), loss_agg_mode="mean")
    with pytest.raises(ValueError, match="batch_num_tokens where dp_size is 2"):
        run(**batch, config=actor_config(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match="clip_ratio_c must be greater than 1"):
        run(**batch, config=actor_config(clip_ratio_c=1.0))
