"""GRPO: its loss against the papers', whatever the batches are cut into; and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import grpo as make
from helpers.tiny import tiny_model

import rlcore as rl
from rlcore.errors import UserError
from rlcore.kernels.formulas.surrogates import SURROGATES
from rlcore.models.heads import LogitsHead
from rlcore.trainers import grpo
from rlcore.trainers.grpo import _with_other_policies, update_policy
from rlcore.trainers.options.grpo import LOSS_TYPES, check_grpo_config
from rlcore.trainers.shared import masking
from rlcore.trainers.shared.collect import _metrics
from rlcore.trainers.shared.judging import make_judge
from rlcore.trainers.shared.policies import Policy, completion_logp

EVERYTHING = torch.arange(8)
OFF_POLICY = {"old": 0.3, "ref": 0.4}
FULL = {"beta": 0.3, "entropy_coef": 0.05, "epsilon_high": 0.3, "delta": 1.5, "temperature": 0.8}


def update(tmp_path, made, **changes):
    """(metrics, gradient) of one optimizer step on the whole of `made`."""
    run = make.make_run(make.config(tmp_path, **changes))
    _, metrics = update_policy(run, 1, made, EVERYTHING)
    return metrics, make.gradient(run.policy)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-5) -> None:
    """The vectors differ by less than `tolerance` of their length.

    A float32 model's log-probabilities differ between processors by 1e-6, which ratios multiply.
    """
    assert expected.norm() > 0
    assert (actual - expected).norm() < tolerance * expected.norm()


def naive(tmp_path, made, **changes):
    """(loss, gradient) by the formula, in float64."""
    model = tiny_model("gpt2").double()
    loss = make.naive_loss(model, made, make.config(tmp_path, **changes))
    loss.backward()
    return loss.item(), make.gradient(model)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("policy", [{}, OFF_POLICY], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_the_formulas(tmp_path, loss_type, policy, options):
    made = make.experience(**(policy or {"ref": 0.4}))
    options = make.fitting(loss_type, options)
    metrics, gradient = update(tmp_path, made, loss_type=loss_type, **options)
    loss, expected = naive(tmp_path, made, loss_type=loss_type, **options)
    assert metrics["loss"] == pytest.approx(loss, rel=3e-5, abs=1e-6)
    assert_near(gradient, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_at_sequence_level_they_are_the_formulas_too(tmp_path, loss_type):
    made = make.experience(**OFF_POLICY)
    options = {"loss_type": loss_type, "importance_sampling_level": "sequence", "epsilon": 0.05}
    metrics, gradient = update(tmp_path, made, **options)
    loss, expected = naive(tmp_path, made, **options)
    assert metrics["loss"] == pytest.approx(loss, rel=3e-5, abs=1e-6)
    assert_near(gradient, expected)
    _, cut = update(tmp_path, made, **options, **CUTS[1])
    assert_near(cut, gradient, 3e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("policy", [{"ref": 0.4}, OFF_POLICY], ids=["on-policy", "off-policy"])
def test_the_kl_times_the_ratio_is_the_formulas(tmp_path, policy, level):
    made = make.experience(**policy)
    options = {"beta": 0.3, "kl_estimator": "k3_ratio", "importance_sampling_level": level}
    metrics, gradient = update(tmp_path, made, **options)
    loss, expected = naive(tmp_path, made, **options)
    assert metrics["loss"] == pytest.approx(loss, rel=3e-5, abs=1e-6)
    assert_near(gradient, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "reinforce", "beta": 0.1},
        {"loss_type": "fipo", "fipo_decay_rate": 2.0, "fipo_clip_high_only": False, "beta": 0.1},
        {"loss_type": "dppo_tv", "epsilon": 0.004, "epsilon_high": 0.012},
        {"loss_type": "gmpo", "epsilon": 0.05},
        {"loss_type": "ppo_penalty", "surrogate_params": {"kl_coef": 0.4}},
        {"loss_type": "sapo", "surrogate_params": {"tau_pos": 0.6, "tau_neg": 2.0}},
        {"loss_type": "vespo", "surrogate_params": {"k_pos": 1.5, "lambda_neg": 2.5}},
    ],
    ids=lambda options: options["loss_type"],
)
def test_any_surrogate_is_a_loss_type_with_its_parameters(tmp_path, options):
    made = make.experience(**OFF_POLICY)
    check_grpo_config(make.config(tmp_path, **options), 1)
    metrics, gradient = update(tmp_path, made, **options)
    loss, expected = naive(tmp_path, made, **options)
    assert metrics["loss"] == pytest.approx(loss, rel=3e-5, abs=1e-6)
    assert_near(gradient, expected)


def test_a_registered_surrogate_is_a_loss_type(tmp_path, monkeypatch):
    monkeypatch.setitem(SURROGATES, "quadratic", None)  # taken out again afterwards
    del SURROGATES["quadratic"]

    def quadratic(logp, old_logp, advantage, parameters):
        x = logp - old_logp
        loss = -advantage * x.exp() + parameters[0] * x * x
        return loss, -advantage * x.exp() + 2 * parameters[0] * x, torch.zeros_like(x).bool()

    rl.register_surrogate("quadratic", quadratic, parameters=("weight",))
    made = make.experience(**OFF_POLICY)
    with pytest.raises(UserError, match=r"'quadratic'.*needs surrogate_params \['weight'\]"):
        check_grpo_config(make.config(tmp_path, loss_type="quadratic"), 1)
    options = {"loss_type": "quadratic", "surrogate_params": {"weight": 0.5}}
    check_grpo_config(make.config(tmp_path, **options), 1)
    _, weighted = update(tmp_path, made, **options)
    assert weighted.norm() > 0


def test_tokens_whose_kl_is_bounded_are_counted(tmp_path):
    made = make.experience(**OFF_POLICY)
    made.ref_logp[0, 0] += 30.0
    metrics, gradient = update(tmp_path, made, beta=0.1)
    assert metrics["kl/bounded"] == pytest.approx(1 / int(made.mask.sum()))
    assert gradient.isfinite().all()
    assert "kl/bounded" not in update(tmp_path, made, beta=0.1, kl_estimator="k2")[0]


MASKS = {
    "off_policy": {"off_policy_mask_threshold": 0.05},
    "second_moment": {"second_moment_threshold": 0.02},
    "low_entropy": {"top_entropy_quantile": 0.4},
    "all": {
        "off_policy_mask_threshold": 0.05,
        "second_moment_threshold": 0.02,
        "top_entropy_quantile": 0.6,
    },
}


def kept_tokens(made, options):
    """(N, C) factors of the surrogate, from a float64 pass of the model."""
    logp, entropy = make.naive_logp(tiny_model("gpt2").double(), made, 1.0)
    given = (logp.detach(), made.old_logp.double(), made.advantage.double(), made.mask)
    kept = made.mask.clone()
    if "off_policy_mask_threshold" in options:
        kept &= rl.off_policy_mask(*given, threshold=options["off_policy_mask_threshold"])
    if "second_moment_threshold" in options:
        kept &= rl.second_moment_mask(*given, threshold=options["second_moment_threshold"])
    if "top_entropy_quantile" in options:
        share = options["top_entropy_quantile"]
        kept &= rl.high_entropy_mask(entropy.detach(), made.mask, top_entropy_quantile=share)
    return kept


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cut", [{}, {"per_device_train_batch_size": 2}], ids=["whole", "cut"])
def test_masked_tokens_are_left_out_of_the_surrogate_alone(tmp_path, name, cut):
    made, options = make.experience(**OFF_POLICY), MASKS[name]
    kept = kept_tokens(made, options)
    assert kept[made.mask].any() and not kept[made.mask].all()
    wide = {"beta": 0.1, "epsilon": 5.0}  # what a clip leaves out anyway shows nothing
    cut = cut and cut | {"gradient_accumulation_steps": 4}
    metrics, gradient = update(tmp_path, made, **wide, num_iterations=2, **options, **cut)
    weighted = dataclasses.replace(made, importance_ratio=kept.float())
    expected, wanted = update(tmp_path, weighted, **wide)
    assert_near(gradient, wanted, 3e-6)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    _, unmasked = update(tmp_path, made, **wide)
    assert (unmasked - gradient).norm() > 1e-2 * gradient.norm()
    if name != "all":
        share = 1 - kept.sum() / made.mask.sum()
        assert metrics[f"masked/{name}"] == pytest.approx(float(share))


def test_nothing_is_asked_of_the_policy_where_all_ratios_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "completion_scores", None)
    made = make.experience()
    options = {"off_policy_mask_threshold": 0.1, "num_iterations": 2}
    metrics, _ = update(tmp_path, made, **options)
    assert not any(name.startswith("masked") for name in metrics)
    with pytest.raises(UserError, match="leave nothing out where a batch serves one step"):
        check_grpo_config(make.config(tmp_path, off_policy_mask_threshold=0.1), 1)


CUTS = [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
]


@pytest.mark.parametrize("cut", CUTS, ids=["2x4", "4x2", "8x1"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulated_micro_steps_are_the_large_batch(tmp_path, loss_type, cut):
    made = make.experience(**OFF_POLICY)
    options = {"loss_type": loss_type, "beta": 0.3}
    metrics, gradient = update(tmp_path, made, **options, **cut)
    expected, large = update(tmp_path, made, **options)
    assert_near(gradient, large, 3e-6)
    for name in ("loss", "entropy", "kl", "clip_ratio/region_mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_steps_that_count_for_themselves_would_not_be(tmp_path, loss_type, monkeypatch):
    made = make.experience(**OFF_POLICY)
    _, large = update(tmp_path, made, loss_type=loss_type)
    loss = grpo.surrogate_loss

    def own_count(run, part, num_items):
        token_mean = LOSS_TYPES[loss_type].loss_agg_mode == "token-mean"
        count = part.mask.sum() if token_mean else part.mask.any(1).sum()
        return loss(run, part, 4.0 * float(count))

    monkeypatch.setattr(grpo, "surrogate_loss", own_count)
    _, small = update(tmp_path, made, loss_type=loss_type, **CUTS[1])
    assert (small - large).norm() > 1e-2 * large.norm()


def test_rows_without_a_gradient_are_counted_but_not_computed(tmp_path, monkeypatch):
    made = make.experience(old=0.3)
    computed = []
    policy_loss = LogitsHead.policy_loss

    def spy(self, model, batch, *arguments, **options):
        computed.append(len(batch))
        return policy_loss(self, model, batch, *arguments, **options)

    monkeypatch.setattr(LogitsHead, "policy_loss", spy)
    _, short = update(tmp_path, made)
    assert sum(computed) == 5
    # an entropy bonus too small to matter makes every row matter
    _, long = update(tmp_path, made, entropy_coef=1e-30)
    assert sum(computed) == 5 + 8
    assert_near(short, long)


def test_a_batch_without_any_advantage_gives_a_zero_gradient(tmp_path):
    made = dataclasses.replace(make.experience(), advantage=torch.zeros(8))
    metrics, gradient = update(tmp_path, made)
    assert metrics["loss"] == 0.0
    assert torch.count_nonzero(gradient) == 0


def test_padding_columns_change_nothing(tmp_path):
    made = make.experience(**OFF_POLICY)
    extra = torch.full((8, 3), 7)

    def wider(value, fill=0.0):
        return torch.cat([value, torch.full((8, 2), fill, dtype=value.dtype)], dim=1)

    padded = dataclasses.replace(
        made,
        input_ids=torch.cat([extra, wider(made.input_ids, 9)], dim=1),
        attention_mask=torch.cat([extra * 0, wider(made.attention_mask, 0)], dim=1),
        mask=wider(made.mask, False),
        old_logp=wider(made.old_logp, float("nan")),
        ref_logp=wider(made.ref_logp, float("nan")),
    )
    _, gradient = update(tmp_path, padded, beta=0.3)
    _, expected = update(tmp_path, made, beta=0.3)
    assert_near(gradient, expected)


def test_the_first_pass_hands_out_the_sampling_policys_logp(tmp_path):
    made = make.experience()
    run = make.make_run(make.config(tmp_path, per_device_train_batch_size=3))
    logp, _ = update_policy(run, 1, made, EVERYTHING)
    useful = made.has_gradient()
    expected = make.naive_logp(tiny_model("gpt2"), made, 1.0)[0]
    difference = (logp - expected)[useful[:, None] & made.mask]
    assert difference.abs().max() < 1e-4


def test_logp_passes_are_made_only_where_they_are_needed(tmp_path, monkeypatch):
    calls = []

    def spy(run, policy, made):
        calls.append(policy.model)
        return made.mask

    monkeypatch.setattr(grpo, "completion_logp", spy)
    made, reference = make.experience(), Policy(object(), LogitsHead())

    def needed(reference=None, **changes):
        calls.clear()
        run = make.make_run(make.config(tmp_path, **changes))
        _with_other_policies(run, made, reference)
        return ["policy" if model is run.model else "reference" for model in calls]

    assert needed() == []
    assert needed(num_iterations=3) == []
    assert needed(steps_per_generation=2) == ["policy"]
    assert needed(reference) == ["reference"]


def test_logp_of_another_policy_is_that_of_its_own_forward_pass(tmp_path):
    made = make.experience()
    run = make.make_run(make.config(tmp_path, temperature=0.7, entropy_coef=0.1))
    other = tiny_model("gpt2", seed=5)
    expected = make.naive_logp(other, made, 0.7)[0]
    logp = completion_logp(run, Policy(other, LogitsHead()), made)
    assert (logp - expected)[made.mask].abs().max() < 1e-4
    assert torch.all(logp[~made.mask] == 0)


def test_a_second_pass_is_clipped_where_the_ratio_went_too_far(tmp_path):
    made = make.experience(old=0.5)
    metrics, _ = update(tmp_path, made, epsilon=0.1)
    model = tiny_model("gpt2")
    ratio = (make.naive_logp(model, made, 1.0)[0] - made.old_logp).exp()
    advantage = made.advantage[:, None]
    counted = made.mask & made.has_gradient()[:, None]
    low = ((ratio < 0.9) & (advantage < 0))[counted].float().mean().item()
    high = ((ratio > 1.1) & (advantage > 0))[counted].float().mean().item()
    assert low > 0 and high > 0
    assert metrics["clip_ratio/low_mean"] == pytest.approx(low)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(high)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(low + high)


def test_metrics_of_a_generation_batch_by_hand(tmp_path):
    nan = float("nan")
    config = make.config(tmp_path, reward=["exact_match"])
    judge = make_judge(config, [lambda prompts, completions: []])
    scores = torch.tensor([[1.0, 1.0], [0.0, nan], [nan, nan], [2.0, 2.0]])
    everyone = {
        "total": torch.tensor([1.0, 0.0, nan, 2.0]),
        "per_function": scores,
        "length": torch.tensor([1, 2, 3, 6]),
        "tokens": torch.tensor([5, 5, 5, 9]),
        "truncated": torch.tensor([False, False, False, True]),
    }
    metrics = _metrics(everyone, judge, 2)
    expected = {
        "reward": 1.0,
        "reward_std": 0.5**0.5 / 2,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 3.0,
        "completions/min_length": 1,
        "completions/max_length": 6,
        "completions/clipped_ratio": 0.25,
        "completions/unjudged": 1,
        "tokens": 24,
        "rewards/exact_match/mean": 1.0,
        "rewards/exact_match/std": 1.0,
        "rewards/<lambda>/mean": 1.5,
        "rewards/<lambda>/std": 0.5**0.5,
    }
    assert metrics == pytest.approx(expected)


def test_functions_of_one_name_get_a_number_each(tmp_path):
    judge = make_judge(make.config(tmp_path, reward=["exact_match"]), [make_judge, make_judge])
    assert judge.names == ("exact_match", "make_judge_0", "make_judge_1")
