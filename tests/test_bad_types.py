"""Lists, arrays, nothing and wrong ranks in the place of a tensor: one error names the argument."""

from __future__ import annotations

import inspect
import math
import re
import typing

import numpy as np
import pytest
import torch
from torch import Tensor

import rlcore as rl

N, B, T, V, H = 4, 2, 3, 5, 6


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def true(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


CU_SEQLENS = torch.tensor([0, 1, N], dtype=torch.int32)
PACKED = {"loss_agg_mode": "seq-mean-token-mean", "cu_seqlens": CU_SEQLENS, "num_items": 2}
POLICY = {
    "target": ids(N), "advantage": x(N), "old_logp": x(N), "ref_logp": x(N), "mask": true(N),
    "importance_sampling_ratio": x(N), "beta": 0.1, "epsilon": 0.2, "delta": 3.0,
    "temperature": 1.0, "entropy_coef": 0.1, **PACKED,
}  # fmt: skip
ROWS = {"target": ids(N), "mask": true(N), "temperature": 1.0}
HEAD = {"hidden": x(N, H), "weight": x(V, H), "bias": x(V), "softcap": 2.0, "logit_scale": 1.0}
SCORES = {"score": x(B), "logp": x(B, T), "ref_logp": x(B, T), "mask": true(B, T), "beta": 0.1}
SCAN = {"mask": true(B, T), "terminated": ~true(B, T), "last_value": x(B), "gamma": 1.0}
PAIR = {"logp": x(B, T), "old_logp": x(B, T), "mask": true(B, T)}
GOOD = {
    "token_logprob": {"logits": x(N, V), **ROWS},
    "policy_loss": {"logits": x(N, V), **POLICY},
    "linear_token_logprob": HEAD | ROWS,
    "linear_policy_loss": HEAD | POLICY,
    "linear_preference_loss": HEAD
    | {
        "hidden": x(2 * B, T, H), "target": ids(2 * B, T), "mask": true(2 * B, T),
        "ref_logp": x(2 * B), "beta": 0.1, "num_items": 2,
    },
    "plan_linear": {"hidden": x(N, H), "weight": x(V, H), "bias": x(V), "chunk_bytes": 9},
    "categorical_kl": {
        "p_logits": x(N, V), "q_logits": x(N, V), "mask": true(N), "temperature": 1.0,
    },
    "categorical_divergence": {
        "logits": x(N, V), "other_logits": x(N, V), "mask": true(N), "temperature": 1.0,
        "kind": "jsd", "jsd_beta": 0.5,
    },
    "topk_divergence": {
        "logits": x(N, V), "teacher_ids": ids(N, 2), "teacher_logp": x(N, 2), "mask": true(N),
        "temperature": 1.0,
    },
    "linear_categorical_divergence": {
        "hidden": x(N, H), "weight": x(V, H), "other_hidden": x(N, H), "other_weight": x(V, H),
        "bias": x(V), "mask": true(N), "temperature": 1.0, "kind": "jsd", "jsd_beta": 0.5,
    },
    "linear_categorical_kl": {
        "p_hidden": x(N, H), "p_weight": x(V, H), "q_hidden": x(N, H), "q_weight": x(V, H),
        "p_bias": x(V), "mask": true(N), "temperature": 1.0,
    },
    "fisher_vector_product": {"logits": x(N, V), "tangent": x(N, V), "temperature": 1.0},
    "token_kl": {"logp": x(B, T), "ref_logp": x(B, T)},
    "shaped_reward": SCORES,
    "gae": {"reward": x(B, T), "value": x(B, T), "lam": 0.9, **SCAN},
    "discounted_return": {"reward": x(B, T), **SCAN},
    "gae_from_scores": {**SCORES, "value": x(B, T), **SCAN},
    "group_advantage": {"reward": x(N), "num_generations": 2},
    "decoupled_group_advantage": {"reward": x(N, 2), "num_generations": 2},
    "leave_one_out_advantage": {"reward": x(N), "num_generations": 2},
    "future_kl_weight": {**PAIR, "half_life": 4.0},
    "rejection_mask": {**PAIR, "kind": "k2", "upper": 0.1},
    "off_policy_mask": {**PAIR, "advantage": x(B), "threshold": 0.1},
    "second_moment_mask": {**PAIR, "advantage": x(B), "threshold": 0.1},
    "high_entropy_mask": {
        "entropy": x(B, T), "mask": true(B, T), "top_entropy_quantile": 0.2
    },
    "whiten": {"x": x(B, T), "mask": true(B, T)},
    "value_loss": {
        "value": x(B, T), "old_value": x(B, T), "returns": x(B, T), "mask": true(B, T),
        "epsilon": 0.2, "num_items": 3,
    },
    "pairwise_reward_loss": {
        "chosen": x(B), "rejected": x(B), "margin": x(B), "center_rewards_coefficient": 0.1,
        "num_items": 2,
    },
    "preference_loss": {
        "chosen_logp": x(B), "rejected_logp": x(B), "ref_chosen_logp": x(B),
        "ref_rejected_logp": x(B), "chosen_length": ids(B), "rejected_length": ids(B),
        "pair_weight": x(B), "beta": 0.1, "num_items": 2,
    },
    "kto_loss": {
        "logp": x(B), "ref_logp": x(B), "desirable": true(B), "kl": 0.1, "beta": 0.1,
        "desirable_weight": 1.0, "num_items": 2,
    },
    "importance_weights": {
        "old_logp": x(B, T), "sampling_logp": x(B, T), "mask": true(B, T), "low": 0.0, "high": 2.0,
    },
    "clip_cov_weight": {
        "logp": x(B, T), "advantage": x(B, T), "mask": true(B, T), "fraction": 0.5, "low": 1.0,
    },
    "kl_cov_mask": {"logp": x(B, T), "advantage": x(B, T), "mask": true(B, T), "fraction": 0.5},
    "conjugate_gradient": {"matvec": lambda v: v, "b": x(N), "tol": 1e-6, "damping": 0.1},
    "line_search": {"evaluate": lambda s: (1.0, 0.0), "delta": 0.1, "step": 1.0, "shrink": 0.5},
    "ppo_kl_coef": {"kl_coef": 0.1, "kl": 0.2, "target": 0.1, "factor": 2.0},
    "proportional_kl_coef": {"kl_coef": 0.1, "kl": 0.2, "target": 0.1, "gain": 0.1},
}  # fmt: skip
# results, context managers and what takes no tensor
OTHERS = {
    "CGResult", "GAE", "GAEFromScores", "LineSearch", "LinearPlan", "ModelHead", "PolicyLoss",
    "PreferenceLoss", "TokenLogprob", "fused_head", "register_surrogate", "use_backend",
}  # fmt: skip
# tensors that may also be numbers or lists of tensors
LOOSE = {("conjugate_gradient", "b"), ("kto_loss", "kl"), ("pairwise_reward_loss", "margin")}


def test_every_public_function_is_here():
    assert set(GOOD) | OTHERS == set(rl.__all__) - {"__version__"}


def wrong_values(function: str, name: str, good) -> dict[str, object]:
    """What an argument must not be, by a description."""
    parameter = inspect.signature(getattr(rl, function)).parameters[name]
    if callable(good):
        return {}
    if not isinstance(good, Tensor):
        wrong = {"a list": [good], "a string": "many"}
        if parameter.annotation in ("int", "int | None"):
            wrong["a fraction"] = good + 0.5
        return wrong if parameter.default is None else wrong | {"nothing": None}
    wrong = {"an array": good.numpy(), "a list": good.tolist()}
    if (function, name) in LOOSE:
        wrong.pop("an array")
    if function not in ("token_kl", "whiten", "conjugate_gradient"):
        wrong |= {"a scalar": good.sum(), "too many dimensions": good[(None,) * 4]}
    else:
        wrong |= {"an integer": 3}
    return wrong if parameter.default is None else wrong | {"nothing": None}


@pytest.mark.parametrize("function", GOOD)
def test_a_wrong_argument_is_named(function):
    call, good = getattr(rl, function), GOOD[function]
    call(**good)
    unnamed = []
    for name, value in good.items():
        for description, wrong in wrong_values(function, name, value).items():
            try:
                call(**good | {name: wrong})
            except (ValueError, TypeError) as error:
                if re.search(rf"\b{name}\b", str(error)) and "\n" not in str(error):
                    continue
                unnamed.append(f"{name} {description}: {error}")
            except Exception as error:
                unnamed.append(f"{name} {description}: {type(error).__name__}: {error}")
            else:
                unnamed.append(f"{name} {description}: accepted")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize("function", GOOD)
def test_signature_and_annotations_name_every_argument(function):
    call = getattr(rl, function)
    parameters = inspect.signature(call).parameters
    assert GOOD[function].keys() <= parameters.keys()
    assert typing.get_type_hints(call).keys() - {"return"} == parameters.keys()


WITH_OPTIONS = ["policy_loss", "linear_policy_loss", "preference_loss", "linear_preference_loss"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", WITH_OPTIONS)
def test_a_misspelled_option_is_refused_compiled_or_not(function, compiled):
    def call():
        return getattr(rl, function)(**GOOD[function], tempreature=0.5)

    torch.compiler.reset()
    run = torch.compile(call, backend="eager") if compiled else call
    with pytest.raises(TypeError, match=rf"{function}\(\).*'tempreature'"):
        run()


def test_a_numpy_count_is_a_number():
    value = x(B, T)
    loss = rl.value_loss(value, value, value + 1, num_items=np.int64(3))
    assert loss.item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="num_items must be positive"):
        rl.value_loss(value, value, value, num_items=np.int64(-3))


NORM = {"loss_agg_mode": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("wrong", [-1.0, 0, math.inf, math.nan, "x", [2], torch.zeros(()), x(2)])
def test_a_length_in_the_denominator_is_one_positive_number(wrong):
    with pytest.raises(ValueError, match="norm_length"):
        rl.policy_loss(x(N, V), **POLICY | NORM, norm_length=wrong)


@pytest.mark.parametrize("wrong", [3, {"kl_coef": "x"}, {"kl_coef": None}, {"kl_coef": x(2)}])
def test_a_surrogates_parameter_is_a_number(wrong):
    with pytest.raises(ValueError, match=r"surrogate_params|kl_coef"):
        rl.policy_loss(x(N, V), ids(N), x(N), surrogate="kl_cov", surrogate_params=wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("loss_type", None), ("loss_type", 3), ("loss_weights", 1.0), ("loss_weights", "a"),
        ("loss_weights", ["a"]), ("loss_weights", [None]),
    ],
)  # fmt: skip
def test_a_loss_type_is_a_name_and_its_weight_a_number(name, wrong):
    with pytest.raises(ValueError, match=name):
        rl.preference_loss(*(x(B) for _ in range(4)), **{name: wrong})


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_in_the_place_of_a_tensor_is_finite(wrong):
    with pytest.raises(ValueError, match="kl must be a finite number"):
        rl.kto_loss(x(B), x(B), true(B), kl=wrong)
    with pytest.raises(ValueError, match="margin must be a finite number"):
        rl.pairwise_reward_loss(x(B), x(B), margin=wrong)
