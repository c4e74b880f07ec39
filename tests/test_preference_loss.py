"""Preference losses: TRL's numbers, identities, derivatives, and what is refused."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import oracle
from torch import Tensor

import rlcore as rl
from rlcore.kernels.formulas.pair_losses import PREFERENCE_LOSSES

B, T, V = 4, 6, 11
PAIRED = [name for name, entry in PREFERENCE_LOSSES.items() if entry.uses_reference]
FREE = [name for name, entry in PREFERENCE_LOSSES.items() if not entry.uses_reference]
# TRL's names for what both have; its "ipo" is ours by the mean
TRL_NAMES = {name: name for name in PAIRED if name not in ("ipo", "ipo_avg")} | {"ipo_avg": "ipo"}
SMOOTHED = {"robust": 0.1, "exo_pair": 0.2, "aot": 0.1, "aot_unpaired": 0.1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sums(count=B):
    """chosen, rejected and the reference's, each (B,) in float64."""
    return [-10 + 3 * torch.randn(count, dtype=torch.float64) for _ in range(4)]


def lengths(count=B):
    return {
        "chosen_length": torch.randint(1, 9, (count,)),
        "rejected_length": torch.randint(1, 9, (count,)),
    }


def given(name, logp):
    """The arguments that a loss takes of the four sums."""
    return logp if PREFERENCE_LOSSES[name].uses_reference else logp[:2]


class Batch:
    """Logits of 2B answers, of a policy and a reference, behind prompts of one token."""

    def __init__(self, dtype=torch.float64):
        self.logits = torch.randn(2 * B, T, V, dtype=dtype, requires_grad=True)
        self.ref_logits = torch.randn(2 * B, T, V, dtype=dtype)
        self.ids = torch.randint(0, V, (2 * B, T + 1))
        self.mask = torch.rand(2 * B, T) < 0.7
        self.mask[:, 0] = True

    def logp(self, logits: Tensor) -> Tensor:
        logp = oracle.token_logprob(logits, self.ids[:, 1:])[0].to(logits.dtype)
        return torch.where(self.mask, logp, 0.0)


def trl_loss(batch: Batch, **changes) -> Tensor:
    """TRL's DPOTrainer._compute_loss, called on a stand-in for the trainer."""
    trainer_class = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    options = {
        "loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.3, "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.7, "ld_alpha": None,
        "use_weighting": False, **changes,
    }  # fmt: skip

    def answers(logits):
        probabilities = logits.softmax(-1)
        return SimpleNamespace(
            log_probs=batch.logp(logits),
            entropy=torch.zeros(2 * B, T),
            mean_logits=torch.zeros(2 * B, T),
            is_top1=torch.zeros(2 * B, T, dtype=torch.bool),
            log_sum_sq_probs=probabilities.square().sum(-1).log(),
        )

    ref = batch.logp(batch.ref_logits)
    if options["ld_alpha"] is not None:
        # a precomputed sum would have to be weighted already
        weight = ld_weight(batch.mask, options["ld_alpha"])
        ref = ref * weight
    ref_chosen, ref_rejected = ref.sum(1).chunk(2)

    class Policy:
        training = True

        def __call__(self, **_):
            return answers(batch.logits)

    trainer = SimpleNamespace(
        model=Policy(),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=0.05), aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **options,
    )  # fmt: skip
    completion_mask = torch.cat([torch.zeros(2 * B, 1).long(), batch.mask.long()], 1)
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": torch.ones_like(batch.ids),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer_class._compute_loss(trainer, trainer.model, inputs, False)


def ld_weight(mask: Tensor, alpha: float) -> Tensor:
    """Token by token: 1 up to the shorter answer's length, then alpha."""
    weight = torch.ones(mask.shape, dtype=torch.float64)
    for pair in range(B):
        shorter = min(int(mask[pair].sum()), int(mask[pair + B].sum()))
        for row in (pair, pair + B):
            counted = 0
            for token in range(T):
                counted += int(mask[row, token])
                weight[row, token] = 1.0 if counted <= shorter else alpha
    return weight


def ours(batch: Batch, loss_type, **options) -> rl.PreferenceLoss:
    """The same through the fused function, with the identity for a head."""
    ref = batch.logp(batch.ref_logits)
    if options.get("ld_alpha") is not None:
        ref = ref * ld_weight(batch.mask, options["ld_alpha"])
    identity = torch.eye(V, dtype=batch.logits.dtype)
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    reference = any(PREFERENCE_LOSSES[name].uses_reference for name in names)
    return rl.linear_preference_loss(
        batch.logits, identity, batch.ids[:, 1:], batch.mask, ref.sum(1) if reference else None,
        loss_type=loss_type, beta=0.3, **options,
    )  # fmt: skip


def assert_same(batch: Batch, theirs: Tensor, mine: Tensor, rtol=1e-10):
    (expected,) = torch.autograd.grad(theirs, batch.logits)
    (gradient,) = torch.autograd.grad(mine, batch.logits)
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * 1e-2)
    assert expected.abs().max() > 1e-4


def rounding(name):
    """TRL takes exo_pair's smoothing in float32."""
    return 1e-6 if name == "exo_pair" else 1e-10


@pytest.mark.parametrize("name", TRL_NAMES)
def test_loss_and_gradient_are_trls(name):
    batch, smoothing = Batch(), SMOOTHED.get(name, 0.0)
    theirs = trl_loss(batch, loss_types=[TRL_NAMES[name]], label_smoothing=smoothing)
    mine = ours(batch, name, label_smoothing=smoothing).loss
    assert_same(batch, theirs, mine, rtol=rounding(name))


@pytest.mark.parametrize("name", [n for n in TRL_NAMES if PREFERENCE_LOSSES[n].uses_scores])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences_are_trls(name, divergence):
    # TRL takes the alpha-divergence in float32 at most
    narrow = divergence == "alpha_divergence"
    batch, smoothing = Batch(torch.float32 if narrow else torch.float64), SMOOTHED.get(name, 0.0)
    theirs = trl_loss(
        batch, loss_types=[TRL_NAMES[name]], label_smoothing=smoothing, f_divergence_type=divergence
    )
    mine = ours(
        batch, name, label_smoothing=smoothing, f_divergence_type=divergence,
        f_alpha_divergence_coef=0.7,
    )  # fmt: skip
    assert_same(batch, theirs, mine.loss, rtol=2e-4 if narrow else rounding(name))


@pytest.mark.parametrize("options", [{"use_weighting": True}, {"ld_alpha": 0.3}])
@pytest.mark.parametrize("names", [["sigmoid"], ["apo_zero", "bco_pair"]])
def test_weighting_and_length_desensitizing_and_sums_of_losses_are_trls(names, options):
    batch = Batch()
    weights = [0.8, 0.3][: len(names)]
    theirs = trl_loss(batch, loss_types=names, loss_weights=weights, **options)
    assert_same(batch, theirs, ours(batch, names, loss_weights=weights, **options).loss)


def test_trls_sft_part_is_a_mean_over_all_tokens_and_ours_over_each_answers():
    """So that a pair's loss is its own, whatever batch it comes in."""
    batch = Batch()
    chosen = batch.logp(batch.logits)[:B]
    each = -(chosen.sum(1) / batch.mask[:B].sum(1)).mean()
    torch.testing.assert_close(ours(batch, "sft").loss, each)
    whole = -chosen.sum() / batch.mask[:B].sum()
    torch.testing.assert_close(trl_loss(batch, loss_types=["sft"]), whole)


def test_simpo_orpo_and_cpo_by_hand():
    chosen, rejected, *_ = sums()
    given = lengths()
    c, r = chosen / given["chosen_length"], rejected / given["rejected_length"]
    simpo = -torch.nn.functional.logsigmoid(2.0 * (c - r) - 1.5)
    odds = torch.log(c.exp() / (1 - c.exp())) - torch.log(r.exp() / (1 - r.exp()))
    orpo = -c - 0.3 * torch.log(torch.sigmoid(odds))
    cpo = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)) - 0.7 * c
    for name, expected, options in (
        ("simpo", simpo, {"beta": 2.0, "simpo_gamma": 1.5}),
        ("orpo", orpo, {"beta": 0.3}),
        ("cpo", cpo, {"beta": 0.3, "cpo_alpha": 0.7}),
    ):
        loss = rl.preference_loss(chosen, rejected, loss_type=name, **given, **options).loss
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-9, atol=1e-12)


def test_ipo_is_the_papers_on_sums_and_averages_apart():
    logp, given = sums(), lengths()
    h = logp[0] - logp[2] - logp[1] + logp[3]
    torch.testing.assert_close(
        rl.preference_loss(*logp, loss_type="ipo", beta=0.4).loss, (h - 1.25).square().mean()
    )
    averaged = (logp[0] - logp[2]) / given["chosen_length"]
    averaged = averaged - (logp[1] - logp[3]) / given["rejected_length"]
    loss = rl.preference_loss(*logp, loss_type="ipo_avg", beta=0.4, **given).loss
    torch.testing.assert_close(loss, (averaged - 1.25).square().mean())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_derivatives_are_those_of_the_values(name):
    logp, given_lengths = [x.requires_grad_() for x in sums()[:2]], lengths()
    reference = sums()[2:]

    def loss(chosen, rejected):
        arguments = given(name, [chosen, rejected, *reference])
        return rl.preference_loss(*arguments, loss_type=name, beta=0.3, **given_lengths).loss

    assert torch.autograd.gradcheck(loss, tuple(logp))


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "robust", "discopop"])
def test_equal_pairs_give_the_loss_of_no_preference(name):
    same = torch.full((3,), -7.0)
    count = {"chosen_length": torch.full((3,), 5), "rejected_length": torch.full((3,), 5)}
    loss = rl.preference_loss(same, same, same, same, loss_type=name, **count).loss.item()
    expected = {"hinge": 1.0, "discopop": (math.log(2) + 1) / 2}.get(name, math.log(2))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_exchanged_answers_mirror_the_loss():
    logp = sums()
    swapped = [logp[1], logp[0], logp[3], logp[2]]
    smooth = rl.preference_loss(*logp, label_smoothing=0.2, beta=0.3).loss
    mirrored = rl.preference_loss(*swapped, label_smoothing=0.8, beta=0.3).loss
    torch.testing.assert_close(smooth, mirrored)
    result, other = (rl.preference_loss(*x, beta=0.3) for x in (logp, swapped))
    torch.testing.assert_close(result.chosen_reward, other.rejected_reward)


def test_a_small_beta_gives_dpos_linear_limit():
    logp = [x.requires_grad_() if i < 2 else x for i, x in enumerate(sums())]
    beta = 1e-6
    loss = rl.preference_loss(*logp, beta=beta).loss
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4)
    chosen, rejected = torch.autograd.grad(loss, logp[:2])
    torch.testing.assert_close(
        chosen / beta, torch.full((B,), -0.5 / B).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(rejected, -chosen)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_micro_batches_add_up_and_pair_weights_count(name):
    if PREFERENCE_LOSSES[name].couples_pairs:
        pytest.skip("a pair's loss depends on the others")
    logp, count = sums(), lengths()
    weight = torch.rand(B, dtype=torch.float64)
    whole = rl.preference_loss(*given(name, logp), loss_type=name, pair_weight=weight, **count).loss
    parts = sum(
        rl.preference_loss(
            *(x[row : row + 1] for x in given(name, logp)), loss_type=name, num_items=B,
            pair_weight=weight[row : row + 1],
            **{k: v[row : row + 1] for k, v in count.items()},
        ).loss
        for row in range(B)
    )  # fmt: skip
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_extreme_log_ratios_stay_finite(name):
    if name == "discopop":
        pytest.skip("its exponential part grows with the log-ratio, as in the paper")
    logp = [torch.tensor([x, -x], requires_grad=True) for x in (-1e4, -1.0)]
    arguments = given(name, [*logp, torch.tensor([-5.0, -9e3]), torch.tensor([-9e3, -5.0])])
    arguments = [x if i > 1 else -x.abs() for i, x in enumerate(arguments)]
    loss = rl.preference_loss(
        *arguments, loss_type=name, chosen_length=torch.tensor([3, 4]),
        rejected_length=torch.tensor([4, 3]),
    ).loss  # fmt: skip
    gradients = torch.autograd.grad(loss, logp, allow_unused=True)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in gradients)


def test_rewards_are_beta_times_the_log_ratio_or_the_log_probability():
    chosen, rejected, ref_chosen, ref_rejected = logp = sums()
    result = rl.preference_loss(*logp, beta=0.3)
    torch.testing.assert_close(result.chosen_reward, 0.3 * (chosen - ref_chosen))
    torch.testing.assert_close(result.rejected_reward, 0.3 * (rejected - ref_rejected))
    torch.testing.assert_close(result.chosen_logp, chosen)
    count = lengths()
    simpo = rl.preference_loss(chosen, rejected, loss_type="simpo", beta=2.0, **count)
    torch.testing.assert_close(simpo.chosen_reward, 2.0 * chosen / count["chosen_length"])
    cpo = rl.preference_loss(chosen, rejected, loss_type="cpo", beta=0.3, **count)
    torch.testing.assert_close(cpo.rejected_reward, 0.3 * rejected)


def test_low_precision_sums_are_subtracted_in_float32():
    logp = [x.to(torch.bfloat16) for x in sums()]
    result = rl.preference_loss(*logp)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, rl.preference_loss(*(x.float() for x in logp)).loss)


def test_kto_by_hand_and_its_derivative():
    logp, ref_logp, *_ = sums()
    desirable = torch.tensor([True, False, True, False])
    options = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5, "kl": 0.7}
    expected = 0.0
    for policy, reference, good in zip(logp, ref_logp, desirable, strict=True):
        gain = (policy - reference).item() - 0.7
        sign, weight = (1, 1.5) if good else (-1, 0.5)
        expected += weight * (1 - 1 / (1 + math.exp(-0.2 * sign * gain))) / B
    assert rl.kto_loss(logp, ref_logp, desirable, **options).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda x: rl.kto_loss(x, ref_logp, desirable, **options), logp.requires_grad_()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dop"}, "loss_type must be one of"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_weights": [1.0, 1.0]}, "loss_weights must have an entry"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing must be in \\[0, 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no part in loss_type hinge"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "has no meaning"),
        ({"loss_type": "simpo"}, "has no use for ref_chosen_logp"),
        ({"loss_type": "ipo_avg"}, "needs chosen_length"),
        ({"chosen_length": torch.ones(B + 1)}, "chosen_length must have the shape"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        rl.preference_loss(*sums(), **options)


def test_a_reference_cannot_be_left_out_nor_sums_be_tokens():
    chosen, rejected, *_ = sums()
    with pytest.raises(ValueError, match="needs ref_chosen_logp"):
        rl.preference_loss(chosen, rejected)
    with pytest.raises(ValueError, match=r"chosen_logp must have shape \(B,\)"):
        rl.preference_loss(chosen[None], rejected[None])
    with pytest.raises(ValueError, match="desirable must be bool"):
        rl.kto_loss(chosen, rejected, torch.ones(B))


def orpo(chosen, rejected, chosen_length=1, rejected_length=1, **options):
    """(loss, dchosen, drejected) of one pair, beta 0.1."""
    leaves = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    lengths = [torch.tensor([n]) for n in (chosen_length, rejected_length)]
    out = rl.preference_loss(
        *leaves, loss_type="orpo", chosen_length=lengths[0], rejected_length=lengths[1]
    )
    gradients = torch.autograd.grad(out.loss, leaves)
    return out.loss.item(), *(g.item() for g in gradients)


def test_orpo_of_a_sure_answer_is_its_limit():
    # d/dc log(1 + (1 - p_c) / p_c q), q the rejected odds, is -q at p_c = 1
    odds = math.exp(-1) / (1 - math.exp(-1))
    for chosen in (-1e-3, -1e-8, -1e-30, 0.0):
        loss, dchosen, _ = orpo(chosen, -1.0)
        assert loss == pytest.approx(
            -chosen + 0.1 * math.log1p(-math.expm1(chosen) * odds), abs=1e-7
        )
        assert dchosen == pytest.approx(-1 - 0.1 * odds, rel=1e-3)
    # a sure rejected answer: 1 - p counts as 2^-100
    loss, _, drejected = orpo(-1.0, 0.0)
    log_odds = -math.log(math.e - 1) - 100 * math.log(2)
    assert loss == pytest.approx(1 - 0.1 * log_odds) and 0 < drejected < math.inf
    assert orpo(0.0, 0.0)[0] == pytest.approx(0.1 * math.log(2))


def test_orpo_takes_a_pair_with_an_empty_answer_for_a_tie():
    for rejected_length in (0, 1):
        loss, dchosen, drejected = orpo(0.0, -0.0, 0, rejected_length)
        assert loss == pytest.approx(0.1 * math.log(2)) and drejected == 0 and dchosen == -1
    loss, dchosen, drejected = orpo(-2.0, 0.0, 1, 0)
    assert loss == pytest.approx(2 + 0.1 * math.log(2)) and (dchosen, drejected) == (-1, 0)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_banned_token_leaves_its_pair_alone(name):
    logp = [x.float() for x in sums(3)]
    logp[0][0] = logp[1][1] = -math.inf
    leaves = [x.requires_grad_() for x in logp[:2]]
    if PREFERENCE_LOSSES[name].couples_pairs:
        pytest.skip("its pairs are sorted among each other")
    out = rl.preference_loss(*leaves, *given(name, logp)[2:], loss_type=name, **lengths(3))
    gradients = torch.autograd.grad(out.loss, leaves, materialize_grads=True)
    assert not out.loss.isnan()
    for gradient, x in zip(gradients, leaves, strict=True):
        assert gradient.isfinite().all() and not gradient[x.isinf()].any()


@pytest.mark.parametrize("num_items", [0, -1, math.nan, math.inf, torch.tensor(-2), [3]])
def test_num_items_must_be_a_positive_number(num_items):
    x = torch.zeros(B)
    hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3).long()
    for call in (
        lambda: rl.preference_loss(x, x, x, x, num_items=num_items),
        lambda: rl.kto_loss(x, x, x == 0, num_items=num_items),
        lambda: rl.linear_preference_loss(
            hidden, weight, ids, ids == 0, torch.zeros(2), num_items=num_items
        ),
    ):
        with pytest.raises(ValueError, match="num_items must be"):
            call()


def test_ktos_weights_keep_the_precision_of_its_inputs():
    x, desirable = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False])
    loss = rl.kto_loss(x, x, desirable, desirable_weight=0.1, undesirable_weight=0.3)
    assert loss.item() == (0.1 * 0.5 + 0.3 * 0.5) / 2


def test_an_option_that_is_no_finite_number_is_refused():
    x = torch.zeros(B)
    for options in ({"beta": math.inf}, {"beta": math.nan}, {"loss_weights": [math.nan]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rl.preference_loss(x, x, x, x, **options)
    for bad in ({"simpo_gamma": math.nan}, {"cpo_alpha": math.inf}, {"beta": "0.1"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            rl.preference_loss(x, x, x, x, **bad)


def test_a_gradient_of_0_stays_0_beside_a_loss_beyond_the_dtype():
    # the loss is about e^141; the score's slope at a log-ratio of 7635 is e^-7635
    chosen, rejected = (torch.zeros(1).requires_grad_() for _ in range(2))
    out = rl.preference_loss(
        chosen, rejected, torch.full((1,), 1.39), torch.full((1,), -7635.0), loss_type="discopop",
        f_divergence_type="js_divergence", beta=89.5, discopop_tau=89.5,
    )  # fmt: skip
    dchosen, drejected = torch.autograd.grad(out.loss, (chosen, rejected))
    assert out.loss.isfinite() and dchosen < 0 and drejected == 0
