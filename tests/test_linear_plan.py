"""What the fused head says it will do is what it does: operations, passes, chunks, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE
from helpers.heads import GEMMA
from torch.utils.flop_counter import FlopCounterMode

import rlcore as rl

N, H, V = 24, 10, 50
UNIT = N * H * V
ROW = V * 4  # bytes of one token's float32 logits
NOTHING = (False, False, False)


@pytest.fixture(autouse=True)
def seed(device):
    torch.manual_seed(0)


def leaves(needs=(True, True, True), dtype=torch.float32):
    shapes = ((N, H), (V, H), (V,))
    return [
        torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(need)
        for shape, need in zip(shapes, needs, strict=True)
    ]


TARGET = torch.arange(N) % V


def addmm_operations(_total, left, right, *_, **__) -> int:
    """torch's own count of addmm fails where an out_dtype is given, as on a GPU."""
    return 2 * left[0] * left[1] * right[1]


def counted(run) -> int:
    """Floating-point operations of the products of run() and of its scalar's backward."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm: addmm_operations}
    ) as counter:
        scalar = run()
        if scalar.requires_grad:
            scalar.backward()
    return counter.get_total_flops()


def policy(hidden, weight, bias, advantage=None, **options):
    advantage = torch.ones(N, device=DEVICE) if advantage is None else advantage
    target = TARGET.to(DEVICE)
    return rl.linear_policy_loss(hidden, weight, target, advantage, bias=bias, **options)


def logprob(hidden, weight, bias, **options):
    out = rl.linear_token_logprob(hidden, weight, TARGET.to(DEVICE), bias=bias, **options)
    return out.logp.sum() + (0.1 * out.entropy.sum() if out.entropy is not None else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 8, 100])
@pytest.mark.parametrize(
    "needs, products",
    [((True, True, True), 6), ((True, False, False), 4), ((False, True, False), 4),
     ((False, False, True), 2), (NOTHING, 2)],
)  # fmt: skip
def test_a_loss_takes_the_planned_operations_and_none_for_what_is_frozen(
    needs, products, tokens, dtype
):
    row = ROW * 3 if dtype == torch.bfloat16 else ROW
    inputs, budget = leaves(needs, dtype), {"chunk_bytes": tokens * row}
    plan = rl.plan_linear(*inputs[:2], bias=inputs[2], **budget)
    assert plan.operations == products * UNIT
    assert counted(lambda: policy(*inputs, **budget).loss) == plan.operations
    for tensor, need in zip(inputs, needs, strict=True):
        assert (tensor.grad is not None) == need


def test_logits_are_made_twice_for_those_tokens_alone_whose_gradient_fits_nowhere():
    tokens, budget = 64, 10 * ROW * 3 // 2
    hidden, weight = (
        torch.randn(n, H, device=DEVICE).bfloat16().requires_grad_() for n in (tokens, V)
    )
    plan = rl.plan_linear(hidden, weight, chunk_bytes=budget)
    assert (plan.chunk_tokens, plan.dz_tokens, plan.passes) == (5, 20, 2)
    assert plan.remade_tokens == tokens - H - plan.dz_tokens
    assert plan.operations == (6 * tokens + 2 * plan.remade_tokens) * H * V
    target, advantage = TARGET.to(DEVICE).repeat(3)[:tokens], torch.ones(tokens, device=DEVICE)

    def run():
        return rl.linear_policy_loss(hidden, weight, target, advantage, chunk_bytes=budget).loss

    assert counted(run) == plan.operations


# needs, entropy, tokens in the budget -> strategy, products, passes
STRATEGIES = [
    ((True, True, True), True, 2 * N, "kept-logits", 6, 1),
    ((True, True, True), True, 8, "recompute", 8, 2),
    ((True, False, False), True, 8, "recompute", 6, 2),
    ((True, False, False), False, 8, "unit-gradient", 4, 1),
    ((False, True, False), False, 8, "recompute", 6, 2),
    (NOTHING, True, 8, "forward", 2, 1),
]


@pytest.mark.parametrize("needs, entropy, tokens, strategy, products, passes", STRATEGIES)
def test_statistics_take_the_cheapest_strategy_that_fits(
    needs, entropy, tokens, strategy, products, passes
):
    inputs, options = leaves(needs), {"entropy": entropy, "chunk_bytes": tokens * ROW}
    plan = rl.plan_linear(*inputs[:2], bias=inputs[2], loss="logprob", **options)
    assert (plan.strategy, plan.passes) == (strategy, passes)
    assert plan.operations == products * UNIT
    assert counted(lambda: logprob(*inputs, **options)) == plan.operations


@pytest.mark.parametrize("head", [{}, GEMMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_strategy_gives_the_same_gradient(dtype, head, backend):
    mask = torch.rand(N, device=DEVICE) < 0.7
    hidden, weight, bias = leaves(dtype=dtype)
    results = {}
    for budget, trains, entropy in [
        (None, True, False), (2000, True, False), (2000, False, False), (2000, False, True)
    ]:  # fmt: skip
        weight.requires_grad_(trains), bias.requires_grad_(trains)
        options = {"chunk_bytes": budget, "entropy": entropy}
        plan = rl.plan_linear(
            hidden, weight, bias=bias, loss="logprob", softcap=head.get("softcap"), **options
        )
        out = rl.linear_token_logprob(
            hidden, weight, TARGET.to(DEVICE), bias=bias, mask=mask, temperature=1.4,
            backend=backend, **head, **options,
        )  # fmt: skip
        scalar = (out.logp * torch.linspace(0.5, 2, N, device=DEVICE) + 0.3 * out.lse).sum()
        name = f"{plan.strategy} entropy={entropy}"
        results[name] = torch.autograd.grad(scalar, hidden)[0].float()
    assert len(results) == 4, results.keys()
    first = next(iter(results.values()))
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for other in results.values():
        assert (other - first).norm() <= rounding * first.norm()


# needs, entropy_coef, tokens in the budget -> products
SEQUENCE_LEVEL = [
    ((True, True, True), 0.0, 2 * N, 6),
    ((True, True, True), 0.0, 8, 8),
    ((True, False, False), 0.0, 8, 4),
    ((True, False, False), 0.1, 8, 6),
]


@pytest.mark.parametrize("needs, entropy_coef, tokens, products", SEQUENCE_LEVEL)
def test_a_loss_at_sequence_level_takes_the_planned_operations(
    needs, entropy_coef, tokens, products
):
    inputs, budget = leaves(needs), {"chunk_bytes": tokens * ROW}
    entropy = entropy_coef != 0
    plan = rl.plan_linear(*inputs[:2], bias=inputs[2], loss="logprob", entropy=entropy, **budget)
    assert plan.operations == products * UNIT
    boundaries = torch.tensor([0, N // 2, N], dtype=torch.int32, device=DEVICE)
    results = []

    def run(**options):
        out = policy(
            *inputs, importance_sampling_level="sequence", cu_seqlens=boundaries,
            entropy_coef=entropy_coef, old_logp=torch.full((N,), -4.0, device=DEVICE), **options,
        )  # fmt: skip
        (dhidden,) = torch.autograd.grad(out.loss, inputs[0])
        results.append((out.loss.detach(), out.entropy, dhidden))
        return out.loss.detach()

    assert counted(lambda: run(**budget)) == plan.operations
    run()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_masked_tokens_cost_no_product():
    mask = torch.arange(N, device=DEVICE) % 4 != 0
    assert counted(lambda: policy(*leaves(), mask=mask).loss) == 6 * UNIT * 3 // 4
    assert counted(lambda: logprob(*leaves(), mask=mask)) == 6 * UNIT * 3 // 4
    budget = {"chunk_bytes": 6 * ROW}
    assert counted(lambda: logprob(*leaves(), mask=mask, **budget)) == 8 * UNIT * 3 // 4


@pytest.mark.parametrize("chunk_bytes", [None, 8 * ROW])
def test_tokens_without_a_gradient_cost_no_backward_product(chunk_bytes):
    advantage = torch.ones(N, device=DEVICE)
    advantage[::2] = 0
    run = {"advantage": advantage, "chunk_bytes": chunk_bytes}
    half = 2 * UNIT + 4 * UNIT // 2
    assert counted(lambda: policy(*leaves(), **run).loss) == half
    clipped = torch.full((N,), -100.0, device=DEVICE)
    clipped[::2] = 0
    run = {"old_logp": clipped, "chunk_bytes": chunk_bytes}
    # a GPU does not wait in every chunk for tokens that are clipped
    found = half if DEVICE == "cpu" else 6 * UNIT
    assert counted(lambda: policy(*leaves(), **run).loss) == found
    ratio = (torch.arange(N, device=DEVICE) % 2).float()
    run = {"importance_sampling_ratio": ratio, "chunk_bytes": chunk_bytes}
    assert counted(lambda: policy(*leaves(), **run).loss) == half
    assert counted(lambda: policy(*leaves(), entropy_coef=0.1, **run).loss) == 6 * UNIT


def test_chunks_cover_the_tokens_evenly_within_the_budget():
    hidden, weight = torch.empty(1000, 64, device="meta"), torch.empty(500, 64, device="meta")
    for budget in (1, 2000, 10_000, 600_000, 1 << 30):
        plan = rl.plan_linear(hidden, weight, chunk_bytes=budget)
        assert (
            (plan.num_chunks - 1) * plan.chunk_tokens < 1000 <= plan.num_chunks * plan.chunk_tokens
        )
        assert plan.chunk_tokens == 1 or plan.chunk_tokens * 2000 <= budget
        assert plan.peak_bytes <= max(budget, 2000)


def test_a_plan_prints_what_matters():
    hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(151936, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    text = str(rl.plan_linear(hidden, weight, chunk_bytes=1 << 30))
    assert "one-pass" in text and "6.39 NHV = 32.564 TFLOP" in text and "2 passes over" in text
    assert "16 chunks of 512 tokens" in text
    text = str(rl.plan_linear(hidden[:4096], weight))
    assert "one-pass" in text and "6 NHV = 15.294 TFLOP" in text and "1 pass over" in text
    text = str(rl.plan_linear(hidden, weight, loss="logprob"))
    assert "recompute" in text and "8 NHV" in text and "2 passes over" in text


def test_plans_refuse_an_unknown_loss():
    with pytest.raises(ValueError, match="loss must be one of 'policy', 'logprob'"):
        rl.plan_linear(torch.zeros(2, 3), torch.zeros(4, 3), loss="dpo")


def test_a_memory_tracker_sees_the_planned_peak_and_the_cache_blocks():
    """The tracker sees every allocation, and hence no (N, V) one."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tokens, hidden_size, vocabulary = 2048, 16, 4096
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    target, advantage = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
    budget = 1 << 22
    plan = rl.plan_linear(hidden, weight, chunk_bytes=budget)
    tracker = MemTracker()
    tracker.track_external(hidden, weight, target, advantage)
    with tracker:
        rl.linear_policy_loss(
            hidden, weight, target, advantage, chunk_bytes=budget, entropy_coef=0.1, backend="torch"
        ).loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    inputs = sum(t.nbytes for t in (hidden, weight, target, advantage))
    gradients = hidden.nbytes + weight.nbytes
    above = peak - inputs - gradients
    blocks = 2 * (3 << 20)  # the torch backend's cache blocks, and small per-token tensors
    assert plan.peak_bytes <= above <= plan.peak_bytes + blocks + (1 << 20), (above, plan)


def peak_above_inputs(tokens: int, hidden_size: int, vocabulary: int, budget: int) -> int:
    """Bytes that a bfloat16 loss and its gradients take above inputs and gradients."""
    from torch.distributed._tools.mem_tracker import MemTracker

    leaf = {"dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = (
        torch.randn(tokens, hidden_size, **leaf),
        torch.randn(vocabulary, hidden_size, **leaf),
    )
    target, advantage = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
    tracker = MemTracker()
    tracker.track_external(hidden, weight, target, advantage)
    with tracker:
        rl.linear_policy_loss(
            hidden, weight, target, advantage, chunk_bytes=budget, backend="torch"
        ).loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    inputs = sum(t.nbytes for t in (hidden, weight, target, advantage))
    return peak - inputs - hidden.nbytes - weight.nbytes


# tokens, hidden size, vocabulary, budget: 1/256 of 8192 x 4096 x 151936 in 1 GiB, then others
LOW_PRECISION = [(512, 256, 9496, 1 << 22), (256, 512, 8192, 1 << 22), (4096, 128, 8192, 1 << 23)]


@pytest.mark.parametrize("tokens, hidden_size, vocabulary, budget", LOW_PRECISION)
def test_bfloat16_gradients_of_the_logits_stay_within_the_budget_and_the_memory_of_dweight(
    tokens, hidden_size, vocabulary, budget
):
    hidden, weight = (
        torch.empty(n, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        for n in (tokens, vocabulary)
    )
    plan = rl.plan_linear(hidden, weight, chunk_bytes=budget)
    assert plan.num_chunks > 3 and (plan.remade_tokens > 0) == (tokens > hidden_size)
    # of a CPU: slices of the weight and of another operand, and hidden, in float32
    beside = 2 * min(8 << 20, weight.numel() * 4) + hidden.numel() * 4
    part = plan.slice_columns * hidden_size * 4
    assert plan.peak_bytes <= budget + part + hidden.nbytes + beside
    above = peak_above_inputs(tokens, hidden_size, vocabulary, budget)
    # the torch backend's cache blocks stand beside it
    assert above <= plan.peak_bytes + 4 * (3 << 20), (above, plan)


def test_a_large_bfloat16_head_trains_in_little_more_than_two_gibibytes_above_its_gradients():
    hidden, weight = (
        torch.empty(n, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (8192, 151936)
    )
    for loss in ("policy", "logprob"):
        plan = rl.plan_linear(hidden, weight, loss=loss)
        assert plan.peak_bytes <= 1.1 * 2**31 and plan.passes == 1 + (loss == "logprob"), plan


@pytest.mark.parametrize("tokens, remade", [(60, False), (90, True)])
def test_a_bfloat16_dweight_depends_on_the_chunks_by_rounding_once_alone(tokens, remade):
    """Nor on where the rows without a gradient stand, which are left out of it."""
    hidden_size, vocabulary = 64, 300
    hidden, weight = (
        torch.randn(n, hidden_size, device=DEVICE).bfloat16().requires_grad_()
        for n in (tokens, vocabulary)
    )
    target = torch.arange(tokens, device=DEVICE)
    advantage = torch.randn(tokens, device=DEVICE)
    advantage[::5] = 0
    mask = torch.arange(tokens, device=DEVICE) % 7 != 3

    def gradients(chunk_bytes: int | None):
        plan = rl.plan_linear(hidden, weight, chunk_bytes=chunk_bytes)
        assert (plan.num_chunks > 5) == (chunk_bytes is not None)
        assert (plan.remade_tokens > 0) == (remade and chunk_bytes is not None)
        out = rl.linear_policy_loss(
            hidden, weight, target, advantage, mask=mask, chunk_bytes=chunk_bytes, backend="torch"
        )
        statistics = rl.linear_token_logprob(
            hidden, weight, target, mask=mask, chunk_bytes=chunk_bytes, backend="torch"
        )
        scalar = (statistics.logp * advantage).sum() + statistics.entropy.sum()
        return [
            gradient
            for loss in (out.loss, scalar)
            for gradient in torch.autograd.grad(loss, (hidden, weight))
        ]

    for one_chunk, chunks in zip(gradients(None), gradients(vocabulary * 6 * 8), strict=True):
        # where float32's last bit decides, the neighbour: one unit in the last place of bfloat16
        if DEVICE == "cpu":
            torch.testing.assert_close(chunks, one_chunk, atol=1e-9, rtol=2**-7)
            assert (chunks != one_chunk).double().mean() < 0.02
        else:
            # a GPU's products of other shapes sum in other orders, before the logits' gradient
            # is rounded
            torch.testing.assert_close(chunks, one_chunk, atol=2e-2, rtol=2**-6)


SCRIPT = """
import json, re, sys, torch, rlcore as rl
from pathlib import Path
torch.set_num_threads(1)
tokens, budget, fused = map(int, sys.argv[1:])
H, V = 64, 16384
def step(n):
    hidden = torch.randn(n, H, requires_grad=True)
    weight = (torch.randn(V, H) * 0.1).requires_grad_()
    target, advantage = torch.randint(V, (n,)), torch.randn(n)
    weight.grad = torch.zeros_like(weight)
    hidden.grad = torch.zeros_like(hidden)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    if fused:
        out = rl.linear_policy_loss(hidden, weight, target, advantage, chunk_bytes=budget)
    else:
        out = rl.policy_loss(hidden @ weight.T, target, advantage)
    torch.autograd.grad(out.loss, (hidden, weight))
    return peak() - before
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024
step(8)
print(json.dumps(step(tokens)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_resident_peak_follows_the_budget_and_not_the_number_of_tokens():
    def peak(*arguments: int) -> int:
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    budget, gradients = 64 << 20, (2048 + 16384) * 64 * 4
    fused, logits = peak(2048, budget, 1), peak(2048, budget, 0)
    assert fused - gradients <= 1.1 * budget, (fused, gradients)
    assert logits >= 2 * 2048 * 16384 * 4
