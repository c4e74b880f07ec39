"""policy_loss against TRL's GRPOTrainer._compute_loss, on the same tensors in float64.

The trainer's method is called on a stand-in for the trainer that hands it log-probabilities of the
logits. Where both differ on purpose, a test says how and why.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import oracle
from helpers.cases import PolicyInputs, batch, policy_inputs
from torch import Tensor

import rlcore as rl
from rlcore.kernels.formulas.surrogates import SURROGATES

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

LENGTH = 9  # max_completion_length
SEQUENCES = "seq-mean-token-mean"
# loss_type -> the same by our names
SAME = {
    "grpo": {"loss_agg_mode": SEQUENCES},
    "bnpo": {"loss_agg_mode": "token-mean"},
    "dapo": {"loss_agg_mode": "token-mean"},
    "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm", "norm_length": LENGTH},
    "cispo": {"loss_agg_mode": "token-mean", "surrogate": "cispo_abs"},
    "sapo": {"loss_agg_mode": SEQUENCES, "surrogate": "sapo"},
}
# those of sequence level alone
SAME_AT_SEQUENCE = {
    "luspo": {"loss_agg_mode": "seq-mean-token-sum"},
    "vespo": {"loss_agg_mode": "token-mean", "surrogate": "vespo"},
}
# TRL takes them in float32, whatever the losses' dtype: these are the same there
TAUS = {"tau_pos": 0.75, "tau_neg": 1.25}
SAME["sapo"]["surrogate_params"] = TAUS
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip


def trl_loss(logits: Tensor, inputs: PolicyInputs, **changes) -> tuple[Tensor, dict]:
    """TRL's loss of the logits, and the metrics that it logs."""
    given, mask = inputs.options, inputs.options["mask"].long()
    options = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "beta": 0.0, "delta": None, "entropy_coef": 0.0,
        "bias_correction": False, **changes,
    }  # fmt: skip
    logp, entropy, _ = oracle.token_logprob(logits, inputs.target)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            delta=options["delta"], use_bias_correction_kl=options["bias_correction"],
            sapo_temperature_pos=TAUS["tau_pos"], sapo_temperature_neg=TAUS["tau_neg"],
            steps_per_generation=1, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None),
        model=SimpleNamespace(training=True), accelerator=accelerator(),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm="importance_sampling_ratio" in given, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, max_completion_length=LENGTH,
        use_adaptive_entropy=False, entropy_coef=options["entropy_coef"],
        _entropy_bonus_enabled=options["entropy_coef"] != 0,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=getattr(grpo_trainer.GRPOTrainer, "get_gamma_weights", None),
        **{k: options[k] for k in (
            "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "beta"
        )},
    )  # fmt: skip
    arguments = {
        "prompt_ids": inputs.target[:, :1], "prompt_mask": mask[:, :1],
        "completion_ids": inputs.target, "completion_mask": mask, "advantages": inputs.advantage,
        "num_items_in_batch": mask.sum(), "old_per_token_logps": given["old_logp"],
        "ref_per_token_logps": given.get("ref_logp"),
        "importance_sampling_ratio": given.get("importance_sampling_ratio"),
    }  # fmt: skip
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, arguments)
    return loss, trainer._metrics["train"]


def made(*names: str) -> PolicyInputs:
    """A batch in float64, of which every sequence has a counted token."""
    logits = batch(6, 7, 20, torch.float64)
    inputs = policy_inputs(logits, "old_logp", "mask", *names, masked=0.3)
    inputs.options["mask"][:, 0] = True
    inputs.options = {
        k: v.double() if v.is_floating_point() else v for k, v in inputs.options.items()
    }
    inputs.advantage = torch.tensor([1.2, -0.7, 0.3, -1.5, 0.9, -0.2]).double()
    return inputs


def ours(inputs: PolicyInputs, **options) -> tuple[rl.PolicyLoss, Tensor]:
    z = inputs.logits.clone().requires_grad_()
    given = inputs.options | options
    out = rl.policy_loss(z, inputs.target, inputs.advantage, **given)
    return out, torch.autograd.grad(out.loss, z)[0]


def theirs(inputs: PolicyInputs, **options) -> tuple[Tensor, Tensor, dict]:
    z = inputs.logits.clone().requires_grad_()
    loss, metrics = trl_loss(z, inputs, **options)
    return loss, torch.autograd.grad(loss, z)[0], metrics


def assert_same(mine: tuple[rl.PolicyLoss, Tensor], trl: tuple[Tensor, Tensor, dict]) -> None:
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(mine[0].loss.detach(), trl[0].detach(), **close)
    torch.testing.assert_close(mine[1], trl[1], **close)


@pytest.mark.parametrize("names", [(), ("ref_logp", "importance_sampling_ratio")], ids=["", "all"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SAME)
def test_loss_and_gradient_are_trls(loss_type, level, names):
    inputs = made(*names)
    beta = 0.3 if "ref_logp" in names else 0.0
    high = {"epsilon_high": 1.3 if loss_type == "cispo" else 0.3}
    # TRL's sapo has an epsilon_high and makes no use of it; ours refuses one
    mine = {} if loss_type == "sapo" else high
    assert_same(
        ours(inputs, importance_sampling_level=level, beta=beta, **SAME[loss_type], **mine),
        theirs(inputs, loss_type=loss_type, importance_sampling_level=level, beta=beta, **high),
    )


@pytest.mark.parametrize("loss_type", SAME_AT_SEQUENCE)
def test_losses_of_whole_sequences_are_trls(loss_type):
    inputs = made("ref_logp")
    # TRL has no level for vespo's ratio, and wants "token"
    level = "token" if loss_type == "vespo" else "sequence"
    high = {} if loss_type == "vespo" else {"epsilon_high": 0.3}
    options = {"beta": 0.3, **SAME_AT_SEQUENCE[loss_type], **high}
    assert_same(
        ours(inputs, importance_sampling_level="sequence", **options),
        theirs(inputs, loss_type=loss_type, importance_sampling_level=level, beta=0.3, **high),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SAME)
def test_the_kl_times_the_ratio_is_trls_bias_correction(loss_type, level):
    inputs = made("ref_logp", "importance_sampling_ratio")
    high = {"epsilon_high": 1.3 if loss_type == "cispo" else 0.3}
    mine = {} if loss_type == "sapo" else high
    shared = {"importance_sampling_level": level, "beta": 0.3}
    corrected = theirs(inputs, loss_type=loss_type, bias_correction=True, **shared, **high)
    out = ours(inputs, kl_estimator="k3_ratio", **shared, **SAME[loss_type], **mine)
    assert_same(out, corrected)
    plain = theirs(inputs, loss_type=loss_type, **shared, **high)
    assert (plain[0] - corrected[0]).abs() > 1e-3
    mask = inputs.options["mask"]
    assert corrected[2]["kl"] == [pytest.approx(out[0].kl[mask].mean().item())]


def test_sapos_defaults_are_trls():
    from trl import GRPOConfig

    fields = GRPOConfig.__dataclass_fields__
    default = {side: fields[f"sapo_temperature_{side}"].default for side in ("pos", "neg")}
    assert SURROGATES["sapo"].defaults == {f"tau_{k}": v for k, v in default.items()}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_a_delta_above_the_clip_is_trls(loss_type, level):
    inputs = made()
    shared = {"importance_sampling_level": level, "delta": 1.25}
    assert_same(
        ours(inputs, **SAME[loss_type], **shared), theirs(inputs, loss_type=loss_type, **shared)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_is_what_trl_reports_as_its_region(level):
    inputs = made()
    out, _ = ours(inputs, importance_sampling_level=level)
    metrics = theirs(inputs, importance_sampling_level=level)[2]
    # TRL averages at sequence level over sequences, and we return one value a token
    chosen = inputs.options["mask"] if level == "token" else (slice(None), 0)
    share = out.clipped[chosen].double().mean().item()
    assert 0 < share < 1
    assert metrics["clip_ratio/region_mean"] == [pytest.approx(share)]


def test_a_delta_below_the_clip_differs_for_it_is_a_bound_on_bad_tokens_alone():
    # min(r, delta) holds r A for A > 0 at delta A too, where dual clip is defined for A < 0
    inputs = made()
    inputs.advantage = inputs.advantage.abs()
    mine, _ = ours(inputs, loss_agg_mode=SEQUENCES, delta=1.01)
    assert_same(ours(inputs, loss_agg_mode=SEQUENCES), theirs(inputs))
    torch.testing.assert_close(mine.loss, ours(inputs, loss_agg_mode=SEQUENCES)[0].loss)
    assert (mine.loss - theirs(inputs, delta=1.01)[0]).abs() > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_a_sequence_without_a_token_differs_for_it_counts_for_none_here(loss_type):
    # TRL divides by the rows of its micro-batch, so an empty one shrinks the others' gradient
    inputs = made()
    inputs.options["mask"][2] = False
    out, dz = ours(inputs, **SAME[loss_type])
    loss, trl_dz, _ = theirs(inputs, loss_type=loss_type)
    torch.testing.assert_close(out.loss * 5, loss * 6)
    torch.testing.assert_close(dz * 5, trl_dz * 6)
    assert_same(ours(inputs, **SAME[loss_type], num_items=6), (loss, trl_dz, {}))


def test_the_entropy_bonus_differs_for_it_is_averaged_as_the_loss_is():
    # TRL's is the mean over tokens whatever the loss's own mean, and so depends on the micro-batch
    inputs = made()
    plain, _ = ours(inputs, loss_agg_mode=SEQUENCES)
    with_bonus, _ = ours(inputs, loss_agg_mode=SEQUENCES, entropy_coef=0.1)
    mask = inputs.options["mask"]
    by_sequence = torch.stack([h[m].mean() for h, m in zip(plain.entropy, mask, strict=True)])
    torch.testing.assert_close(plain.loss - with_bonus.loss, 0.1 * by_sequence.mean())
    trl = theirs(inputs)[0] - theirs(inputs, entropy_coef=0.1)[0]
    torch.testing.assert_close(trl, 0.1 * plain.entropy[mask].mean())
    tokens = [ours(inputs, loss_agg_mode="token-mean", entropy_coef=c)[0].loss for c in (0.0, 0.1)]
    torch.testing.assert_close(tokens[0] - tokens[1], trl)


def test_cispo_by_the_paper_is_not_trls():
    # TRL bounds the ratio by epsilon_high itself; MiniMax's clips it to 1 -+ epsilon
    inputs = made()
    trl = theirs(inputs, loss_type="cispo", epsilon_high=1.3)[0]
    assert (ours(inputs, surrogate="cispo", epsilon=0.99, epsilon_high=0.3)[0].loss - trl).abs() > 0
    bounded = ours(inputs, surrogate="cispo", epsilon=1.0, epsilon_high=0.3)
    assert_same(bounded, theirs(inputs, loss_type="cispo", epsilon_high=1.3))
