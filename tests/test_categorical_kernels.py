"""Proofs of the kernels on whole distributions: operators, bytes, mutants, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from helpers import DEVICE
from helpers.cases import LAYOUTS, flat
from helpers.distributions import check_categorical_kl, check_fisher_vector_product
from helpers.far_rows import spread
from helpers.mutants import REFUSALS, TESTS, Mutant, function, load_kernels, read_mutants, unload
from torch import Tensor

import rlcore as rl
import rlcore.kernels.rows.fisher  # registers every operator tested here
from rlcore.bench.static.traffic import Traffic, count_memory

INF = float("inf")
counted = pytest.mark.skipif(DEVICE != "cpu", reason="counted by the interpreter")


@pytest.fixture(autouse=True)
def seed(poisoned_empty) -> None:
    torch.manual_seed(0)


# Operators


def kl_sample(device: str, backend: str) -> tuple:
    p_logits, q_logits = (flat(3, 37, torch.float32).to(device).requires_grad_() for _ in range(2))
    return p_logits, q_logits, torch.tensor([True, False, True], device=device), 0.7, backend


def kl_backward_sample(device: str, backend: str) -> tuple:
    p_logits, q_logits, mask, temperature, _ = kl_sample(device, backend)
    logits = p_logits.detach(), q_logits.detach()
    statistics = torch.ops.rlcore.categorical_kl(*logits, mask, temperature, backend)
    dkl = torch.randn(3, device=device)
    return *logits, mask, *statistics, dkl, temperature, [True, False], backend


def fisher_sample(device: str, backend: str) -> tuple:
    return *(x.detach() for x in kl_sample(device, backend)[:2]), 0.7, backend


SAMPLES = {
    "categorical_kl": kl_sample,
    "categorical_kl_backward": kl_backward_sample,
    "fisher_vector_product": fisher_sample,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_pass_opcheck(name, device, backend):
    operator = getattr(torch.ops.rlcore, name).default
    torch.library.opcheck(operator, SAMPLES[name](device, backend))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_kl_passes_gradcheck_in_float64(temperature, device, backend):
    leaves = [flat(2, 7, torch.float64).to(device).requires_grad_() for _ in range(2)]
    kl = partial(rl.categorical_kl, temperature=temperature, backend=backend)
    assert torch.autograd.gradcheck(kl, leaves)
    for held in (0, 1):
        pair = [x.detach() if i == held else x for i, x in enumerate(leaves)]
        assert torch.autograd.gradcheck(kl, pair)


def weighted_kl(device: str, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    weight = torch.randn(3, device=device)
    mask = torch.tensor([True, False, True], device=device)

    def run(p_logits: Tensor, q_logits: Tensor) -> Tensor:
        kl = rl.categorical_kl(p_logits, q_logits, temperature=0.5, mask=mask, backend=backend)
        return (kl * weight).sum()

    return run


def test_the_kl_compiles_as_one_graph(device, backend):
    torch._dynamo.reset()
    run = weighted_kl(device, backend)
    leaves = kl_sample(device, backend)[:2]

    def step(p_logits, q_logits):
        return run(p_logits * 1.5, q_logits - 1)

    got = torch.compile(step, fullgraph=True)(*leaves)
    want = step(*leaves)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(x, leaves) for x in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_fisher_product_compiles_as_one_graph(device, backend):
    torch._dynamo.reset()
    logits, tangent, *_ = fisher_sample(device, backend)

    def step(logits, tangent):
        return rl.fisher_vector_product(logits * 1.5, tangent, backend=backend) + 1

    got = torch.compile(step, fullgraph=True)(logits, tangent)
    torch.testing.assert_close(got, step(logits, tangent))


def test_the_registered_operator_and_the_short_way_agree(device, backend):
    from torch.utils.flop_counter import FlopCounterMode

    run, leaves = weighted_kl(device, backend), kl_sample(device, backend)[:2]
    for needed in (leaves, leaves[:1], leaves[1:]):
        pair = [x if any(x is y for y in needed) else x.detach() for x in leaves]
        short = torch.autograd.grad(run(*pair), needed)
        with FlopCounterMode(display=False):
            long = torch.autograd.grad(run(*pair), needed)
        assert all(map(torch.equal, short, long))
    arguments = [x.detach() for x in leaves]
    short = rl.fisher_vector_product(*arguments, backend=backend)
    with FlopCounterMode(display=False):
        assert torch.equal(rl.fisher_vector_product(*arguments, backend=backend), short)


def test_a_double_backward_raises(device, backend):
    leaves = kl_sample(device, backend)[:2]
    gradients = torch.autograd.grad(
        weighted_kl(device, backend)(*leaves), leaves, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradients[0].square().sum(), leaves[0])


def test_a_backward_through_the_fisher_product_raises(device, backend):
    for needed in (0, 1):
        pair = [x.detach() for x in kl_sample(device, backend)[:2]]
        pair[needed].requires_grad_()
        product = rl.fisher_vector_product(*pair, backend=backend)
        with pytest.raises(RuntimeError, match=r"autograd formula|does not require grad"):
            product.sum().backward()


def test_forward_mode_raises(device, backend):
    p_logits, q_logits = (x.detach() for x in kl_sample(device, backend)[:2])
    for op in (rl.categorical_kl, rl.fisher_vector_product):
        run = partial(op, backend=backend)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(run, (p_logits, q_logits), (q_logits, p_logits))


def test_rows_beyond_two_billion_elements_are_reached(device, backend):
    near = [x.detach().bfloat16() for x in kl_sample(device, backend)[:2]]
    far = [spread(x) for x in near]
    results = []
    for pair in (near, far):
        leaves = [x.requires_grad_() for x in pair]
        kl = rl.categorical_kl(*leaves, backend=backend)
        product = rl.fisher_vector_product(*(x.detach() for x in leaves), backend=backend)
        results.append((kl, product, *torch.autograd.grad(kl.sum(), leaves)))
    # another phase, another order of summation
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# Bytes


def assert_moved(traffic: Traffic, tensor: Tensor, loads: list[int], stores: list[int]) -> None:
    """How often elements of `tensor` were loaded and stored: the counts that occur."""
    moved = traffic.of(tensor)
    assert set(moved.loads_each.unique().tolist()) <= set(loads)
    assert set(moved.stores_each.unique().tolist()) <= set(stores)


@counted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 127), (3, 1000), (2, 8192), (2, 50257)], ids=str)
def test_every_logit_is_read_once_forward_and_once_backward(shape, dtype):
    leaves = [flat(*shape, dtype).requires_grad_() for _ in range(2)]
    with count_memory() as forward:
        kl = rl.categorical_kl(*leaves, backend="triton")
    with count_memory() as backward:
        gradients = torch.autograd.grad(kl.sum(), leaves)
    assert_moved(forward, kl, [0], [1])
    for z, dz in zip(leaves, gradients, strict=True):
        assert_moved(forward, z, [1], [0])
        assert_moved(backward, z, [1], [0])
        assert_moved(backward, dz, [0], [1])
    assert not forward.out_of_bounds and not backward.out_of_bounds


@counted
def test_a_gradient_that_is_not_needed_is_not_written():
    p_logits, q_logits = (flat(2, 9001, torch.bfloat16) for _ in range(2))
    kl = rl.categorical_kl(p_logits.requires_grad_(), q_logits, backend="triton")
    with count_memory() as backward:
        torch.autograd.grad(kl.sum(), p_logits)
    written = sum(access.addresses.size for access in backward.stores)
    assert written == p_logits.numel()


@counted
@pytest.mark.parametrize("layout", ["shifted_by_one_token", "every_other_row", "padded_vocabulary"])
def test_nothing_between_the_rows_is_touched(layout):
    leaves = [LAYOUTS[layout](torch.bfloat16).requires_grad_() for _ in range(2)]
    with count_memory() as traffic:
        kl = rl.categorical_kl(*leaves, backend="triton")
        gradients = torch.autograd.grad(kl.sum(), leaves)
        product = rl.fisher_vector_product(*(x.detach() for x in leaves), backend="triton")
    assert not traffic.out_of_bounds
    for x in (*leaves, *gradients, product):
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        assert traffic.of(whole).loads == traffic.of(x).loads
        assert traffic.of(whole).stores == traffic.of(x).stores


@counted
def test_masked_rows_are_not_read_and_rows_without_gradient_not_read_again():
    leaves = [flat(4, 1000, torch.float32).requires_grad_() for _ in range(2)]
    mask = torch.tensor([True, False, True, True])
    with count_memory() as forward:
        kl = rl.categorical_kl(*leaves, mask=mask, backend="triton")
    with count_memory() as backward:
        torch.autograd.grad(kl, leaves, torch.tensor([1.0, 1.0, 0.0, 2.0]))
    for z in leaves:
        assert not forward.of(z).loads_each[1].any()
        assert not backward.of(z).loads_each[1:3].any()


@counted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 127), (2, 12_000), (2, 50257)], ids=str)
def test_the_fisher_product_reads_at_most_twice_and_writes_once(shape, dtype):
    logits, tangent = flat(*shape, dtype), flat(*shape, dtype)
    with count_memory() as traffic:
        product = rl.fisher_vector_product(logits, tangent, backend="triton")
    for x in (logits, tangent):
        assert_moved(traffic, x, [1, 2], [0])
    assert_moved(traffic, product, [0], [1])
    assert not traffic.out_of_bounds


@counted
def test_the_tail_of_a_row_is_kept_for_the_second_sweep():
    logits, tangent = (flat(2, 12_000, torch.bfloat16) for _ in range(2))
    with count_memory() as traffic:
        rl.fisher_vector_product(logits, tangent, backend="triton")
    assert traffic.of(logits).loads < 1.75 * logits.numel()
    assert traffic.of(tangent).loads < 1.75 * tangent.numel()


# Mutants


def kl_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(p_logits: Tensor, q_logits: Tensor, **options):
        where = {"device": DEVICE, "backend": backend}
        return partial(check_categorical_kl, op, p_logits, q_logits, **where, **options)

    yield check(flat(4, 130, torch.float32), flat(4, 130, torch.float32), temperature=0.7)
    yield check(flat(2, 9001, torch.float32), flat(2, 9001, torch.float32), temperature=1.3)
    yield check(*(LAYOUTS["shifted_by_one_token"](torch.bfloat16) for _ in range(2)))
    yield check(flat(6, 130, torch.float32)[::2], flat(3, 130, torch.float32))
    yield partial(assert_no_kl_is_below_zero, op, backend)
    p_logits, q_logits = flat(4, 9001, torch.float32), flat(4, 9001, torch.float32)
    mask = torch.tensor([True, False, True, False])
    p_logits[~mask] = float("nan")
    yield check(p_logits, q_logits, mask=mask)
    p_logits, q_logits = flat(2, 9001, torch.float32), flat(2, 9001, torch.float32)
    p_logits[:, :8500] = q_logits[:, 5:8500] = -INF
    yield check(p_logits, q_logits)
    yield partial(assert_infinite_kl_is_reported, op, backend)


def assert_no_kl_is_below_zero(op: Callable, backend: str) -> None:
    p_logits = flat(64, 1003, torch.float32).to(DEVICE)
    kl = op(p_logits, p_logits + 1e-4 * torch.randn_like(p_logits), backend=backend)
    assert (kl >= 0).all() and (kl < 1e-6).all()


def assert_infinite_kl_is_reported(op: Callable, backend: str) -> None:
    leaves = [flat(2, 130, torch.float32).to(DEVICE) for _ in range(2)]
    leaves[1][1, 7] = -INF
    p_logits, q_logits = (x.requires_grad_() for x in leaves)
    kl = op(p_logits, q_logits, backend=backend)
    assert kl.isinf().tolist() == [False, True]
    assert not torch.autograd.grad(kl.sum(), p_logits)[0][1].any()


def fisher_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(logits: Tensor, tangent: Tensor, **options):
        where = {"device": DEVICE, "backend": backend}
        return partial(check_fisher_vector_product, op, logits, tangent, **where, **options)

    yield check(flat(4, 130, torch.float32), flat(4, 130, torch.float32), temperature=0.7)
    yield check(flat(2, 20_001, torch.bfloat16), flat(2, 20_001, torch.bfloat16))
    yield check(flat(2, 9001, torch.float32), flat(2, 9001, torch.float32) + 5, temperature=2.0)
    yield check(flat(6, 130, torch.float32)[::2], flat(3, 130, torch.float32))
    logits, tangent = flat(2, 9001, torch.float32), flat(2, 9001, torch.float32)
    logits[:, :8500] = -INF
    tangent[:, :8500] = float("nan")
    yield check(logits, tangent)


BATTERIES = {"categorical_kl": kl_checks, "fisher_vector_product": fisher_checks}
CASES = [
    pytest.param(operation, backend, mutant, id=f"{operation}-{backend}-{mutant.name}")
    for path in sorted((TESTS / "mutants" / "distributions").glob("*.txt"))
    for operation, backend in [path.stem.split(".")]
    for mutant in read_mutants(path)
]


@pytest.fixture
def load(tmp_path):
    """Loads an operation from a copy of kernels/, mutated where asked."""

    def run(operation: str, mutant: Mutant | None = None) -> Callable:
        return function(load_kernels(tmp_path, mutant), operation)

    yield run
    unload()


@pytest.mark.parametrize("operation", BATTERIES)
def test_an_unchanged_copy_passes_its_battery(operation, backend, load):
    for check in BATTERIES[operation](load(operation), backend):
        check()


@pytest.mark.parametrize("operation", BATTERIES)
def test_each_kernel_has_six_mutants_at_least(operation, backend):
    assert sum(case.values[:2] == (operation, backend) for case in CASES) >= 6


@pytest.mark.parametrize("operation, backend, mutant", CASES)
def test_a_wrong_kernel_is_refused(operation, backend, mutant, load):
    if mutant.name.startswith("rows at unlike boundaries") and DEVICE != "cpu":
        pytest.skip("a GPU ends the whole process at an address that is not aligned")
    for check in BATTERIES[operation](load(operation, mutant), backend):
        try:
            check()
        except REFUSALS:
            return
    pytest.fail(f"every check of {operation} accepted the mutant {mutant.name!r}")


# Bad input

GOOD = torch.zeros(4, 11)
BAD_PAIRS = {
    "one dimension": ((GOOD[0], GOOD[0]), r"{0}.*\(N, V\).*\(11,\)"),
    "integers": ((GOOD.long(), GOOD), "{0}.*int64"),
    "second of integers": ((GOOD, GOOD.long()), "{1}.*int64"),
    "no columns": ((GOOD[:, :0], GOOD[:, :0]), "{0}.*column"),
    "other shape": ((GOOD, GOOD[:3]), r"{1}.*{0}.*\(4, 11\).*\(3, 11\)"),
    "other vocabulary": ((GOOD, GOOD[:, :9]), r"{1}.*{0}.*\(4, 11\).*\(4, 9\)"),
    "other device": ((GOOD, GOOD.to("meta")), "{1}.*device of {0}.*cpu.*meta"),
}
BAD_OPTIONS = {
    "temperature zero": ({"temperature": 0.0}, "temperature.*positive.*0"),
    "temperature infinite": ({"temperature": INF}, "temperature.*finite.*inf"),
    "backend unknown": ({"backend": "tritom"}, "backend.*'triton', 'torch'.*'tritom'"),
}
BAD_MASKS = {
    "mask of another shape": ({"mask": torch.ones(5).bool()}, r"mask.*\(4,\).*\(5,\)"),
    "mask of floats": ({"mask": torch.ones(4)}, "mask.*bool.*float32"),
}


@pytest.mark.parametrize("pair, message", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_pair_that_does_not_fit_is_refused(pair, message):
    with pytest.raises(ValueError, match=message.format("p_logits", "q_logits")):
        rl.categorical_kl(*pair)
    with pytest.raises(ValueError, match=message.format("logits", "tangent")):
        rl.fisher_vector_product(*pair)


@pytest.mark.parametrize("options, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl.categorical_kl(GOOD, GOOD, **options)
    with pytest.raises(ValueError, match=message):
        rl.fisher_vector_product(GOOD, GOOD, **options)


@pytest.mark.parametrize("options, message", BAD_MASKS.values(), ids=BAD_MASKS)
def test_masks_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl.categorical_kl(GOOD, GOOD, **options)
