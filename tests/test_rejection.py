"""--rejection: tokens and completions left out where sampler and trainer are too far apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import grpo as make
from helpers.runs import grpo_config

import rlcore as rl
from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import DistillConfig, DPOConfig, PGConfig, train_dpo, train_grpo, train_pg
from rlcore.trainers.options.distill import check_distill_config
from rlcore.trainers.options.sampling import REJECTIONS, SamplingConfig
from rlcore.trainers.shared.correction import compared

DISTANCE = {"upper": 0.02}
RATIO = {"lower": 0.95, "upper": 1.1}


def sampled(seed=3):
    """Eight completions drawn from a policy near the trainer's."""
    made = make.experience(old=0.0)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.2 * torch.randn(made.mask.shape, generator=generator)
    return dataclasses.replace(made, sampling_logp=made.old_logp - noise, old_logp=None)


def rejected(directory, name, correction="none", **bounds):
    """(what `compared` makes of them, its metrics, the tokens that rl.rejection_mask keeps)."""
    level, *reduction, kind = name.split("_")
    config = make.config(
        directory, rejection=name, importance_sampling_correction=correction,
        **{f"rejection_{side}": value for side, value in bounds.items()},
    )  # fmt: skip
    run = make.make_run(config)
    found, metrics = compared(run, sampled())
    keep = rl.rejection_mask(
        found.old_logp, found.sampling_logp, found.mask, kind=kind, level=level,
        reduction=reduction[0] if reduction else None, **bounds,
    )  # fmt: skip
    return found, metrics, keep


@pytest.mark.parametrize("name", REJECTIONS)
def test_what_is_out_of_bounds_has_weight_0_and_the_rest_1(tmp_path, name):
    bounds = RATIO if name.endswith("k1") else DISTANCE
    found, metrics, keep = rejected(tmp_path, name, **bounds)
    assert keep[found.mask].any() and not keep[found.mask].all()
    assert torch.equal(found.importance_ratio[found.mask], keep[found.mask].float())
    share = 1 - keep.sum() / found.mask.sum()
    assert metrics["sampling/rejected"] == pytest.approx(share.item(), rel=1e-6)
    # the loss counts them still
    assert torch.equal(found.mask, sampled().mask)


def test_it_goes_with_importance_weights(tmp_path):
    found, metrics, keep = rejected(tmp_path, "token_k2", "token_truncate", upper=0.02)
    weight = rl.importance_weights(found.old_logp, found.sampling_logp, mask=found.mask, high=3.0)
    assert torch.equal(found.importance_ratio, weight * keep)
    used = (weight * keep)[found.mask].double()
    size = used.sum() ** 2 / (len(used) * used.square().sum())
    assert metrics["sampling/effective_sample_size"] == pytest.approx(size.item(), rel=1e-5)


def lengths(prompts, completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("train", [train_grpo, train_pg])
def test_a_trainer_that_rejects_everything_stands_still(tmp_path, train):
    config = grpo_config(tmp_path, max_steps=1, top_k=5, num_iterations=1)
    if train is train_pg:
        names = {field.name for field in dataclasses.fields(SamplingConfig)}
        config = PGConfig(**{k: v for k, v in vars(config).items() if k in names})
    # five of many tokens hold a small part of the mass: every ratio is far below 1
    config = dataclasses.replace(config, rejection="sequence_mean_k1", rejection_lower=0.9)
    train(config, reward_funcs=[lengths])
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["sampling/rejected"] == 1 and line["grad_norm"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejection": "token_k4", "rejection_upper": 1.0}, "unknown rejection"),
        ({"rejection": "token_k1"}, "rejection token_k1 needs rejection_upper or rejection_lower"),
        ({"rejection": "token_k2", "rejection_lower": 0.1}, "rejection_lower .* token_k2"),
        (
            {"rejection": "token_k1", "rejection_lower": 2.0, "rejection_upper": 1.0},
            "rejection_lower \\(2\\) must not be above rejection_upper \\(1\\)",
        ),
        ({"rejection_upper": 1.0}, "rejection_upper is set, but nothing is rejected"),
    ],
)
def test_options_at_odds_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_grpo(grpo_config(tmp_path, **changes), reward_funcs=[lengths])


def test_trainers_without_weights_refuse_it(tmp_path):
    options = {"rejection": "token_k1", "rejection_upper": 2.0, "output_dir": str(tmp_path / "a")}
    options |= {"model": "m", "dataset": "d"}
    with pytest.raises(UserError, match=r"rejection .*pairs"):
        train_dpo(DPOConfig(online=True, **options), reward_funcs=[lengths])
    with pytest.raises(UserError, match="rejection is set, but has no effect"):
        check_distill_config(DistillConfig(teacher="t", **options), 0)
