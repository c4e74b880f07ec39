"""A random search over every argument of the losses, up to +-1e4, against 60 digits.

Where the right value fits the dtype, the result is that value; beyond it anything but NaN.
`RLCORE_SEARCH=20 python -m pytest tests/test_search_formulas.py` searches twenty times as long.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DEVICE, exact
from helpers.exact import Token, assert_value
from helpers.search import masks, numbers, search, tensors
from helpers.surrogates import PRODUCTS
from hypothesis import assume, given
from hypothesis import strategies as st
from mpmath import mp

import rlcore as rl
from rlcore.integrations.logp_loss import policy_loss_from_logp
from rlcore.kernels.formulas.f_divergences import F_DIVERGENCES
from rlcore.kernels.formulas.kl import POLICY_KL_ESTIMATORS
from rlcore.kernels.formulas.pair_losses import PREFERENCE_LOSSES
from rlcore.kernels.formulas.surrogates import SURROGATES

T, V = 3, 3
positive = numbers(1e-4)
CLIP = {"epsilon": positive, "epsilon_high": st.none() | positive}
OPTIONS = {
    "reinforce": {},
    "ppo_clip": CLIP | {"delta": st.none() | positive},
    "ppo_penalty": {"kl_coef": numbers()},
    "cispo": CLIP,
    "cispo_abs": {"epsilon_high": positive},
    "sapo": {"tau_pos": positive, "tau_neg": positive},
    "gmpo": CLIP,
    "vespo": dict.fromkeys(("k_pos", "lambda_pos", "k_neg", "lambda_neg"), positive),
    "dppo_tv": CLIP,
    "dppo_kl": CLIP,
    "prime_rl": CLIP | {"kl_tau": numbers()},
    "dro": {"tau": numbers()},
    "kl_cov": {"kl_coef": numbers()},
}
AT = [(name, level) for name in OPTIONS for level in SURROGATES[name].levels]


@st.composite
def policies(draw, only=AT):
    """A policy loss's options, as the call takes them and as the definition does."""
    name, level = draw(st.sampled_from(only))
    given = {key: draw(value) for key, value in OPTIONS[name].items()}
    defined = {key: value for key, value in given.items() if value is not None}
    own = {key: given.pop(key) for key in list(given) if key in SURROGATES[name].defaults}
    call = {"surrogate": name, "importance_sampling_level": level, **given}
    if own:
        call["surrogate_params"] = own
    estimators = [e for e in POLICY_KL_ESTIMATORS if (name, e) != ("gmpo", "k3_ratio")]
    call |= {"beta": draw(numbers()), "kl_estimator": draw(st.sampled_from(estimators))}
    return call, defined


def nudged(x: float, dtype: torch.dtype) -> list[float]:
    return [x * (1 + k * exact.eps_of(dtype)) for k in (-4, 4)]


class Definition:
    """The loss of a sequence of counted tokens and its derivatives, by the definitions."""

    def __init__(self, call, defined, rows: dict[str, list[float]], dtype: torch.dtype, shift=0):
        self.call, self.rows = call, rows
        self.is_float32 = dtype == torch.float32
        name, count = call["surrogate"], len(rows["logp"])
        x = [mp.mpf(a) - mp.mpf(b) for a, b in zip(rows["logp"], rows["old_logp"], strict=True)]
        held = [False] * count
        if name == "gmpo":
            x, held = zip(*map(self._clip, x, rows["advantage"]), strict=True)
        at_sequence = call["importance_sampling_level"] == "sequence"
        shares = [not h for h in held]
        if at_sequence:
            x = [mp.fsum(x) / (1 if name in PRODUCTS else count) + shift] * count
        self.loss, self.size, self.clipped = [], [], list(held)
        by_ratio, self.slope, self.slope_size = [], [], []
        for t in range(count):
            token, kl = self._token(t, x[t], defined)
            w = rows["ratio"][t]
            self.loss.append(w * token.loss + call["beta"] * kl.loss)
            parts = (token.loss, token.size, kl.loss, kl.size)
            self.size.append(self._largest(parts, w))
            by_ratio.append(w * token.by_ratio + call["beta"] * kl.by_ratio)
            self.slope.append(w * token.by_logp + call["beta"] * kl.by_logp)
            parts = (token.by_ratio, token.size, token.by_logp, kl.by_ratio, kl.by_logp, kl.size)
            self.slope_size.append(self._largest(parts, w))
            self.clipped[t] |= token.clipped
        if at_sequence:
            by_ratio = [mp.fsum(by_ratio) / (1 if name in PRODUCTS else count)] * count
            self.slope_size = [max(self.slope_size)] * count
        self.slope = [
            s + share * r for s, share, r in zip(self.slope, shares, by_ratio, strict=True)
        ]

    def _largest(self, parts, ratio):
        """What is added up; infinite where a part overflows before its coefficient shrinks it."""
        half = len(parts) // 2
        factors = [ratio] * half + [self.call["beta"]] * half
        if max(map(abs, parts)) > torch.finfo(torch.float32).max and self.is_float32:
            return mp.inf
        return max(abs(f * part) for f, part in zip(factors, parts, strict=True))

    def _clip(self, x, A):
        high = self.call["epsilon_high"]
        high = self.call["epsilon"] if high is None else high
        if A > 0 and x > high:
            return mp.mpf(high), True
        return (
            (mp.mpf(-self.call["epsilon"]), True)
            if A < 0 and x < -self.call["epsilon"]
            else (x, False)
        )

    def _token(self, t, x, defined) -> tuple[Token, Token]:
        logp, old, A = (mp.mpf(self.rows[k][t]) for k in ("logp", "old_logp", "advantage"))
        token = exact.SURROGATES[self.call["surrogate"]](x, logp, old, A, **defined)
        return token, exact.kl(self.call["kl_estimator"], x, logp, mp.mpf(self.rows["ref_logp"][t]))


def definitions(call, defined, rows, dtype) -> tuple[Definition, list[Definition]]:
    """The definition, and those of inputs a rounding away; a case on a clip's edge is left out."""
    want, near = Definition(call, defined, rows, dtype), []
    for name in ("logp", "old_logp", "ref_logp"):
        for k in (0, 1):
            moved = [nudged(x, dtype)[k] for x in rows[name]]
            near.append(Definition(call, defined, rows | {name: moved}, dtype))
    if call["importance_sampling_level"] == "sequence":
        # the shared log-ratio is as right as what it is added up from, and as the logp beside it
        parts = [abs(x) for name in ("logp", "old_logp") for x in rows[name]]
        for k in (-4, 4):
            shift = k * exact.eps_of(dtype) * math.fsum(parts)
            near.append(Definition(call, defined, rows, dtype, mp.mpf(shift)))
    assume(all(n.clipped == want.clipped for n in near))
    return want, near


def total(parts: list) -> mp.mpf:
    return mp.fsum(parts)


@search(200)
@given(
    policy=policies(),
    rows=st.fixed_dictionaries(
        {"logp": tensors(1, T), "old_logp": tensors(1, T), "ref_logp": tensors(1, T),
         "advantage": tensors(1, T), "ratio": tensors(1, T)}
    ),
    mask=masks(1, T),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_a_policy_loss_of_log_probabilities_is_its_definition(policy, rows, mask, dtype):
    call, defined = policy
    if call["surrogate"] == "dppo_kl":
        rows |= {name: -rows[name].abs() for name in ("logp", "old_logp")}
    on_policy = not SURROGATES[call["surrogate"]].has_ratio
    if on_policy:
        rows["old_logp"] = rows["logp"]
    logp = rows["logp"].to(dtype).requires_grad_()
    out = policy_loss_from_logp(
        logp, rows["advantage"], old_logp=None if on_policy else rows["old_logp"],
        ref_logp=rows["ref_logp"], importance_sampling_ratio=rows["ratio"], mask=mask, **call,
    )  # fmt: skip
    (dlogp,) = torch.autograd.grad(out.loss, logp)
    assert not dlogp[~mask].any(), "a masked token has a gradient"
    counted = {name: value[mask].tolist() for name, value in rows.items()}
    count = len(counted["logp"])
    if not count:
        return
    want, near = definitions(call, defined, counted, dtype)
    assert out.clipped[mask].tolist() == want.clipped
    assert_value(
        out.loss.item(), total(want.loss) / count, [total(n.loss) / count for n in near],
        max(want.size), dtype, "loss",
    )  # fmt: skip
    for t, got in enumerate(dlogp[mask].tolist()):
        assert_value(
            got, want.slope[t] / count, [n.slope[t] / count for n in near],
            want.slope_size[t], dtype, f"dlogp of token {t}",
        )  # fmt: skip
        # a sequence's ratio has the gradient of its tokens that are not clipped
        alone = call["beta"] == 0 and call["importance_sampling_level"] == "token"
        assert got == 0 or not (want.clipped[t] and alone)


@st.composite
def logit_rows(draw):
    """Logits (1, T, V) as a list, targets, and the temperature."""
    target = draw(st.lists(st.integers(0, V - 1), min_size=T, max_size=T))
    return draw(tensors(1, T, V)), torch.tensor([target]), draw(numbers(1e-3))


FUSED = [(name, level) for name, level in AT if level == "token"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@search(25)
@given(
    policy=policies(FUSED),
    logits=logit_rows(),
    rows=st.fixed_dictionaries(
        {"old_logp": tensors(1, T), "ref_logp": tensors(1, T), "advantage": tensors(1, T),
         "ratio": tensors(1, T)}
    ),
    mask=masks(1, T),
    entropy_coef=numbers(),
)  # fmt: skip
def test_a_policy_loss_of_logits_is_its_definition(
    dtype, backend, policy, logits, rows, mask, entropy_coef
):
    call, defined = policy
    z, target, temperature = logits
    z = z.to(dtype)
    assume(z.isfinite().all())
    on_policy = not SURROGATES[call["surrogate"]].has_ratio
    leaf = z.to(DEVICE).requires_grad_()
    given = {"ref_logp": rows["ref_logp"], "importance_sampling_ratio": rows["ratio"], "mask": mask}
    given["old_logp"] = None if on_policy else rows["old_logp"]
    out = rl.policy_loss(
        leaf, target.to(DEVICE), rows["advantage"].to(DEVICE), temperature=temperature,
        entropy_coef=entropy_coef, num_items=T, backend=backend, **call,
        **{name: None if x is None else x.to(DEVICE) for name, x in given.items()},
    )  # fmt: skip
    (dz,) = torch.autograd.grad(out.loss, leaf)
    dz, out = dz.cpu(), [None if x is None else x.cpu() for x in out]
    assert not dz[~mask].any(), "a masked token has a gradient"
    rows["logp"] = out[1]
    if on_policy:
        rows["old_logp"] = out[1]
    if call["surrogate"] == "dppo_kl":
        assume((rows["old_logp"] <= 0).all())
    counted = {name: value[mask].tolist() for name, value in rows.items()}
    if not len(counted["logp"]):
        return
    want, near = definitions(call, defined, counted, torch.float32)
    assert out[4][mask].tolist() == want.clipped
    entropy = [entropy_coef * mp.mpf(h) for h in out[2][mask].tolist()]
    assert_value(
        out[0].item(), (total(want.loss) - total(entropy)) / T,
        [(total(n.loss) - total(entropy)) / T for n in near],
        max(map(abs, [*want.size, *entropy])), torch.float32, "loss",
    )  # fmt: skip
    places = mask.nonzero().tolist()
    for t, place in enumerate(places):
        row = [mp.mpf(x) / mp.mpf(temperature) for x in z[tuple(place)].tolist()]
        slopes = [d.slope[t] for d in (want, *near)]
        check_row(dz[tuple(place)], row, int(target[tuple(place)]), slopes, want.slope_size[t],
                  entropy_coef, temperature, dtype)  # fmt: skip


def check_row(got, z, target, slopes, size, entropy_coef, temperature, dtype) -> None:
    """dz = (g (1[target] - p) + c p (log p + H)) / T, times 1 / num_items, in the logits' dtype."""
    top = max(z)
    log_sum = mp.log(mp.fsum(mp.exp(x - top) for x in z))
    log_p = [x - top - log_sum for x in z]
    entropy = -mp.fsum(mp.exp(x) * x for x in log_p)
    for j, value in enumerate(got.tolist()):
        p = mp.exp(log_p[j])
        bonus = entropy_coef * p * (log_p[j] + entropy)
        wants = [(g * ((j == target) - p) + bonus) / temperature / T for g in slopes]
        # p is as right as its exponent, and 1 - p as 1
        far = p * (1 + abs(z[j] - top)) + (j == target)
        rounding = max(abs(slopes[0]), size) * far
        rounding += abs(entropy_coef) * p * (1 + abs(z[j] - top)) * (1 + abs(log_p[j]) + entropy)
        rounding = 4 * rounding / temperature / T
        coarse = torch.finfo(dtype).eps / exact.eps_of(dtype) * abs(wants[0])
        fits = abs(wants[0]) < torch.finfo(dtype).max * 0.99
        if not fits or max(map(abs, [size, *slopes])) > torch.finfo(torch.float32).max * 0.99:
            assert value == value, f"dlogits of column {j} is NaN, right {mp.nstr(wants[0], 8)}"
            continue
        assert_value(value, wants[0], wants[1:], max(rounding, coarse), dtype, f"dlogits {j}")


B = 2
# "aot" and "aot_unpaired" sort their pairs: `test_preference_loss.py` has them
PREFERENCES = sorted(exact.PREFERENCES)
SMOOTHED = ("sigmoid", "robust", "exo_pair", "simpo", "cpo")


@st.composite
def preferences(draw):
    """A preference loss's name and its numbers."""
    name = draw(st.sampled_from(PREFERENCES))
    kinds = list(F_DIVERGENCES) if PREFERENCE_LOSSES[name].uses_scores else ["reverse_kl"]
    smoothing = st.floats(0, 0.4) if name in SMOOTHED else st.just(0.0)
    drawn = {
        "beta": positive, "label_smoothing": smoothing, "discopop_tau": positive,
        "simpo_gamma": numbers(), "cpo_alpha": numbers(),
        "f_divergence_type": st.sampled_from(kinds), "f_alpha_divergence_coef": numbers(),
    }  # fmt: skip
    return name, {key: draw(value) for key, value in drawn.items()}


SUMS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


@search(100)
@given(
    preference=preferences(),
    sums=st.lists(tensors(B), min_size=4, max_size=4),
    lengths=st.lists(st.integers(0, 5), min_size=2 * B, max_size=2 * B),
    weight=tensors(B),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_preference_loss_is_its_definition(preference, sums, lengths, weight, dtype):
    name, p = preference
    entry = PREFERENCE_LOSSES[name]
    if name == "orpo":
        # p < 1: its limit is in test_preference_loss.py
        sums = [-x.abs().clamp(min=1e-20) for x in sums]
    sums = [x.to(dtype) for x in sums]
    reference = sums[2:] if entry.uses_reference else ()
    leaves = [x.clone().requires_grad_() for x in sums[:2]]
    sides = [torch.tensor(side) for side in (lengths[:B], lengths[B:])]
    out = rl.preference_loss(
        *leaves, *reference, loss_type=name, chosen_length=sides[0], rejected_length=sides[1],
        pair_weight=weight, num_items=1, **p,
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, leaves, materialize_grads=True)
    wants, nears, overflows = [], [], False
    for b in range(B):
        pair = exact.Pair(*(mp.mpf(x[b].item()) for x in sums), lengths[b], lengths[B + b])
        if not entry.uses_reference:
            pair = pair._replace(ref_chosen=mp.zero, ref_rejected=mp.zero)
        want, near = exact_pair(name, pair, p, dtype)
        overflows |= exact_overflow(pair, p, dtype, entry.uses_scores)
        wants.append([mp.mpf(weight[b].item()) * x for x in want])
        nears.append([[mp.mpf(weight[b].item()) * x for x in n] for n in near])
        for side in (0, 1):
            assert_value(
                gradients[side][b].item(), wants[b][1 + side], [n[1 + side] for n in nears[b]],
                mp.inf if overflows else abs(wants[b][0]) * 1e-25, dtype,
                f"gradient of {SUMS[side]} {b}",
            )  # fmt: skip
    totals = [sum(n[0] for n in near) for near in zip(*nears, strict=True)]
    size = mp.inf if overflows else max(abs(want[0]) for want in wants)
    assert_value(out.loss.item(), sum(want[0] for want in wants), totals, size, dtype, "loss")


def exact_pair(name, pair, p, dtype):
    """[loss, dchosen, drejected] by the definition, and the same of inputs a rounding away."""
    formula = exact.PREFERENCES[name]

    def of(pair, p):
        def slope(side):
            return mp.diff(lambda x: formula(pair._replace(**{side: x}), p), getattr(pair, side))

        return [formula(pair, p), *map(slope, SUMS[:2])]

    moved = []
    for side in SUMS:
        moved += [(pair._replace(**{side: x}), p) for x in nudged(getattr(pair, side), dtype)]
    for key in ("beta", "discopop_tau", "simpo_gamma"):
        moved += [(pair, p | {key: x}) for x in nudged(p[key], dtype)]
    return of(pair, p), [of(*case) for case in moved]


def exact_overflow(pair, p, dtype, uses_scores: bool) -> bool:
    """Whether the margin or its derivative lies beyond the dtype, before beta makes it small."""
    if not uses_scores:
        return False
    kind, alpha = p["f_divergence_type"], p["f_alpha_divergence_coef"]
    ratios = (pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected)
    scores = [exact.score(kind, x, alpha) for x in ratios]
    slopes = [mp.diff(lambda x: exact.score(kind, x, alpha), x) for x in ratios]
    return max(map(abs, [scores[0] - scores[1], *slopes])) > torch.finfo(dtype).max / 1e6


@search(100)
@given(
    rows=st.lists(tensors(B), min_size=2, max_size=2),
    desirable=masks(B),
    kl=numbers(0.0),
    beta=positive,
    weights=st.tuples(positive, positive),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ktos_loss_is_its_definition(rows, desirable, kl, beta, weights, dtype):
    logp, ref_logp = (x.to(dtype) for x in rows)
    leaf = logp.clone().requires_grad_()
    out = rl.kto_loss(
        leaf, ref_logp, desirable, kl=kl, beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], num_items=1,
    )  # fmt: skip
    (dlogp,) = torch.autograd.grad(out, leaf)

    def of(b, logp, ref_logp, kl):
        good = bool(desirable[b])
        sign, weight = (1, weights[0]) if good else (-1, weights[1])
        u = beta * sign * (mp.mpf(logp) - mp.mpf(ref_logp) - mp.mpf(kl))
        down = exact.sigmoid(-u)
        return weight * down, -weight * beta * sign * down * exact.sigmoid(u)

    totals = []
    for b in range(B):
        inputs = [logp[b].item(), ref_logp[b].item(), kl]
        want, near = of(b, *inputs), []
        for i in range(3):
            near += [of(b, *inputs[:i], x, *inputs[i + 1 :]) for x in nudged(inputs[i], dtype)]
        assert_value(dlogp[b].item(), want[1], [n[1] for n in near], 0, dtype, f"dlogp {b}")
        totals.append([want[0], *(n[0] for n in near)])
    want, *near = (sum(parts) for parts in zip(*totals, strict=True))
    assert_value(out.item(), want, near, 0, dtype, "loss")


scans = st.fixed_dictionaries(
    {"reward": tensors(B, T), "value": tensors(B, T), "mask": masks(B, T),
     "terminated": masks(B, T), "last_value": tensors(B)}
)  # fmt: skip
fractions = st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32)


@search(10)
@given(rows=scans, gamma=fractions, lam=fractions)
def test_gae_and_returns_are_their_recursions(backend, rows, gamma, lam):
    given = {name: rows[name].to(DEVICE) for name in ("mask", "terminated", "last_value")}
    reward, value = rows["reward"].to(DEVICE), rows["value"].to(DEVICE)
    got = rl.gae(reward, value, gamma=gamma, lam=lam, backend=backend, **given)
    returns = rl.discounted_return(reward, gamma=gamma, backend=backend, **given)
    for b in range(B):
        following = discounted = mp.mpf(rows["last_value"][b].item())
        advantage, size = mp.zero, abs(following)
        for t in reversed(range(T)):
            if not rows["mask"][b, t]:
                for x in (*got, returns):
                    assert x[b, t] == 0
                continue
            r, v = (mp.mpf(rows[name][b, t].item()) for name in ("reward", "value"))
            goes_on = not rows["terminated"][b, t]
            delta = r + gamma * following * goes_on - v
            advantage = delta + gamma * lam * advantage * goes_on
            discounted = r + gamma * discounted * goes_on
            size += abs(r) + abs(v)
            for x, want in zip(
                (*got, returns), (advantage, advantage + v, discounted), strict=True
            ):
                assert_value(x[b, t].item(), want, [], 4 * size, torch.float32, f"{b}, {t}")
            following = v


@search(20)
@given(
    score=tensors(B),
    logps=st.lists(tensors(B, T), min_size=2, max_size=2),
    mask=masks(B, T),
    beta=numbers(),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
)
def test_shaped_rewards_are_their_definition(backend, score, logps, mask, beta, kl_estimator):
    arguments = [x.to(DEVICE) for x in (score, *logps, mask)]
    got = rl.shaped_reward(*arguments, beta=beta, kl_estimator=kl_estimator, backend=backend)
    assert not got.cpu()[~mask].any()
    for b, t in mask.nonzero().tolist():
        logp, ref_logp = (mp.mpf(x[b, t].item()) for x in logps)
        scored = 0 if mask[b, t + 1 :].any() else score[b].item()
        kls = [exact.kl(kl_estimator, mp.zero, logp, ref_logp)]
        kls += [exact.kl(kl_estimator, mp.zero, x, ref_logp) for x in nudged(logp, torch.float32)]
        kls += [exact.kl(kl_estimator, mp.zero, logp, x) for x in nudged(ref_logp, torch.float32)]
        want, *near = (scored - beta * kl.loss for kl in kls)
        size = abs(scored) + abs(beta) * max(kls[0].size, abs(kls[0].loss))
        if abs(size) > torch.finfo(torch.float32).max * abs(beta):
            size = mp.inf
        assert_value(got[b, t].item(), want, near, size, torch.float32, f"reward {b}, {t}")
