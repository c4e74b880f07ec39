"""The fused head against the naive logits in float64: values, gradients, masks, chunks, mutants."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, oracle
from helpers.distributions import categorical_kl
from helpers.heads import (
    ALL,
    GEMMA,
    HEAD_BATTERIES,
    check_linear_policy_loss,
    check_linear_token_logprob,
    head_inputs,
    naive_logits,
    row_bytes,
)
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload

import rlcore as rl

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MUTANTS = [
    pytest.param(path.stem, mutant, id=f"{path.stem}-{mutant.name}")
    for path in sorted((TESTS / "mutants" / "heads").glob("*.txt"))
    if path.stem in HEAD_BATTERIES
    for mutant in read_mutants(path)
]


@pytest.fixture(autouse=True)
def clean(device):
    torch.manual_seed(0)
    yield
    unload()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("operation", HEAD_BATTERIES)
def test_every_check_of_the_battery_passes(operation, backend):
    for check in HEAD_BATTERIES[operation](getattr(rl, operation), backend):
        check()


@pytest.mark.parametrize("operation", HEAD_BATTERIES)
@pytest.mark.parametrize("has_units", [False, True])
def test_products_of_a_cpu_with_bfloat16_units_and_without_are_right(
    operation, has_units, monkeypatch
):
    from rlcore.kernels.head import products as linear_products

    monkeypatch.setattr(linear_products, "has_bf16_units", lambda: has_units)
    for check in HEAD_BATTERIES[operation](getattr(rl, operation), "torch"):
        check()


@pytest.mark.parametrize("operation", HEAD_BATTERIES)
def test_the_way_of_a_gpu_is_right_where_its_products_are_emulated(operation, monkeypatch):
    """Products with an out_dtype are a GPU's alone: here float32 ones stand in for them."""
    from rlcore.kernels.head import products as linear_products

    calls = []

    def emulated(product):
        def wrapped(*tensors, out_dtype=None, out=None):
            if out_dtype is None:
                return product(*tensors, out=out)
            calls.append(out_dtype)
            return product(*(t.to(out_dtype) for t in tensors), out=out)

        return wrapped

    def init(self, weight, bias, _init=linear_products.Products.__init__):
        _init(self, weight, bias)
        self.on_cpu, self.as_float32, self.rounds_well = False, False, True

    monkeypatch.setattr(linear_products.Products, "__init__", init)
    monkeypatch.setattr(torch, "mm", emulated(torch.mm))
    monkeypatch.setattr(torch, "addmm", emulated(torch.addmm))
    for check in HEAD_BATTERIES[operation](getattr(rl, operation), "triton"):
        check()
    assert DEVICE == "cuda" or calls


@pytest.mark.skipif(torch.__version__ < "2.13", reason="its meta addmm has no out_dtype")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_takes_the_products_that_a_gpu_is_asked_for(dtype):
    """On the "meta" device, which checks shapes and dtypes: float32 sums of bfloat16 operands."""
    from rlcore.kernels.head.products import Products

    tokens, hidden_size, vocabulary, part = 6, 4, 32, slice(16, 32)
    weight = torch.empty(vocabulary, hidden_size, dtype=dtype, device="meta")
    products = Products(weight, weight[:, 0])
    hidden, ds = weight[:tokens], weight.new_empty(tokens, 16)
    wide = {"dtype": products.accumulator, "device": "meta"}
    z = torch.empty(tokens, 24, **wide)[:, :16]
    assert products.logits(hidden, z, part) is z
    assert products.logits(hidden[:1], z[:1], part).shape == (1, 16)
    waiting = torch.float32 if dtype == torch.float16 else dtype
    assert products.dhidden(weight.new_empty(tokens, vocabulary)).dtype == waiting
    total = torch.empty(tokens, hidden_size, **wide)
    assert products.add_dhidden(ds, total, part) is total
    whole = torch.empty(vocabulary, hidden_size, **wide)
    assert products.add_dweight(ds, hidden, whole[part]).dtype == products.accumulator
    for unit in (None, torch.ones((), **wide)):
        products.dweight(ds, hidden, weight[part], unit)


@pytest.mark.parametrize("operation, mutant", MUTANTS)
def test_a_wrong_head_is_refused(operation, mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), operation)
    for check in HEAD_BATTERIES[operation](op, "torch"):
        try:
            check()
        except AssertionError:
            return
    pytest.fail(f"every check of {operation} accepted the mutant {mutant.name!r}")


@pytest.mark.parametrize("vocabulary, hidden_size", [(1, 1), (2, 3), (127, 31), (1000, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_are_exact_at_every_dtype_and_width(
    dtype, vocabulary, hidden_size, backend
):
    inputs = head_inputs(
        (5,), "old_logp", "mask", hidden_size=hidden_size, vocabulary=vocabulary, dtype=dtype,
        bias=True, entropy_coef=0.01,
    )  # fmt: skip
    check_linear_policy_loss(rl.linear_policy_loss, inputs, backend=backend)
    check_linear_token_logprob(rl.linear_token_logprob, inputs, backend=backend)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (1, 1), (7,), (2, 5)])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 3, 100])
def test_any_number_of_tokens_in_any_number_of_chunks(shape, chunk_tokens, backend):
    inputs = head_inputs(shape, "old_logp", bias=True, head=GEMMA)
    budget = {"chunk_bytes": chunk_tokens * row_bytes(inputs)}
    check_linear_policy_loss(rl.linear_policy_loss, inputs, backend=backend, **budget)
    check_linear_token_logprob(rl.linear_token_logprob, inputs, backend=backend, **budget)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_everything_at_once(mode, backend):
    inputs = head_inputs(
        (4, 5), *ALL, bias=True, head=GEMMA, beta=0.1, entropy_coef=0.02, temperature=1.3,
        delta=1.5, epsilon=0.1, epsilon_high=0.3, loss_agg_mode=mode, num_items=7,
    )  # fmt: skip
    check_linear_policy_loss(rl.linear_policy_loss, inputs, backend=backend, chunk_bytes=999)


def test_nan_behind_the_mask_reaches_no_gradient(backend):
    inputs = head_inputs((12,), "mask", bias=True).to(DEVICE)
    inputs.target[~inputs.options["mask"]] = -7
    hidden, weight, bias = inputs.leaves()
    shared = {"bias": bias, "mask": inputs.options["mask"], "backend": backend}
    loss = rl.linear_policy_loss(hidden, weight, inputs.target, inputs.advantage, **shared).loss
    logp = rl.linear_token_logprob(hidden, weight, inputs.target, **shared).logp
    for scalar in (loss, logp.sum()):
        dhidden, dweight, dbias = torch.autograd.grad(scalar, (hidden, weight, bias))
        assert not dhidden[~inputs.options["mask"]].any()
        assert dhidden.isfinite().all() and dweight.isfinite().all() and dbias.isfinite().all()
        assert dhidden[inputs.options["mask"]].any() and dweight.any() and dbias.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_and_hidden_of_any_strides_give_the_same(dtype, backend):
    inputs = head_inputs((2, 9), "mask", hidden_size=6, dtype=dtype, masked=0.2).to(DEVICE)
    results = []
    for strided in (False, True):
        hidden, weight = inputs.leaves()
        if strided:
            hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
            weight = weight.detach().T.contiguous().T.requires_grad_()
            assert not hidden.is_contiguous() and not weight.is_contiguous()
        given = {"mask": inputs.options["mask"], "backend": backend, "chunk_bytes": 900}
        out = rl.linear_token_logprob(hidden, weight, inputs.target, **given)
        loss = rl.linear_policy_loss(hidden, weight, inputs.target, inputs.advantage, **given).loss
        for scalar in (loss, out.logp.sum() + out.entropy.sum()):
            results.append([scalar.detach(), *torch.autograd.grad(scalar, (hidden, weight))])
    for got, want in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [None, 900])
def test_words_that_the_bias_bans_get_no_gradient_and_spoil_none(chunk_bytes, dtype, backend):
    inputs = head_inputs((12,), bias=True, hidden_size=6, dtype=dtype).to(DEVICE)
    inputs.bias[::5] = float("-inf")
    target = torch.where(inputs.target % 5 == 0, inputs.target + 1, inputs.target)
    leaves, wide = inputs.leaves(), inputs.leaves(torch.float64)
    given = {"bias": leaves[2], "backend": backend, "chunk_bytes": chunk_bytes}
    loss = rl.linear_policy_loss(
        *leaves[:2], target, inputs.advantage, entropy_coef=0.3, loss_agg_mode="token-mean", **given
    ).loss
    out = rl.linear_token_logprob(*leaves[:2], target, **given)
    every_logp = naive_logits(*wide).log_softmax(-1)
    p = every_logp.exp()
    entropy = -(p * every_logp.clamp(min=-1e30)).sum(-1)
    logp = every_logp.gather(-1, target[:, None]).squeeze(-1)
    # on-policy, the clipped surrogate's gradient is that of A logp
    want = -(logp * inputs.advantage + 0.3 * entropy).mean()
    for mine, truth in ((loss, want), (out.logp.sum() + out.entropy.sum(), (logp + entropy).sum())):
        got = torch.autograd.grad(mine, leaves, retain_graph=True)
        expected = torch.autograd.grad(truth, wide, retain_graph=True)
        assert not got[1][::5].any() and not got[2][::5].any()
        for gradient, wanted in zip(got, expected, strict=True):
            error = (gradient.double() - wanted).norm() / wanted.norm()
            assert error <= {torch.bfloat16: 1e-2, torch.float32: 1e-5}.get(dtype, 1e-6), error


def test_a_batch_of_masked_tokens_gives_a_differentiable_zero(backend):
    inputs = head_inputs((6,), bias=True).to(DEVICE)
    hidden, weight, bias = inputs.leaves()
    mask = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    out = rl.linear_policy_loss(
        hidden, weight, inputs.target, inputs.advantage, bias=bias, mask=mask, backend=backend
    )
    out.loss.backward()
    assert out.loss == 0 and not any(t.grad.any() for t in (hidden, weight, bias))


@pytest.mark.parametrize("chunk_bytes", [1, None])
@pytest.mark.parametrize("head", [{}, GEMMA])
def test_gradcheck_of_the_loss_in_float64(head, chunk_bytes, backend):
    inputs = head_inputs((3,), "old_logp", "mask", dtype=torch.float64, hidden_size=2, bias=True,
                         vocabulary=5, head=head).to(DEVICE)  # fmt: skip
    inputs.hidden.nan_to_num_()

    def loss(hidden, weight, bias):
        return rl.linear_policy_loss(
            hidden, weight, inputs.target, inputs.advantage, bias=bias, backend=backend,
            chunk_bytes=chunk_bytes, entropy_coef=0.1, temperature=1.2, **head, **inputs.options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, inputs.leaves(), fast_mode=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_bytes", [5 * 8 * 2, None])
def test_gradcheck_of_the_statistics_in_float64(chunk_bytes, frozen, backend):
    inputs = head_inputs((3,), "mask", dtype=torch.float64, hidden_size=2, vocabulary=5,
                         bias=True, head=GEMMA).to(DEVICE)  # fmt: skip
    inputs.hidden.nan_to_num_()

    def statistics(hidden, weight, bias):
        out = rl.linear_token_logprob(
            hidden, weight, inputs.target, bias=bias, backend=backend, entropy=not frozen,
            chunk_bytes=chunk_bytes, temperature=0.8, **inputs.head, **inputs.options,
        )  # fmt: skip
        return tuple(t for t in out if t is not None)

    leaves = inputs.leaves()
    leaves = [leaves[0], *(t.requires_grad_(not frozen) for t in leaves[1:])]
    assert torch.autograd.gradcheck(statistics, leaves, fast_mode=False)


def gradients(inputs, op, **more):
    leaves = inputs.leaves()
    bias = {"bias": leaves[2]} if inputs.bias is not None else {}
    out = op(*leaves[:2], inputs.target, inputs.advantage, **bias, **inputs.head,
             **inputs.options, **more)  # fmt: skip
    return [out.loss.detach(), out.logp, *torch.autograd.grad(out.loss, leaves)]


def test_the_same_input_gives_the_same_bits_twice(backend):
    inputs = head_inputs((40,), *ALL, bias=True, beta=0.1, vocabulary=333, hidden_size=33)
    inputs = inputs.to(DEVICE)
    first, second = (
        gradients(inputs, rl.linear_policy_loss, backend=backend, chunk_bytes=40_000)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tokens_logp_has_the_same_bits_alone_and_in_any_batch(dtype, one_thread):
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        pytest.skip("a CPU's AMX tiles sum a product's rows as their number wants")
    """On a CPU with one thread: there a row of the product does not depend on the number of rows.

    float64 products and several threads do depend on it, in the last bits.
    """
    inputs = head_inputs((37,), dtype=dtype, hidden_size=65, vocabulary=501, bias=True)
    hidden, weight, target, bias = (
        t.cpu() for t in (inputs.hidden, inputs.weight, inputs.target, inputs.bias)
    )

    def statistics(rows, **more):
        out = rl.linear_token_logprob(hidden[rows], weight, target[rows], bias=bias, **more)
        return torch.stack(tuple(out))

    whole = statistics(slice(None))
    for rows in (slice(0, 1), slice(5, 7), slice(11, 14), slice(30, 37), slice(3, 33)):
        assert torch.equal(statistics(rows), whole[:, rows])
    assert torch.equal(statistics(slice(None), chunk_bytes=1), whole)
    assert torch.equal(statistics(slice(None), chunk_bytes=501 * 6 * 9), whole)


def test_the_chunk_size_changes_nothing_beyond_rounding(backend):
    inputs = head_inputs((23,), *ALL, bias=True, head=GEMMA, beta=0.1, entropy_coef=0.01)
    inputs = inputs.to(DEVICE)
    inputs.hidden.nan_to_num_()
    whole = gradients(inputs, rl.linear_policy_loss, backend=backend)
    for tokens in (1, 2, 5, 22):
        chunk_bytes = tokens * row_bytes(inputs)
        parts = gradients(inputs, rl.linear_policy_loss, backend=backend, chunk_bytes=chunk_bytes)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_a_retained_backward_gives_the_same_gradient_again(backend):
    inputs = head_inputs((9,), "mask", bias=True, head=GEMMA).to(DEVICE)
    leaves = inputs.leaves()
    shared = {"bias": leaves[2], "mask": inputs.options["mask"], "backend": backend}
    loss = rl.linear_policy_loss(
        *leaves[:2], inputs.target, inputs.advantage, **shared, **inputs.head
    ).loss
    statistics = [
        rl.linear_token_logprob(
            *leaves[:2], inputs.target, chunk_bytes=budget, **shared, **inputs.head
        )
        for budget in (None, 500)
    ]
    scalars = [2 * loss, *(s.logp.sum() + 0.3 * s.entropy.sum() for s in statistics)]
    for scalar in scalars:
        first = torch.autograd.grad(scalar, leaves, retain_graph=True)
        assert any(g.any() for g in first)
        second = torch.autograd.grad(scalar, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused(backend):
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(5, 4, device=DEVICE)
    target = torch.tensor([0, 1, 2], device=DEVICE)
    for scalar in (
        rl.linear_policy_loss(hidden, weight, target, torch.ones(3, device=DEVICE),
                              backend=backend).loss,
        rl.linear_token_logprob(hidden, weight, target, backend=backend).logp.sum(),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(scalar, hidden, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.sum().backward()


def test_a_weight_tied_to_the_embedding_gets_both_gradients(backend):
    table = torch.randn(29, 8, dtype=torch.float64, device=DEVICE)
    tokens, target = torch.randint(29, (2, 6), device=DEVICE)
    advantage = torch.randn(6, dtype=torch.float64, device=DEVICE)
    grads = []
    for fused in (True, False):
        tied = table.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(tokens, tied))
        if fused:
            out = rl.linear_policy_loss(hidden, tied, target, advantage, backend=backend)
        else:
            out = rl.policy_loss(hidden @ tied.T, target, advantage, backend=backend)
        grads.append(torch.autograd.grad(out.loss, tied)[0])
    torch.testing.assert_close(*grads)


def test_packed_and_padded_tokens_give_the_same_loss_and_gradient(backend):
    lengths, (batch, time) = torch.tensor([5, 1, 3], device=DEVICE), (3, 5)
    mask = torch.arange(time, device=DEVICE) < lengths[:, None]
    hidden = torch.randn(batch, time, 7, device=DEVICE)
    weight = torch.randn(31, 7, device=DEVICE, requires_grad=True)
    target = torch.randint(31, (batch, time), device=DEVICE)
    advantage = torch.randn(batch, device=DEVICE)
    shared = {"loss_agg_mode": "seq-mean-token-mean", "entropy_coef": 0.1, "backend": backend}
    padded = rl.linear_policy_loss(hidden, weight, target, advantage, mask=mask, **shared).loss
    spread = advantage[:, None].expand(batch, time)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed = rl.linear_policy_loss(
        hidden[mask], weight, target[mask], spread[mask], cu_seqlens=cu_seqlens, **shared
    ).loss
    torch.testing.assert_close(packed, padded)
    dweights = [torch.autograd.grad(loss, weight)[0] for loss in (padded, packed)]
    torch.testing.assert_close(*dweights)


def test_a_merged_adapter_gets_its_gradient(backend):
    base = torch.randn(23, 6, dtype=torch.float64, device=DEVICE)
    down = torch.randn(2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    up = torch.randn(23, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    hidden = torch.randn(5, 6, dtype=torch.float64, device=DEVICE)
    target = torch.randint(23, (5,), device=DEVICE)
    advantage = torch.randn(5, dtype=torch.float64, device=DEVICE)
    fused = rl.linear_policy_loss(hidden, base + 2 * up @ down, target, advantage, backend=backend)
    logits = hidden @ base.T + 2 * (hidden @ down.T) @ up.T
    naive = rl.policy_loss(logits, target, advantage, backend=backend)
    grads = [torch.autograd.grad(out.loss, (down, up)) for out in (fused, naive)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_weight_of_another_dtype_is_multiplied_in_the_wider_one(pair, backend):
    hidden = torch.randn(6, 16, device=DEVICE).to(pair[0]).requires_grad_()
    weight = torch.randn(41, 16, device=DEVICE).to(pair[1]).requires_grad_()
    target = torch.randint(41, (6,), device=DEVICE)
    out = rl.linear_policy_loss(hidden, weight, target, torch.ones(6, device=DEVICE),
                                backend=backend)  # fmt: skip
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    logp = exact.gather(-1, target[:, None]).squeeze(-1)
    assert (out.logp - logp).abs().max() < 1e-5
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    naive = torch.autograd.grad(-logp.mean(), (hidden, weight))
    assert [g.dtype for g in grads] == list(pair)
    for got, want in zip(grads, naive, strict=True):
        rounding = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
        assert (got.double() - want.double()).norm() < rounding * want.double().norm()


WIDTHS = list(itertools.product(DTYPES, DTYPES, [None, *DTYPES]))


def test_every_mixture_of_dtypes_is_exact_to_its_widest_product():
    """hidden, weight and bias of any dtypes: values and gradients as float64 gives them."""
    chunk_bytes = 500
    target = torch.randint(41, (6,), device=DEVICE)
    for hidden_dtype, weight_dtype, bias_dtype in WIDTHS:
        tensors = [torch.randn(6, 4).to(hidden_dtype), torch.randn(41, 4).to(weight_dtype)]
        tensors += [] if bias_dtype is None else [torch.randn(41).mul(4).to(bias_dtype)]
        leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
        wide = [t.to(DEVICE).double().requires_grad_() for t in tensors]
        logp, entropy, _ = oracle.token_logprob(naive_logits(*wide), target)
        given = {"bias": None if bias_dtype is None else leaves[2], "chunk_bytes": chunk_bytes}
        ones = torch.ones(6, device=DEVICE)
        loss = rl.linear_policy_loss(
            *leaves[:2], target, ones, surrogate="reinforce", entropy_coef=0.3, **given
        )
        out = rl.linear_token_logprob(*leaves[:2], target, **given)
        kl = rl.linear_categorical_kl(
            *leaves[:2], leaves[0].detach() + 1, leaves[1].detach(), p_bias=given["bias"],
            q_bias=None if bias_dtype is None else leaves[2].detach(), chunk_bytes=chunk_bytes,
        )  # fmt: skip
        other = naive_logits(
            leaves[0].detach().add(1).double(), wide[1].detach(), *(t.detach() for t in wide[2:])
        )
        true_kl = categorical_kl(naive_logits(*wide), other)
        mixture = (hidden_dtype, weight_dtype, bias_dtype)
        is_wide = torch.float64 in mixture[:2]
        wide_dtype = torch.float64 if is_wide else torch.float32
        assert {loss.logp.dtype, out.logp.dtype, kl.dtype} == {wide_dtype}, mixture
        exact = 1e-12 if is_wide else 2e-5
        values = ((loss.logp, logp), (out.logp, logp), (out.entropy, entropy), (kl, true_kl))
        for got, want in values:
            assert (got.double() - want).abs().max() <= exact, mixture
        pairs = ((loss.loss, -(logp + 0.3 * entropy).mean()), (out.logp.sum(), logp.sum()))
        for mine, truth in (*pairs, (kl.sum(), true_kl.sum())):
            got = torch.autograd.grad(mine, leaves, retain_graph=True)
            wanted = torch.autograd.grad(truth, wide, retain_graph=True)
            for gradient, want, leaf in zip(got, wanted, leaves, strict=True):
                assert gradient.dtype == leaf.dtype
                # gradients of low precision's logits are rounded to it, whatever the leaf's is
                product = torch.promote_types(hidden_dtype, weight_dtype)
                eps = max(torch.finfo(product).eps, torch.finfo(leaf.dtype).eps)
                error = (gradient.double() - want).norm() / want.norm()
                assert error <= 4 * eps + exact, (mixture, error)


def test_bf16_gradient_keeps_to_float64_where_rounded_logits_flip_clips():
    """Relative error of dhidden at most 1.2e-2; the naive bf16 logits are far off."""
    n, hidden_size, vocabulary = 256, 128, 4000
    hidden = torch.randn(n, hidden_size, device=DEVICE).bfloat16()
    weight = torch.randn(vocabulary, hidden_size, device=DEVICE).mul(0.5).bfloat16()
    target = (hidden @ weight.T).float().div(4).softmax(-1).multinomial(1).squeeze(-1)
    advantage = torch.randn(n, device=DEVICE)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    exact = exact.gather(-1, target[:, None]).squeeze(-1)
    old_logp = exact - torch.where(torch.rand(n, device=DEVICE) < 0.5, 0.17, 0.2)
    leaf = hidden.double().requires_grad_()
    truth = rl.policy_loss(leaf @ weight.double().T, target, advantage, old_logp=old_logp).loss
    (want,) = torch.autograd.grad(truth, leaf)
    errors = {}
    for name in ("fused", "logits"):
        leaf = hidden.clone().requires_grad_()
        given = (target, advantage)
        if name == "fused":
            out = rl.linear_policy_loss(leaf, weight, *given, old_logp=old_logp)
        else:
            out = rl.policy_loss(leaf @ weight.T, *given, old_logp=old_logp)
        (got,) = torch.autograd.grad(out.loss, leaf)
        errors[name] = ((got.double() - want).norm() / want.norm()).item()
    assert errors["fused"] <= 1.2e-2 < 0.1 < errors["logits"], errors


def test_no_grad_gives_the_statistics_alone(backend):
    inputs = head_inputs((9,), *ALL, bias=True, beta=0.1, entropy_coef=0.1).to(DEVICE)
    with_grad = rl.linear_policy_loss(
        *inputs.leaves()[:2], inputs.target, inputs.advantage, bias=inputs.bias, backend=backend,
        **inputs.options,
    )  # fmt: skip
    with torch.no_grad():
        without = rl.linear_policy_loss(
            *inputs.leaves()[:2], inputs.target, inputs.advantage, bias=inputs.bias,
            backend=backend, **inputs.options,
        )  # fmt: skip
    assert not without.loss.requires_grad
    for a, b in zip(with_grad, without, strict=True):
        torch.testing.assert_close(a.detach(), b)


class _LoraLinear(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 5)
        self.lora_A = torch.nn.Linear(4, 2)


BAD = {
    "a LoRA": ({"weight": _LoraLinear()}, "LoRA adapter.*merge"),
    "a layer": ({"weight": torch.nn.Linear(4, 5)}, "got the module Linear"),
    "transposed": ({"weight": torch.zeros(4, 5)}, r"weight must have shape \(V, H\) with H = 4"),
    "no vocabulary": ({"weight": torch.zeros(0, 4)}, "weight must have shape"),
    "integers": ({"weight": torch.zeros(5, 4, dtype=torch.int)}, "weight must be a float"),
    "elsewhere": ({"weight": torch.zeros(5, 4, device="meta")}, "on the device of hidden"),
    "bias": ({"bias": torch.zeros(4)}, r"bias must have shape \(5,\)"),
    "softcap": ({"softcap": -1.0}, "softcap must be positive"),
    "no softcap": ({"softcap": float("inf")}, "softcap must be a finite"),
    "scale": ({"logit_scale": 0.0}, "logit_scale must be positive"),
    "chunk": ({"chunk_bytes": -1}, "chunk_bytes must not be negative"),
    "temperature": ({"temperature": 0.0}, "temperature must be positive"),
    "target": ({"target": torch.tensor([0, 1, 5])}, "target must lie in .*position .2,."),
    "shape": ({"target": torch.zeros(2, dtype=torch.long)}, "leading shape of hidden"),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
    "hidden": ({"hidden": torch.zeros(4)}, r"hidden must have shape \(N, H\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("loss", ["policy", "logprob"])
def test_bad_input_is_named(case, loss):
    wrong, message = BAD[case]
    given = {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "backend": "torch"}
    given |= {"target": torch.tensor([0, 1, 2])} | wrong
    with pytest.raises(ValueError, match=message):
        if loss == "policy":
            given["hidden"] = given["hidden"].requires_grad_()
            rl.linear_policy_loss(**given, advantage=torch.ones(3))
        else:
            rl.linear_token_logprob(**given)


def test_the_naive_head_itself_is_right():
    """s = (h W^T + b) scale, z = c tanh(s / c), by hand."""
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    logits = naive_logits(hidden, weight, torch.tensor([0.5, -1.0]), softcap=10.0, logit_scale=0.5)
    expected = 10 * torch.tanh(torch.tensor([[5.75, 0.5]]) / 10)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("bad", [-1, 7, 1 << 40])
@pytest.mark.parametrize("strategy", ["unit-gradient", "recompute"])
def test_a_target_out_of_range_makes_its_row_nan_and_reads_nothing(strategy, bad, device):
    hidden = torch.randn(4, 5, device=device, requires_grad=True)
    weight = torch.randn(7, 5, device=device, requires_grad=strategy == "recompute")
    target = torch.tensor([0, bad, 3, 6], device=device)
    options = {"entropy": False, "chunk_bytes": 2 * 7 * 4}
    plan = rl.plan_linear(hidden, weight, loss="logprob", **options)
    assert plan.strategy == strategy
    out = rl.linear_token_logprob(hidden, weight, target, backend="triton", **options)
    (gradient,) = torch.autograd.grad(out.logp.sum(), hidden)
    is_bad = torch.arange(4, device=device) == 1
    assert torch.equal(out.logp.isnan(), is_bad)
    assert torch.equal(gradient.isnan().all(1), is_bad)
    assert gradient[~is_bad].isfinite().all()
