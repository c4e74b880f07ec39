"""TRL's trainers give the same curve and the same weights on rlcore's losses."""

from __future__ import annotations

import logging

import pytest
from trl_runs import assert_same, run

from rlcore.integrations import trl as rl_trl


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("trl")


def both(kind: str, directory, **options):
    plain = run(kind, directory, **options)
    with rl_trl.patch():
        patched = run(kind, directory, **options)
    assert_same(patched, plain)


FUSED = "the whole policy loss is fused"
GRPO = [
    ({"loss_type": "grpo"}, FUSED),
    ({"loss_type": "dapo", "beta": 0.1}, FUSED),
    ({"loss_type": "dapo", "beta": 0.1, "num_iterations": 2}, "use_bias_correction_kl"),
    (
        {"loss_type": "dr_grpo", "num_iterations": 2, "beta": 0.1, "use_bias_correction_kl": False},
        FUSED,
    ),
    ({"loss_type": "bnpo", "num_iterations": 2, "delta": 1.5, "epsilon_high": 0.28}, FUSED),
    ({"loss_type": "luspo", "num_iterations": 2}, FUSED),
    ({"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 4.0}, FUSED),
    ({"loss_type": "sapo", "num_iterations": 2}, FUSED),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2}, "ratio"),
    ({"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.1}, "ratio"),
    ({"loss_type": "grpo", "entropy_coef": 0.01, "num_iterations": 2}, "entropy_coef"),
    ({"loss_type": "bnpo", "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
    ({"loss_type": "vespo", "num_iterations": 2}, "vespo"),
]


@pytest.mark.parametrize("options, said", GRPO)
def test_grpo(directory, caplog, options, said):
    caplog.set_level(logging.INFO, "rlcore.integrations.trl")
    both("GRPO", directory, **options)
    assert said in caplog.text
    assert "not the fused one" not in caplog.text


@pytest.mark.parametrize("options, said", [({}, FUSED), ({"num_iterations": 2}, "off-policy")])
def test_rloo(directory, caplog, options, said):
    caplog.set_level(logging.INFO, "rlcore.integrations.trl")
    both("RLOO", directory, **options)
    assert said in caplog.text
    assert "not the fused one" not in caplog.text


DPO = [
    {"loss_type": "sigmoid"},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    # SimPO's mean log-probabilities
    {"loss_type": "sigmoid_norm"},
    {"use_weighting": True},
]


@pytest.mark.parametrize("options", DPO)
def test_dpo(directory, options):
    both("DPO", directory, **options)


def test_kto(directory):
    both("KTO", directory)


@pytest.mark.parametrize("loss_type", ["chunked_nll", "nll", "dft"])
def test_sft(directory, loss_type):
    both("SFT", directory, loss_type=loss_type)


def test_a_reward_model_is_trained_as_before(directory):
    both("Reward", directory)
