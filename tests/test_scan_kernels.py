"""The scan kernels and their twins: batteries, mutants, bytes, compiled code, operators."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.mutants import TESTS, function, load_kernels, read_mutants, unload
from helpers.scans import (
    SCAN_BATTERIES,
    check_gae,
    naive_gae,
    random_rows,
    scan_as_a_tree,
    scores_for,
)

import rlcore as rl
from rlcore.bench.static.compile_gate import TARGETS, compiled
from rlcore.bench.static.traffic import count_memory
from rlcore.kernels.triton_backend import scan_launch

counted_by_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="counted by the interpreter")
MUTANTS = [
    pytest.param(operation, backend, mutant, id=f"{operation}-{backend}-{mutant.name}")
    for path in sorted((TESTS / "mutants" / "scans").glob("*.txt"))
    for operation, backend in [path.stem.split(".")]
    for mutant in read_mutants(path)
]


@pytest.fixture(autouse=True)
def clean(device, monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        scan_as_a_tree(monkeypatch)
    yield
    unload()


@pytest.mark.parametrize("operation", SCAN_BATTERIES)
def test_every_check_of_the_battery_passes(operation, backend):
    for check in SCAN_BATTERIES[operation](getattr(rl, operation), backend):
        check()


@pytest.mark.parametrize("operation", SCAN_BATTERIES)
def test_an_unchanged_copy_passes_its_battery(operation, backend, tmp_path):
    op = function(load_kernels(tmp_path), operation)
    next(iter(SCAN_BATTERIES[operation](op, backend)))()


@pytest.mark.parametrize("operation", ["gae", "shaped_reward", "gae_from_scores"])
def test_each_scan_has_six_mutants_at_least(operation, backend):
    assert sum(case.values[:2] == (operation, backend) for case in MUTANTS) >= 6


@pytest.mark.parametrize("operation, backend, mutant", MUTANTS)
def test_a_wrong_scan_is_refused(operation, backend, mutant, tmp_path):
    op = function(load_kernels(tmp_path, mutant), operation)
    for check in SCAN_BATTERIES[operation](op, backend):
        try:
            check()
        except AssertionError:
            return
    pytest.fail(f"every check of {operation} accepted the mutant {mutant.name!r}")


@pytest.fixture(params=["looks back", "sweeps"])
def small_tiles(request, monkeypatch) -> str:
    """Tiles of 64 tokens, so that short rows have many."""
    monkeypatch.setattr(scan_launch, "SHORT_TILE", 64)
    monkeypatch.setattr(scan_launch, "LONG_TILE", 64)
    if request.param == "sweeps":
        monkeypatch.setattr(scan_launch, "MOST_TILES", 1)
    return request.param


@pytest.mark.parametrize("length", [64, 65, 128, 500])
def test_rows_of_many_tiles_are_carried_across_them(length, small_tiles):
    check_gae(rl.gae, random_rows(3, length), backend="triton")
    check_gae(rl.gae, random_rows(3, length, counted=None, terminated=None), backend="triton")


@pytest.mark.parametrize("length", [40, 500])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(length, small_tiles):
    rows = random_rows(9, length)
    given = [x.to(DEVICE) for x in (rows.reward, rows.value)]
    options = rows.options()
    batch = rl.gae(*given, backend="triton", **options)
    for i in range(len(given[0])):
        row = slice(i, i + 1)
        some = {name: x[row] for name, x in options.items()}
        alone = rl.gae(*(x[row] for x in given), backend="triton", **some)
        assert torch.equal(alone.advantage, batch.advantage[row])
        assert torch.equal(alone.returns, batch.returns[row])


def test_the_order_in_which_lanes_are_combined_does_not_matter(monkeypatch):
    rows = random_rows(3, 200)
    monkeypatch.undo()
    check_gae(rl.gae, rows, backend="triton")


@pytest.mark.parametrize("length", [3001, 3004])
def test_rows_wider_than_a_tile_of_the_real_size_look_back(length):
    check_gae(rl.gae, random_rows(2, length), backend="triton")


def assert_moved(traffic, tensor, loads: int, stores: int) -> None:
    moved = traffic.of(tensor)
    assert moved.loads_each.unique().tolist() == [loads]
    assert moved.stores_each.unique().tolist() == [stores]


@counted_by_interpreter
@pytest.mark.parametrize("shape", [(3, 7), (5, 64), (2, 500), (1, 2100)], ids=str)
def test_gae_reads_every_input_once_and_writes_every_output_once(shape):
    rows = random_rows(*shape)
    with count_memory() as traffic:
        out = rl.gae(rows.reward, rows.value, backend="triton", **rows.options())
    for x in (rows.reward, rows.value, rows.mask, rows.terminated):
        assert_moved(traffic, x, loads=1, stores=0)
    for x in out:
        assert_moved(traffic, x, loads=0, stores=1)
    assert not traffic.out_of_bounds


@counted_by_interpreter
def test_the_summaries_of_tiles_are_a_hundredth_of_the_traffic_at_most():
    rows = random_rows(1, 3 * scan_launch.LONG_TILE)
    with count_memory() as traffic:
        rl.gae(rows.reward, rows.value, backend="triton", **rows.options())
    floor = rows.reward.numel() * (4 + 4 + 1 + 1 + 4 + 4)
    moved = sum(len(x.addresses) * x.itemsize for x in traffic.loads + traffic.stores)
    assert floor <= moved <= 1.01 * floor


@counted_by_interpreter
@pytest.mark.parametrize("shape", [(3, 7), (2, 500), (1, 2100)], ids=str)
def test_gae_from_scores_reads_and_writes_once(shape):
    rows = random_rows(*shape)
    score, logp, ref_logp = scores_for(rows)
    options = {"terminated": rows.terminated, "last_value": rows.last_value}
    with count_memory() as traffic:
        out = rl.gae_from_scores(
            score, logp, ref_logp, rows.value, rows.mask, beta=0.1, backend="triton", **options
        )
    for x in (logp, ref_logp, rows.value, rows.mask, rows.terminated):
        assert_moved(traffic, x, loads=1, stores=0)
    for x in out[:2]:
        assert_moved(traffic, x, loads=0, stores=1)
    assert not traffic.out_of_bounds


@counted_by_interpreter
def test_shaped_reward_reads_and_writes_once():
    rows = random_rows(3, 2100)
    score, logp, ref_logp = scores_for(rows)
    with count_memory() as traffic:
        reward = rl.shaped_reward(score, logp, ref_logp, rows.mask, beta=0.1, backend="triton")
    for x in (logp, ref_logp, rows.mask):
        assert_moved(traffic, x, loads=1, stores=0)
    assert_moved(traffic, reward, loads=0, stores=1)
    assert not traffic.out_of_bounds


GATE = ("gae", "gae_swept", "shaped_reward", "gae_from_scores")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", GATE)
def test_no_scan_kernel_spills_registers(kernel, target):
    found = [r for r in compiled() if r["target"] == target and r["name"].startswith(f"{kernel}[T")]
    assert found
    for result in found:
        assert (result["spills"], result["stack"]) == (0, 0), result


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", GATE[1:])
def test_scan_kernels_move_16_bytes_of_numbers_and_4_of_flags(kernel, target):
    """The look-back's innermost loop waits; its tile is that of the sweep, which is a loop."""
    found = [r for r in compiled() if r["target"] == target and r["name"].startswith(f"{kernel}[T")]
    assert found
    for result in found:
        loads = {w for loop in result["loops"] for w in loop["loads"]}
        stores = {w for loop in result["loops"] for w in loop["stores"]}
        assert (loads, stores) == ({4, 16}, {16}), result


def samples(backend: str) -> dict[str, tuple]:
    rows = random_rows(2, 37)
    rows = [None if x is None else x.to(DEVICE) for x in vars(rows).values()]
    score, logp, ref_logp = (x.to(DEVICE) for x in scores_for(random_rows(2, 37)))
    return {
        "gae": (*rows, 0.5, 0.75, backend),
        "shaped_reward": (score, logp, ref_logp, rows[2], 0.5, "k3", backend),
        "gae_from_scores": (
            *(score, logp, ref_logp, *rows[1:]), 0.5, "k1", 0.5, 0.75, backend,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gae", "shaped_reward", "gae_from_scores"])
def test_scan_operators_pass_opcheck(name, backend):
    operator = getattr(torch.ops.rlcore, name).default
    arguments = [
        x.nan_to_num() if isinstance(x, torch.Tensor) else x for x in samples(backend)[name]
    ]
    torch.library.opcheck(operator, tuple(arguments))


def test_a_compiled_graph_holds_the_scan_unbroken(backend):
    rows = random_rows(2, 37)
    options = rows.options()

    def run(reward, value):
        out = rl.gae(reward * 2, value, backend=backend, **options)
        back = rl.discounted_return(reward, backend=backend, **options)
        return out.advantage + 1, out.returns, back

    given = (rows.reward.to(DEVICE), rows.value.to(DEVICE))
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(graph(*given), run(*given), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.9375), (0.984375, 0.9375), (1.0, 1.0)])
def test_the_error_does_not_grow_with_the_length_of_the_row(gamma, lam, backend):
    """Root mean square, against the loop in float64; a loop in float32 errs by 2e-6."""
    errors = {}
    for length in (1024, 262144):
        rows = random_rows(1, length, counted=None, terminated=None)
        given = (rows.reward.to(DEVICE), rows.value.to(DEVICE))
        out = rl.gae(*given, gamma=gamma, lam=lam, backend=backend, **rows.options())
        truth, _ = naive_gae(rows, gamma, lam)
        error = (out.advantage.cpu().double() - truth).square().mean().sqrt()
        errors[length] = (error / truth.square().mean().sqrt()).item()
    print(errors)
    assert max(errors.values()) < 5e-7, errors
