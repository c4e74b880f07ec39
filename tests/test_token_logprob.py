"""token_logprob: values and gradients of both backends, held against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.cases import LAYOUTS, batch, flat, random_target
from helpers.checks import check_token_logprob, promised_bits
from torch import Tensor

import rlcore as rl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATISTICS = ("logp", "entropy", "lse")
BANNED = [slice(0, 3), slice(0, 8500), slice(100, 9001), slice(5, None, 2)]
INF = float("inf")
with_and_without_entropy = pytest.mark.parametrize("entropy", [True, False])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(logits: Tensor, device: str, backend: str, target: Tensor | None = None, **options):
    target = random_target(logits) if target is None else target
    check_token_logprob(rl.token_logprob, logits, target, device=device, backend=backend, **options)


@with_and_without_entropy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, v", [(5, 1), (5, 2), (5, 127), (5, 1000), (3, 50257)])
def test_values_and_gradients_are_no_worse_than_eager(n, v, dtype, entropy, device, backend):
    check(flat(n, v, dtype), device, backend, temperature=0.7, entropy=entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_is_served(layout, dtype, device, backend):
    check(LAYOUTS[layout](dtype), device, backend)


@pytest.mark.parametrize("column", [0, 4095, 4096, 8191, 8192, 9000])
def test_targets_at_the_edges_of_tiles_are_found(column, device, backend):
    check(flat(3, 9001, torch.float32), device, backend, target=torch.full((3,), column))


@with_and_without_entropy
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 10.0])
def test_temperature_scales_logits_before_everything(temperature, entropy, device, backend):
    logits = flat(4, 200, torch.bfloat16)
    check(logits, device, backend, temperature=temperature, entropy=entropy)


@with_and_without_entropy
@pytest.mark.parametrize("banned", BANNED, ids=str)
def test_banned_tokens_have_no_probability_and_no_gradient(banned, entropy, device, backend):
    logits = flat(3, 9001, torch.float32)
    logits[:, banned] = -INF
    target = logits.argmax(-1)
    check(logits, device, backend, target=target, entropy=entropy)
    z = logits.to(device).requires_grad_()
    out = rl.token_logprob(z, target.to(device), entropy=entropy, backend=backend)
    sum(x for x in out if x is not None).sum().backward()
    assert not z.grad[:, banned].any()


@with_and_without_entropy
def test_a_banned_target_has_log_probability_minus_infinity(entropy, device, backend):
    logits, target = flat(2, 50, torch.float32), torch.tensor([3, 4])
    logits[0, 3] = -INF
    check(logits, device, backend, target=target, entropy=entropy)


@with_and_without_entropy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_extreme_logits_lose_no_accuracy(offset, dtype, entropy, device, backend):
    check(flat(3, 300, torch.float32).add(offset).to(dtype), device, backend, entropy=entropy)


@with_and_without_entropy
def test_logits_of_both_extremes_stay_finite(entropy, device, backend):
    logits = torch.randn(3, 300).sign() * 1e4
    check(logits, device, backend, entropy=entropy)
    check(logits, device, backend, target=logits.argmin(-1), entropy=entropy)


@with_and_without_entropy
@pytest.mark.parametrize("rubbish", [float("nan"), INF, -INF])
def test_masked_rows_may_hold_anything(rubbish, entropy, device, backend):
    logits, mask = flat(6, 130, torch.bfloat16), torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    logits[~mask] = rubbish
    target = torch.where(mask, random_target(logits), torch.tensor([0, -100, 0, 10**6, 0, 0]))
    check(logits, device, backend, target=target, mask=mask, entropy=entropy)


def test_a_batch_with_every_token_masked_gives_zero_and_a_zero_gradient(device, backend):
    logits = torch.full((2, 3, 50), float("nan"))
    check(logits, device, backend, mask=torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_targets_and_masks_of_any_stride_and_integer_type_are_taken(dtype, device, backend):
    logits = flat(6, 40, torch.float32).view(2, 3, 40).to(device)
    target = random_target(logits).to(device)
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]], device=device).bool().t()
    want = rl.token_logprob(logits, target, mask=mask.contiguous(), backend=backend)
    strided = target.to(dtype).t().contiguous().t()
    got = rl.token_logprob(logits, strided, mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_stride_zero_are_taken(device, backend):
    logits = flat(6, 127, torch.float32).view(2, 3, 127)
    upstream = tuple(torch.tensor(g).expand(2, 3) for g in (1.0, -0.5, 2.0))
    check(logits, device, backend, upstream=upstream)


@pytest.mark.parametrize("used", STATISTICS)
def test_each_statistic_alone_has_its_gradient(used, device, backend):
    upstream = [torch.randn(4) if name == used else torch.zeros(4) for name in STATISTICS]
    logits, target = flat(4, 127, torch.float32), torch.arange(4)
    check(logits, device, backend, target=target, upstream=tuple(upstream))
    z, target = logits.to(device).requires_grad_(), target.to(device)
    upstream = [g.to(device) for g in upstream]
    alone = getattr(rl.token_logprob(z, target, backend=backend), used)
    (dz,) = torch.autograd.grad(alone, z, upstream[STATISTICS.index(used)])
    every = rl.token_logprob(z, target, backend=backend)
    (want,) = torch.autograd.grad(every, z, upstream)
    torch.testing.assert_close(dz, want)


def test_entropy_false_leaves_it_out_and_changes_nothing_else(device, backend):
    z = flat(4, 127, torch.float32).to(device).requires_grad_()
    target = torch.arange(4, device=device)
    full = rl.token_logprob(z, target, backend=backend)
    short = rl.token_logprob(z, target, entropy=False, backend=backend)
    assert short.entropy is None
    torch.testing.assert_close((short.logp, short.lse), (full.logp, full.lse))
    (dz,) = torch.autograd.grad(short.logp.sum() + short.lse.sum(), z)
    (want,) = torch.autograd.grad(full.logp.sum() + full.lse.sum(), z)
    torch.testing.assert_close(dz, want)


def test_a_second_backward_over_a_retained_graph_gives_the_same(device, backend):
    z = flat(4, 127, torch.float32).to(device).requires_grad_()
    loss = sum(rl.token_logprob(z, torch.arange(4, device=device), backend=backend)).sum()
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inplace_backward_writes_the_gradient_into_the_logits(device, backend):
    source = flat(4, 127, torch.float32).to(device).requires_grad_()
    target = torch.arange(4, device=device)
    logp = rl.token_logprob(source, target, backend=backend).logp
    (want,) = torch.autograd.grad(logp.sum(), source)
    z = source * 1
    out = rl.token_logprob(z, target, inplace_backward=True, backend=backend)
    (dz,) = torch.autograd.grad(out.logp.sum(), z, retain_graph=True)
    assert torch.equal(dz, want) and dz.data_ptr() == z.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.logp.sum(), z)


def test_inplace_backward_through_a_slice_of_the_models_logits(device, backend):
    source = batch(2, 4, 50, torch.float32).to(device).requires_grad_()
    target = random_target(source[:, :-1]).to(device)

    def gradient(inplace: bool) -> Tensor:
        logits = (source * 2)[:, :-1]
        out = rl.token_logprob(logits, target, inplace_backward=inplace, backend=backend)
        return torch.autograd.grad(out.logp.sum(), source)[0]

    assert torch.equal(gradient(inplace=True), gradient(inplace=False))


def test_inputs_are_left_as_they_were(device, backend):
    z = flat(4, 127, torch.bfloat16).to(device)
    before = z.clone()
    z.requires_grad_()
    target = torch.arange(4, device=device)
    rl.token_logprob(z, target, backend=backend).logp.sum().backward()
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_other_rows(dtype, device, backend):
    promised_bits(backend)
    # The torch backend goes through 50257 columns in blocks of a few rows.
    n, v = (12, 1003) if backend == "triton" else (40, 50257)
    logits, target = flat(n, v, dtype).to(device), torch.arange(n, device=device)

    def run(rows: slice) -> tuple[Tensor, ...]:
        z = logits[rows].requires_grad_()
        out = rl.token_logprob(z, target[rows], backend=backend)
        return *out, torch.autograd.grad(sum(out).sum(), z)[0]

    whole = run(slice(0, n))
    for rows in (slice(0, n), slice(0, 1), slice(7, 8), slice(3, n)):
        for a, b in zip(run(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_a_probability_is_one_where_there_is_one_token(device, backend):
    z = flat(5, 1, torch.float32).to(device).requires_grad_()
    out = rl.token_logprob(z, torch.zeros(5, dtype=torch.long, device=device), backend=backend)
    assert not out.logp.any() and not out.entropy.any()
    assert torch.equal(out.lse, z.squeeze(-1))
    assert not torch.autograd.grad(out.logp.sum() + out.entropy.sum(), z)[0].any()


@pytest.mark.parametrize("bad", [-1, 127, 2**40])
def test_a_target_out_of_range_is_an_error(bad, device, backend, monkeypatch):
    z, target = flat(3, 127, torch.float32).to(device), torch.arange(3, device=device)
    target[1] = bad
    if not (backend == "torch" and device == "cpu"):
        z.requires_grad_()
        out = rl.token_logprob(z, target, backend=backend)
        assert out.logp.isnan().tolist() == [False, True, False]
        (dz,) = torch.autograd.grad(out.logp.sum(), z)
        assert dz[1].isnan().all() and dz[[0, 2]].isfinite().all()
        monkeypatch.setenv("RLCORE_CHECK", "1")
    with pytest.raises(ValueError, match=rf"target.*\[0, 127\).*{bad}"):
        rl.token_logprob(z, target, backend=backend)


def test_a_nan_logit_makes_its_row_nan_and_no_other(device, backend):
    logits = flat(3, 9001, torch.float32).to(device)
    logits[1, 5000] = float("nan")
    for x in rl.token_logprob(logits, torch.arange(3, device=device), backend=backend):
        assert x.isnan().tolist() == [False, True, False]


PRECISION = """
import torch, rlcore as rl
logits, target = 4 * torch.randn(4, 151936), torch.randint(151936, (4,))
every = torch.log_softmax(logits.double(), -1)
logp, entropy = every.gather(1, target[:, None])[:, 0], -(every.exp() * every).sum(-1)
for with_entropy in (True, False):
    out = rl.token_logprob(logits, target, entropy=with_entropy, backend="torch")
    assert (out.logp - logp).abs().max() < 4e-6, (out.logp - logp)
    assert out.entropy is None or (out.entropy - entropy).abs().max() < 1e-5, out.entropy - entropy
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_long_row_is_as_exact_on_a_cpu_without_avx_512(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", PRECISION], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
