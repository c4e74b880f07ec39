"""Every surrogate: against its definition, between backends and paths, and its identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import DEVICE, oracle
from helpers.cases import PolicyInputs, batch, flat, policy_inputs
from helpers.checks import check_policy_loss, on
from helpers.surrogates import OPTIONS
from torch import Tensor

import rlcore as rl
from rlcore.kernels.formulas.surrogates import LEVELS, SURROGATES

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
AT = [(name, level) for name, entry in SURROGATES.items() for level in entry.levels]
AT_TOKEN = [name for name, level in AT if level == "token"]
AT_SEQUENCE = [name for name, level in AT if level == "sequence"]
FUSED = [name for name, entry in SURROGATES.items() if entry.triton is not None]
MORE = {"beta": 0.1, "entropy_coef": 0.02, "temperature": 1.3}
CU_SEQLENS = torch.tensor([0, 7, 7, 8, 19, 32], dtype=torch.int32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def options(name: str, level: str = "token", **more) -> dict:
    return {"surrogate": name, "importance_sampling_level": level, **OPTIONS[name], **more}


def old_logp(name: str) -> tuple[str, ...]:
    return ("old_logp",) if SURROGATES[name].has_ratio else ()


def run(inputs: PolicyInputs, device="cpu", backend="torch", rows=slice(None), **more):
    """policy_loss on some rows of the inputs, and the gradient of its loss."""

    def part(x):
        return x[rows].to(device) if isinstance(x, Tensor) and x.dim() else x

    z = part(inputs.logits).detach().requires_grad_()
    given = {name: part(value) for name, value in inputs.options.items()} | more
    out = rl.policy_loss(z, part(inputs.target), part(inputs.advantage), backend=backend, **given)
    return out, torch.autograd.grad(out.loss, z)[0]


def test_the_oracle_and_the_options_know_every_surrogate():
    assert set(SURROGATES) == set(oracle.SURROGATES) == set(OPTIONS)


def everything(name: str, dtype: torch.dtype) -> PolicyInputs:
    names = (*old_logp(name), "ref_logp", "importance_sampling_ratio", "mask")
    return policy_inputs(flat(32, 30, dtype), *names, masked=0.2, **options(name, **MORE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AT_TOKEN)
def test_a_tokens_loss_and_gradient_are_no_worse_than_eager(name, dtype, device, backend):
    check_policy_loss(rl.policy_loss, everything(name, dtype), device=device, backend=backend)


@pytest.mark.parametrize("name", AT_TOKEN)
def test_in_float64_they_agree_to_its_last_digits(name, device):
    # Triton's kernels take their scalars in float32, so this is the torch backend's alone
    inputs = everything(name, torch.float64)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend="torch")


@pytest.mark.parametrize("name", ["ppo_clip", "gmpo", "dppo_tv", "dppo_kl"])
def test_the_options_of_these_tests_clip_some_tokens_on_either_side(name):
    level = SURROGATES[name].levels[0]
    logits = flat(32, 30, torch.float32)
    inputs = policy_inputs(logits, "old_logp", **options(name, level))
    inputs.options |= {"cu_seqlens": CU_SEQLENS} if level == "sequence" else {}
    clipped = run(inputs)[0].clipped
    for side in (inputs.advantage > 0, inputs.advantage < 0):
        assert clipped[side].any() and not clipped[side].all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", AT_SEQUENCE)
def test_sequences_of_a_batch_share_a_ratio(name, mode, device, backend):
    logits = batch(4, 8, 30, torch.float32)
    names = ("old_logp", "ref_logp", "importance_sampling_ratio", "mask")
    inputs = policy_inputs(logits, *names, masked=0.3, loss_agg_mode=mode)
    inputs.options |= options(name, "sequence", **MORE)
    inputs.advantage = torch.tensor([1.3, -0.7, 0.4, -1.1])
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


@pytest.mark.parametrize("name", AT_SEQUENCE)
def test_packed_sequences_share_a_ratio(name, device, backend):
    inputs = policy_inputs(flat(32, 30, torch.float32), "old_logp", "mask", masked=0.3)
    inputs.options |= options(name, "sequence", cu_seqlens=CU_SEQLENS)
    check_policy_loss(rl.policy_loss, inputs, device=device, backend=backend)


def test_packed_sequences_give_what_padded_rows_give(device, backend):
    inputs = policy_inputs(batch(3, 5, 30, torch.float32), "old_logp", "mask")
    inputs.options["mask"] = torch.arange(5) < torch.tensor([[2], [5], [1]])
    mask, shared = inputs.options["mask"], options("ppo_clip", "sequence")
    rows, drows = run(inputs, device, backend, **shared)
    packed = PolicyInputs(inputs.logits[mask], inputs.target[mask], inputs.advantage[mask])
    packed.options["old_logp"] = inputs.options["old_logp"][mask]
    cu_seqlens = torch.tensor([0, 2, 7, 8], dtype=torch.int32, device=device)
    flat_out, dflat = run(packed, device, backend, cu_seqlens=cu_seqlens, **shared)
    torch.testing.assert_close(flat_out.loss, rows.loss)
    torch.testing.assert_close(dflat, drows[mask.to(device)])
    assert torch.equal(flat_out.clipped, rows.clipped[mask.to(device)])


def test_a_clipped_sequence_is_clipped_at_each_of_its_counted_tokens(device, backend):
    inputs = policy_inputs(batch(2, 4, 30, torch.float32), "old_logp", "mask", masked=0.3)
    inputs.advantage = torch.ones(2)
    logp = oracle.token_logprob(inputs.logits, inputs.target)[0]
    # one token's ratio of e^4 takes the mean of its sequence over the clip; the others are 1
    inputs.options["old_logp"] = logp - torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0]])
    inputs.options["mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    out, dz = run(inputs, device, backend, importance_sampling_level="sequence")
    assert out.clipped.tolist() == [[True, True, True, False], [False] * 4]
    assert not dz[0].any() and dz[1].any()


def test_gspo_on_policy_has_the_gradient_of_grpo(device, backend):
    inputs = policy_inputs(batch(3, 5, 30, torch.float32), "mask", masked=0.3)
    inputs.options["loss_agg_mode"] = "seq-mean-token-mean"
    inputs.advantage = torch.tensor([1.0, -0.5, 0.7])
    _, at_token = run(inputs, device, backend)
    _, at_sequence = run(inputs, device, backend, importance_sampling_level="sequence")
    torch.testing.assert_close(at_sequence, at_token)


def test_gmpo_that_clips_no_token_is_gspo_without_a_clip(device, backend):
    inputs = policy_inputs(batch(3, 5, 30, torch.float32), "old_logp", "mask", masked=0.3)
    inputs.options |= {"importance_sampling_level": "sequence", "epsilon": math.inf}
    gspo, dgspo = run(inputs, device, backend)
    gmpo, dgmpo = run(inputs, device, backend, surrogate="gmpo")
    torch.testing.assert_close(gmpo.loss, gspo.loss)
    torch.testing.assert_close(dgmpo, dgspo)


@pytest.mark.parametrize("name", AT_TOKEN)
def test_a_formulas_derivative_is_that_of_its_loss(name):
    logp = -torch.rand(400, dtype=torch.float64) * 4 - 0.01
    old = (logp - torch.randn(400).double()).clamp(max=-0.01)
    advantage = torch.randn(400).double()
    logp.requires_grad_()
    definition = oracle.SURROGATES[name]((logp - old).exp(), logp, advantage, **OPTIONS[name])[0]
    (want,) = torch.autograd.grad(definition.sum(), logp)
    loss, dlogp, clipped = SURROGATES[name].torch(logp, old, advantage, parameters_of(name))
    torch.testing.assert_close(dlogp.detach(), want, rtol=1e-12, atol=1e-12)
    assert not dlogp[clipped].any()
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logp)[0], dlogp.detach())


def parameters_of(name: str) -> tuple[float, ...]:
    values = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": 3.0, **SURROGATES[name].defaults}
    values |= {k: v for k, v in OPTIONS[name].items() if k != "surrogate_params"}
    values |= OPTIONS[name].get("surrogate_params", {})
    return tuple(values[p] for p in SURROGATES[name].parameters)


@pytest.mark.parametrize("name", FUSED)
def test_the_one_launch_path_equals_the_composed_path(name, device, backend, monkeypatch):
    inputs = everything(name, torch.float32)
    fused, dfused = run(inputs, device, backend)
    monkeypatch.setattr("rlcore.kernels.rows.policy_loss.knows_derivative", lambda *_: False)
    composed, dcomposed = run(inputs, device, backend)
    assert type(fused.loss.grad_fn) is not type(composed.loss.grad_fn)
    torch.testing.assert_close(fused.loss, composed.loss)
    torch.testing.assert_close(dfused, dcomposed, rtol=1e-4, atol=1e-6)
    assert torch.equal(fused.clipped, composed.clipped)


@pytest.mark.parametrize("name, level", AT)
def test_the_fused_head_gives_what_its_logits_give(name, level, backend, device):
    hidden, weight = torch.randn(4, 8, 16, device=device), torch.randn(30, 16, device=device)
    inputs = policy_inputs((hidden @ weight.T).cpu(), *old_logp(name), "mask", masked=0.3)
    inputs.options |= options(name, level)
    # a penalty has a gradient where the advantage is 0 too
    inputs.advantage[0, :3] = 0
    out, dz = run(inputs, device, backend)
    hidden.requires_grad_()
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.options.items()}
    target, advantage = inputs.target.to(device), inputs.advantage.to(device)
    fused = rl.linear_policy_loss(hidden, weight, target, advantage, backend=backend, **given)
    torch.testing.assert_close(fused.loss, out.loss, rtol=1e-4, atol=1e-5)
    (dhidden,) = torch.autograd.grad(fused.loss, hidden)
    torch.testing.assert_close(dhidden, dz @ weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(fused.clipped, out.clipped)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, level", AT)
def test_micro_batches_and_ranks_add_up_to_the_full_batch(name, level, mode):
    logits = batch(4, 6, 30, torch.float64)
    inputs = policy_inputs(logits, *old_logp(name), "ref_logp", "mask", masked=0.3, beta=0.1)
    inputs.options |= options(name, level, loss_agg_mode=mode)
    mask = inputs.options["mask"]
    items = int(mask.sum() if mode == "token-mean" else mask.any(1).sum())
    full, dfull = run(inputs)
    for cut in ([4], [1, 3], [1, 1, 2]):
        ends = list(itertools.accumulate(cut))
        parts = [slice(end - n, end) for n, end in zip(cut, ends, strict=True)]
        micro = [run(inputs, rows=rows, num_items=items) for rows in parts]
        close = {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close(sum(out.loss for out, _ in micro), full.loss, **close)
        torch.testing.assert_close(torch.cat([dz for _, dz in micro]), dfull, **close)
        # ranks average their losses, so each divides by its share of the count
        ranks = [run(inputs, rows=rows, num_items=items / len(cut))[0].loss for rows in parts]
        torch.testing.assert_close(torch.stack(ranks).mean(), full.loss, **close)


@pytest.mark.parametrize("name, level", AT)
def test_masked_tokens_may_hold_anything_at_either_level(name, level, device, backend):
    inputs = policy_inputs(batch(3, 4, 30, torch.float32), *old_logp(name), "mask")
    inputs.options |= options(name, level)
    mask = inputs.options["mask"] = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    clean, dclean = run(inputs, device, backend)
    for x in (inputs.logits, inputs.advantage, *(inputs.options[k] for k in old_logp(name))):
        x[~mask] = float("nan")
    dirty, ddirty = run(inputs, device, backend)
    assert torch.equal(clean.loss, dirty.loss) and torch.equal(dclean, ddirty)


@pytest.mark.parametrize("name", AT_TOKEN)
def test_a_target_out_of_range_makes_the_whole_row_nan(name, device):
    inputs = policy_inputs(flat(3, 30, torch.float32), *old_logp(name), **options(name))
    inputs.target[1] = 30
    out, dz = run(inputs, device, "triton")
    assert out.loss.isnan()
    assert dz[1].isnan().all() and dz[[0, 2]].isfinite().all()


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
def test_sapo_far_off_policy_has_a_shut_gate_and_no_nan(log_ratio, device, backend):
    inputs = policy_inputs(flat(4, 30, torch.float32), surrogate="sapo")
    logp = oracle.token_logprob(inputs.logits, inputs.target)[0]
    inputs.options["old_logp"] = logp - log_ratio
    out, dz = run(inputs, device, backend)
    assert out.loss.isfinite() and not dz.any()


def test_sapo_with_its_gate_shut_has_no_gradient_however_large_the_advantage(device, backend):
    inputs = policy_inputs(flat(4, 30, torch.float32), surrogate="sapo")
    logp = oracle.token_logprob(inputs.logits, inputs.target)[0]
    inputs.options["old_logp"] = logp - 10
    inputs.advantage = torch.tensor([3e38, -3e38, 1e38, -1e38])
    out, dz = run(inputs, device, backend)
    assert out.loss.isfinite() and not dz.any()


def test_a_derivative_beyond_the_dtype_is_held_before_it_is_weighted(device, backend):
    z = torch.zeros(2, 2, device=device, requires_grad=True)
    target, advantage = torch.zeros(2, dtype=torch.long, device=device), torch.tensor([-1.0, 1.0])
    out = rl.policy_loss(
        z, target, advantage.to(device), old_logp=torch.full((2,), -1e4, device=device),
        surrogate="kl_cov", num_items=1e6, backend=backend,
    )  # fmt: skip
    (dz,) = torch.autograd.grad(out.loss, z)
    largest = torch.finfo(torch.float32).max
    want = largest / 1e6 / 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(dz.cpu(), want)


@pytest.mark.parametrize("name", ["sapo", "cispo", "ppo_penalty", "dppo_tv", "dppo_kl"])
def test_on_policy_they_have_the_gradient_of_reinforce(name, device, backend):
    inputs = policy_inputs(flat(8, 30, torch.float32))
    _, want = run(inputs, device, backend, surrogate="reinforce")
    logp = oracle.token_logprob(inputs.logits, inputs.target)[0]
    _, dz = run(inputs, device, backend, surrogate=name)
    torch.testing.assert_close(dz, want)
    _, dz = run(inputs, device, backend, surrogate=name, old_logp=logp.to(device))
    torch.testing.assert_close(dz, want, rtol=1e-4, atol=1e-6)


def test_cispo_keeps_the_gradient_that_ppo_clips_away(device, backend):
    inputs = policy_inputs(flat(16, 30, torch.float32), "old_logp")
    ppo, dppo = run(inputs, device, backend)
    cispo, dcispo = run(inputs, device, backend, surrogate="cispo")
    assert ppo.clipped.any() and not cispo.clipped.any()
    assert not dppo[ppo.clipped].any() and dcispo.any(1).all()


def every_token(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row of logits (V,) as V rows, each with a target of its own, and its probability."""
    vocabulary = len(logits)
    p = torch.softmax(logits, 0)
    target = torch.arange(vocabulary, device=logits.device)
    return logits.expand(vocabulary, -1).clone(), target, p


def expected_gradient(logits: Tensor, advantage: Tensor, **options) -> Tensor:
    """The mean over the policy's own samples of dloss/dlogits, by enumeration."""
    rows, target, p = every_token(logits)
    rows.requires_grad_()
    loss = rl.policy_loss(rows, target, advantage, num_items=1, **options).loss
    return p @ torch.autograd.grad(loss, rows)[0]


REVERSE_KL = lambda logp, ref: (logp.exp() * (logp - ref)).sum()  # noqa: E731
KL_GRADIENTS = {
    "k1": lambda logp, ref: torch.zeros(()) * logp.sum(),
    "k2": REVERSE_KL,
    "k3_ratio": REVERSE_KL,
    "k3": lambda logp, ref: (ref.exp() * (ref - logp)).sum(),
}


@pytest.mark.parametrize("kl_estimator", KL_GRADIENTS)
def test_on_policy_a_kl_estimators_mean_gradient_is_that_of_its_kl(kl_estimator):
    logits, ref = torch.randn(2, 7, dtype=torch.float64)
    ref = torch.log_softmax(ref, 0)
    got = expected_gradient(
        logits, torch.zeros(7), surrogate="reinforce", ref_logp=ref, beta=1.0,
        kl_estimator=kl_estimator,
    )  # fmt: skip
    z = logits.clone().requires_grad_()
    kl = KL_GRADIENTS[kl_estimator](torch.log_softmax(z, 0), ref)
    torch.testing.assert_close(got, torch.autograd.grad(kl, z)[0], rtol=1e-10, atol=1e-12)


def test_off_policy_k3_times_ratio_is_unbiased_in_value_and_gradient(backend):
    """Over the old policy's samples, by enumeration; k3 alone is neither."""
    logits, old, ref = torch.randn(3, 7, dtype=torch.float64, device=DEVICE)
    old, ref = torch.log_softmax(old, 0), torch.log_softmax(ref, 0)
    z = logits.clone().requires_grad_()
    kl = REVERSE_KL(torch.log_softmax(z, 0), ref)
    (want,) = torch.autograd.grad(kl, z)
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    for kl_estimator, unbiased in {"k3_ratio": True, "k3": False}.items():
        rows, target, _ = every_token(logits)
        rows.requires_grad_()
        out = rl.policy_loss(
            rows, target, torch.zeros_like(old), old_logp=old, ref_logp=ref, beta=1.0,
            kl_estimator=kl_estimator, epsilon=1e9, num_items=1, backend=backend,
            loss_agg_mode="token-mean",
        )  # fmt: skip
        value = old.exp() @ out.kl
        gradient = old.exp() @ torch.autograd.grad(out.loss, rows)[0]
        assert torch.allclose(value, kl.detach(), **tolerance) == unbiased
        assert torch.allclose(gradient, want, **tolerance) == unbiased


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_k3_times_ratio_is_the_same_through_the_fused_head(level, backend):
    hidden, weight = (torch.randn(s, device=DEVICE).double() for s in ((2, 5, 4), (30, 4)))
    logits = (hidden @ weight.T).requires_grad_()
    inputs = policy_inputs(logits.detach().cpu(), "old_logp", "ref_logp", "mask", masked=0.3)
    options = inputs.options | {"beta": 0.4, "kl_estimator": "k3_ratio", "backend": backend}
    options["importance_sampling_level"] = level
    options = {name: on(DEVICE, value) for name, value in options.items()}
    given = (on(DEVICE, inputs.target), on(DEVICE, inputs.advantage.double()))
    want = rl.policy_loss(logits, *given, **options)
    leaf = hidden.clone().requires_grad_()
    got = rl.linear_policy_loss(leaf, weight, *given, chunk_bytes=800, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.kl, want.kl, rtol=1e-6, atol=1e-7)
    (dlogits,) = torch.autograd.grad(want.loss, logits)
    (dhidden,) = torch.autograd.grad(got.loss, leaf)
    torch.testing.assert_close(dhidden, dlogits @ weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", [rl.token_kl, rl.shaped_reward, rl.gae_from_scores])
def test_k3_times_ratio_is_refused_where_no_policy_that_sampled_is_known(function):
    row, x, flag = torch.ones(2), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    given = {
        rl.token_kl: ((x, x), {}),
        rl.shaped_reward: ((row, x, x, flag), {"beta": 0.1}),
        rl.gae_from_scores: ((row, x, x, x, flag), {"beta": 0.1}),
    }
    arguments, options = given[function]
    with pytest.raises(ValueError, match=r"kl_estimator.*k3_ratio"):
        function(*arguments, kl_estimator="k3_ratio", **options)


def test_k3_times_ratio_is_refused_where_tokens_ratios_are_clipped():
    inputs = policy_inputs(batch(2, 4, 30, torch.float32), "old_logp", "ref_logp")
    with pytest.raises(ValueError, match=r"k3_ratio.*gmpo"):
        rl.policy_loss(
            inputs.logits, inputs.target, inputs.advantage, **inputs.options, surrogate="gmpo",
            importance_sampling_level="sequence", beta=0.1, kl_estimator="k3_ratio",
        )  # fmt: skip


def test_reinforces_mean_gradient_is_that_of_the_expected_reward():
    logits, reward = torch.randn(2, 7, dtype=torch.float64)
    got = expected_gradient(logits, reward, surrogate="reinforce")
    z = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(-(torch.softmax(z, 0) @ reward), z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_penalty_of_old_samples_is_the_kl_of_old_to_new():
    logits, old = torch.randn(2, 7, dtype=torch.float64)
    old = torch.log_softmax(old, 0)
    rows, target, _ = every_token(logits)
    rows.requires_grad_()
    out = rl.policy_loss(
        rows, target, torch.zeros(7), old_logp=old, surrogate="ppo_penalty", num_items=1,
        importance_sampling_ratio=old.exp(), surrogate_params={"kl_coef": 0.7},
    )  # fmt: skip
    z = logits.clone().requires_grad_()
    kl = 0.7 * (old.exp() * (old - torch.log_softmax(z, 0))).sum()
    torch.testing.assert_close(out.loss, kl)
    (want,) = torch.autograd.grad(kl, z)
    torch.testing.assert_close(torch.autograd.grad(out.loss, rows)[0].sum(0), want)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_the_sequence_level_compiles_into_one_graph(packed):
    inputs = policy_inputs(batch(2, 4, 30, torch.float32), "old_logp")
    more = {"importance_sampling_level": "sequence"}
    if packed:
        inputs = policy_inputs(flat(8, 30, torch.float32), "old_logp")
        more["cu_seqlens"] = torch.tensor([0, 3, 8], dtype=torch.int32)
    eager, want = run(inputs, **more)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z):
        old = inputs.options["old_logp"]
        return rl.policy_loss(z, inputs.target, inputs.advantage, old_logp=old, **more).loss

    z = inputs.logits.clone().requires_grad_()
    compiled = loss(z)
    torch.testing.assert_close(compiled, eager.loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, z)[0], want)


N = 4
BAD = {
    "level unknown": ({"importance_sampling_level": "word"}, "'token', 'sequence'.*'word'"),
    "sequence of reinforce": (
        {"surrogate": "reinforce", "importance_sampling_level": "sequence"},
        "reinforce.*sequence level.*'token'",
    ),
    "gmpo of tokens": ({"surrogate": "gmpo"}, "gmpo.*token level.*'sequence'"),
    "sequence unmarked": ({"importance_sampling_level": "sequence"}, "packed.*cu_seqlens"),
    "cu_seqlens short": (
        {"importance_sampling_level": "sequence", "cu_seqlens": torch.tensor([0, 3])},
        r"cu_seqlens.*4.*\[0, 3\]",
    ),
    "cispo_abs unbounded": ({"surrogate": "cispo_abs"}, "cispo_abs.*epsilon_high"),
    "delta of cispo": ({"surrogate": "cispo", "delta": 2.0}, "cispo.*delta"),
    "tau zero": ({"surrogate": "sapo", "surrogate_params": {"tau_pos": 0}}, "tau_pos.*positive"),
    "kl_coef infinite": (
        {"surrogate": "ppo_penalty", "surrogate_params": {"kl_coef": math.inf}},
        "kl_coef.*finite",
    ),
    "parameter of another": (
        {"surrogate": "sapo", "surrogate_params": {"kl_coef": 1.0}},
        r"sapo.*\['tau_pos', 'tau_neg'\].*'kl_coef'",
    ),
    "epsilon by surrogate_params": (
        {"surrogate": "cispo", "surrogate_params": {"epsilon": 0.1}},
        r"cispo.*\[\].*'epsilon'",
    ),
}


@pytest.mark.parametrize("changed, message", BAD.values(), ids=BAD)
def test_what_a_surrogate_cannot_use_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.policy_loss(torch.zeros(N, 11), torch.zeros(N).long(), torch.ones(N), **changed)


@pytest.mark.parametrize("name", AT_TOKEN)
def test_the_table_knows_who_needs_an_advantage(name):
    logp, old = -torch.rand(2, 50, dtype=torch.float64)
    _, dlogp, _ = SURROGATES[name].torch(logp, old, torch.zeros(50), parameters_of(name))
    assert SURROGATES[name].needs_advantage == (not dlogp.any())


def test_every_surrogate_says_where_it_is_defined():
    assert all(entry.levels and set(entry.levels) <= set(LEVELS) for entry in SURROGATES.values())
    assert all(entry.torch.__doc__ for entry in SURROGATES.values())


def test_a_surrogate_and_a_kl_that_overflow_towards_either_side_are_no_nan(device, backend):
    z = torch.tensor([[0.0, 150.0]], device=device, requires_grad=True)
    one = torch.ones(1, device=device)
    out = rl.policy_loss(
        z, torch.zeros(1, dtype=torch.long, device=device), one, old_logp=-1e4 * one,
        ref_logp=-one, beta=1.0, surrogate="kl_cov", backend=backend,
    )  # fmt: skip
    (dz,) = torch.autograd.grad(out.loss, z)
    assert out.loss.isfinite() and dz.isfinite().all()
