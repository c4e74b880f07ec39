"""What bfloat16 and float16 must not lose in the head: sure tokens, derivatives of any size."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DEVICE, oracle
from helpers.distributions import categorical_kl
from helpers.heads import naive_logits

import rlcore as rl

LOW = [torch.bfloat16, torch.float16]
N, H, V = 24, 16, 300
SMALL = V * 6 * 5  # a budget of 5 tokens
# of a token's gradient: the dtype's rounding of each of its addends
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seed(device):
    torch.manual_seed(0)


def sure_tokens(dtype: torch.dtype, p: float, length: int = N):
    """hidden (N, H), weight and targets whose probability is about p, by bisection in float64."""
    weight = torch.randn(V, H, device=DEVICE).div(H**0.5).to(dtype)
    target = torch.randint(V, (length,), device=DEVICE)
    hidden, way = torch.randn(length, H, device=DEVICE).double(), weight[target].double()
    low, high = (torch.full((length, 1), x, device=DEVICE).double() for x in (0.0, 200.0))
    for _ in range(50):
        middle = (low + high) / 2
        logp = ((hidden + middle * way) @ weight.double().T).log_softmax(-1)
        below = logp.gather(-1, target[:, None]).exp() < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (hidden + high * way).to(dtype), weight, target


def assert_tokens_close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Each token's gradient by its own length, so that no large one hides a small one's loss."""
    got, want = got.double().flatten(0, -2), want.flatten(0, -2)
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= tolerance, error


def losses_of_sure_tokens(hidden, weight, target, backend):
    """{name: differentiable scalar}: every way by which a frozen head makes dhidden."""
    given = {"backend": backend, "chunk_bytes": SMALL}
    factor = torch.linspace(0.5, 2.0, N, device=DEVICE)
    out = rl.linear_token_logprob(hidden, weight, target, entropy=False, **given)
    yield "logp", (out.logp * factor).sum(), lambda logp, lse: (logp * factor).sum()
    both = (out.logp * factor + 0.01 * out.lse).sum()
    yield "both", both, lambda logp, lse: (logp * factor + 0.01 * lse).sum()
    old_logp = out.logp.detach() - 0.1
    loss = rl.linear_policy_loss(
        hidden, weight, target, factor, old_logp=old_logp, importance_sampling_level="sequence",
        cu_seqlens=torch.tensor([0, N // 2, N], dtype=torch.int32, device=DEVICE), epsilon=0.2,
        loss_agg_mode="seq-mean-token-mean", **given,
    ).loss  # fmt: skip

    def sequence_loss(logp, lse):
        ratio = (logp.view(2, -1) - old_logp.double().view(2, -1)).mean(1).exp()
        return -(ratio[:, None] * factor.double().view(2, -1)).mean(1).mean()

    yield "sequence", loss, sequence_loss
    loss = rl.linear_policy_loss(hidden, weight, target, factor, surrogate="reinforce", **given)
    yield "reinforce", loss.loss, lambda logp, lse: -(logp * factor).mean()
    pairs = (hidden.view(4, N // 4, H), weight, target.view(4, -1))
    mask = torch.ones(4, N // 4, dtype=torch.bool, device=DEVICE)
    loss = rl.linear_preference_loss(*pairs, mask, loss_type="simpo", beta=2.0, **given).loss

    def simpo(logp, lse):
        chosen, rejected = logp.view(4, -1).mean(1).chunk(2)
        return -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()

    yield "simpo", loss, simpo


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.997, 0.9999])
@pytest.mark.parametrize("dtype", LOW)
def test_a_sure_token_keeps_its_gradient(dtype, p, trained, backend):
    hidden, weight, target = sure_tokens(dtype, p)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    plan = rl.plan_linear(hidden, weight, loss="logprob", entropy=False, chunk_bytes=SMALL)
    assert plan.strategy == ("recompute" if trained else "unit-gradient")
    wide = hidden.detach().double().requires_grad_()
    logits = naive_logits(wide, weight.detach().double())
    logp, _, lse = oracle.token_logprob(logits, target)
    # what float16 scales its losses by, as its gradients come back in it
    scale = 4096.0 if dtype == torch.float16 else 1.0
    for _name, mine, truth in losses_of_sure_tokens(hidden, weight, target, backend):
        (want,) = torch.autograd.grad(truth(logp, lse) * scale, wide, retain_graph=True)
        (got,) = torch.autograd.grad(mine * scale, hidden, retain_graph=True)
        assert_tokens_close(got, want, 3 * TOLERANCE[dtype])


# Options of a policy loss whose derivatives by logits float16 would round to inf or to 0; a factor
# of the logits goes with a temperature or scale that undoes it.
SIZES = {
    "advantages": {"advantage": 7e4, "num_items": 1e6},
    "huge advantages": {"advantage": 1e20, "num_items": 1e20},
    "tiny advantages": {"advantage": 1e-12, "num_items": 1e-12},
    "unlike advantages": {"advantage": torch.logspace(-3, 5, N), "num_items": 1e5},
    "importance weights": {"importance_sampling_ratio": torch.full((N,), 3e5), "num_items": 1e6},
    "ratios": {"log_ratio": 12.0, "advantage": -torch.ones(N), "num_items": 1e6},
    "entropy": {"entropy_coef": 1e5, "num_items": 1e6},
    "beta": {"beta": 1e5, "num_items": 1e6},
    "temperature": {"temperature": 1e-5, "num_items": 1e6, "factor": 1e-5},
    "scale": {"logit_scale": 1e5, "num_items": 1e6, "factor": 1e-5},
    "capped scale": {"logit_scale": 1e5, "softcap": 3.0, "num_items": 1e6, "factor": 1e-5},
}


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)], ids=["trained", "frozen"])
@pytest.mark.parametrize("size", SIZES)
def test_float16_holds_derivatives_of_any_size(size, needs, backend):
    options = {k: v.to(DEVICE) if hasattr(v, "to") else v for k, v in SIZES[size].items()}
    shrink = options.pop("factor", 1.0) ** 0.5
    shapes = {(N, H): shrink, (V, H): shrink / H**0.5, (V,): shrink**2}
    tensors = [torch.randn(s, device=DEVICE).mul(f).half() for s, f in shapes.items()]
    target = torch.randint(V, (N,), device=DEVICE)
    sign = torch.where(torch.arange(N, device=DEVICE) % 3 == 0, -1.0, 1.0)
    advantage = options.pop("advantage", 1.0)
    advantage = advantage if size == "ratios" else sign * advantage
    head = {name: options.pop(name) for name in ("softcap", "logit_scale") if name in options}
    wide = [t.double().requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)]
    leaves = [t.requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)]
    logits = naive_logits(*wide, **head)
    temperature = options.get("temperature", 1.0)
    logp = oracle.token_logprob(logits, target, temperature=temperature)[0].detach()
    options["old_logp"] = (logp - options.pop("log_ratio", 0.1)).float()
    if "beta" in options:
        options["ref_logp"] = (logp - 0.3).float()
    loss = rl.linear_policy_loss(
        *leaves[:2], target, advantage, bias=leaves[2], chunk_bytes=SMALL, backend=backend,
        **head, **options,
    ).loss  # fmt: skip
    truth = oracle.policy_loss(logits, target, advantage.double(), **options)[0]
    true = torch.autograd.grad(truth, [t for t in wide if t.requires_grad])
    for i, leaf in enumerate(leaf for leaf in leaves if leaf.requires_grad):
        # a loss scaler brings each into range
        scale = 2.0 ** -torch.floor(torch.log2(true[i].abs().max())).item()
        (got,) = torch.autograd.grad(loss * scale, leaf, retain_graph=True)
        assert got.isfinite().all()
        want = true[i] * scale
        assert (got.double() - want).norm() <= 3e-3 * want.norm(), ("hidden", "weight", "bias")[i]


@pytest.mark.parametrize("num_items, beta", [(1e9, 0.1), (1e-6, 0.1), (1e-3, 300.0)])
def test_float16_holds_derivatives_of_a_preference_of_any_size(num_items, beta, backend):
    tensors = [torch.randn(s, device=DEVICE).div(4).half() for s in ((8, 5, H), (V, H))]
    target = torch.randint(V, (8, 5), device=DEVICE)
    mask = torch.ones(8, 5, dtype=torch.bool, device=DEVICE)
    wide = [t.double().requires_grad_() for t in tensors]
    leaves = [t.requires_grad_() for t in tensors]
    sums = oracle.token_logprob(naive_logits(*wide), target)[0].sum(1)
    ref_logp = (sums + torch.randn(8, device=DEVICE).div(beta * 10)).detach()
    loss = rl.linear_preference_loss(
        *leaves, target, mask, ref_logp, beta=beta, num_items=num_items, backend=backend,
        chunk_bytes=V * 6 * 12,
    ).loss  # fmt: skip
    chosen, rejected = (sums - ref_logp).chunk(2)
    truth = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).sum() / num_items
    for leaf, want in zip(leaves, torch.autograd.grad(truth, wide), strict=True):
        scale = 2.0 ** -torch.floor(torch.log2(want.abs().max())).item()
        (got,) = torch.autograd.grad(loss * scale, leaf, retain_graph=True)
        assert (got.double() - want * scale).norm() <= 3e-2 * (want * scale).norm()


@pytest.mark.parametrize("near", [0.0, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_float16_holds_the_gradients_of_two_heads_however_far_apart(near, frozen, backend):
    p_hidden, weight = (torch.randn(s, device=DEVICE).div(4).half() for s in ((N, H), (V, H)))
    q_hidden = p_hidden + near * torch.randn(N, H, device=DEVICE).half()
    tensors = [p_hidden, weight, q_hidden, weight.clone()]
    needs = (True, not frozen) * 2
    wide = [t.double().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    kl = rl.linear_categorical_kl(*leaves, chunk_bytes=V * 12 * 5, backend=backend)
    truth = categorical_kl(naive_logits(*wide[:2]), naive_logits(*wide[2:])).mean()
    wanted = torch.autograd.grad(truth, [t for t in wide if t.requires_grad])
    for leaf, want in zip([t for t in leaves if t.requires_grad], wanted, strict=True):
        largest = want.abs().max().item()
        scale = 2.0 ** -math.floor(math.log2(largest)) if largest > 1e-12 else 1.0
        (got,) = torch.autograd.grad(kl.mean() * scale, leaf, retain_graph=True)
        want = want * scale
        assert (got.double() - want).norm() <= 1e-2 * want.norm() + 1e-6


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_derivative_that_is_not_finite_spoils_its_own_token_alone(bad):
    hidden, weight = (torch.randn(n, 8, device=DEVICE).half().requires_grad_() for n in (3, 11))
    target = torch.tensor([1, 2, 3], device=DEVICE)
    given = torch.tensor([1.0, bad, 0.01], device=DEVICE)
    logp = rl.linear_token_logprob(hidden, weight, target, entropy=False).logp
    got, _ = torch.autograd.grad(logp, (hidden, weight), given)
    exact = hidden.detach().double().requires_grad_()
    all_logp = (exact @ weight.detach().double().T).log_softmax(1)
    (want,) = torch.autograd.grad(all_logp[[0, 2], target[[0, 2]]], exact, given[[0, 2]].double())
    torch.testing.assert_close(got[[0, 2]].double(), want[[0, 2]], rtol=5e-3, atol=1e-5)
    assert not got[1].isfinite().all()


@pytest.mark.parametrize("vocabulary", [517, 520])
def test_nothing_is_read_of_memory_that_nobody_has_written(monkeypatch, vocabulary):
    """A CPU's product with tile units reads what stands between two rows of its operand."""
    empty = torch.empty

    def spoiled(*size, **options):
        made = empty(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    torch.manual_seed(0)
    hidden = torch.randn(8, 4, 64, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, 64, device=DEVICE).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (8, 4), device=DEVICE)
    mask = (torch.arange(4, device=DEVICE) < 3).expand(8, 4)
    monkeypatch.setattr(torch, "empty", spoiled)
    out = rl.linear_policy_loss(
        hidden, weight, target, torch.ones(8, device=DEVICE), mask=mask, surrogate="reinforce",
        backend="triton",
    )  # fmt: skip
    out.loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
