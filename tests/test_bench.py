"""The benchmark harness: it must see wrong contestants, failing ones, and work left undone."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import DEVICE
from rich.console import Console

from rlcore.bench import checking, floors, memory, run, telling, timing
from rlcore.bench.cases import SETS, Case, check, rows, select
from rlcore.bench.contestants import rows as contestants
from rlcore.bench.contestants import steps
from rlcore.bench.contestants.rows import CONTESTANTS, Contestant
from rlcore.bench.operations import OPERATIONS
from rlcore.bench.results import results, tables
from rlcore.bench.results.results import Row
from rlcore.errors import UserError

CPU = torch.device("cpu")
SMALL = rows("token_logprob", "bfloat16", 16, 1031)
MEASURED = floors.Floors(1e10, {"float32": 1e11, "bfloat16": 1e11})
CHEAP = dict(device="cpu", memory=False, rounds=1)


@pytest.fixture(autouse=True)
def no_floors_measured(monkeypatch):
    """Copies and products of a quarter gigabyte take seconds, and tell these tests nothing."""
    monkeypatch.setattr(floors, "measure", lambda device, dtypes: MEASURED)


def error_of(case: Case, contestant: Contestant) -> float:
    """The contestant's error in the case, as the harness measures it."""
    operation = OPERATIONS[case.op]
    inputs = operation.make(case, torch.device(DEVICE))
    prepared = (contestant.prepare or dict)(inputs)
    outputs, grads = checking.call(
        contestant, operation, checking.with_leaves(operation, prepared), case.direction
    )
    grads = (contestant.restore or list)(grads)
    return checking.Truth(case, operation, inputs).error(outputs, grads)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", list(check()), ids=lambda case: case.key)
def test_both_backends_are_right_in_every_small_case(case, backend):
    error = error_of(case, contestants.contestants(case.op)[f"rlcore {backend}"])
    assert error <= (1e-5 if case.dtype == "float32" else 5e-3)


PEERS = [
    (case, name)
    for case in check()
    for name, contestant in contestants.contestants(case.op).items()
    if case.dtype == "float32" and not name.startswith(("rlcore", "torch.compile"))
    and not contestant.needs_gpu
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), PEERS, ids=lambda value: getattr(value, "key", value))
def test_peers_that_import_compute_what_ours_do(case, name):
    try:
        error = error_of(case, contestants.contestants(case.op)[name])
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs {missing.name}")
    assert error <= 1e-5


def flawed(flaw):
    """Ours with its outputs, or the logits' gradient, changed by `flaw`."""

    class Flawed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            ctx.save_for_backward(target)
            return logits.clone()

        @staticmethod
        def backward(ctx, dlogits):
            return flaw(dlogits, *ctx.saved_tensors), None

    def run(inputs):
        logits = Flawed.apply(inputs["logits"], inputs["target"])
        return OPERATIONS["token_logprob"].formula(inputs | {"logits": logits})

    return Contestant(run)


def keep_target_alone(dlogits, target):
    """The gradient with its softmax term left out."""
    columns = torch.arange(dlogits.shape[1], device=target.device)
    return torch.where(columns == target[:, None], dlogits, 0)


def negate_softmax(dlogits, target):
    columns = torch.arange(dlogits.shape[1], device=target.device)
    return torch.where(columns == target[:, None], dlogits, -dlogits)


def one_nan(dlogits, target):
    dlogits = dlogits.clone()
    dlogits[3, 5] = float("nan")
    return dlogits


FLAWS = [keep_target_alone, negate_softmax, lambda d, t: 1.49 * d, lambda d, t: 0 * d, one_nan]


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_gradient_is_seen_at_bfloat16s_tolerance(flaw):
    assert error_of(SMALL, flawed(lambda d, t: d)) <= checking.TOLERANCES["bfloat16"]
    assert not error_of(SMALL, flawed(flaw)) <= checking.TOLERANCES["bfloat16"]


def test_a_wrong_row_is_seen_where_the_truth_comes_in_blocks(monkeypatch):
    monkeypatch.setattr(checking, "BLOCK_ELEMENTS", 4 * 1031)
    monkeypatch.setattr(checking, "KEPT_BYTES", 0)
    case = rows("policy_loss", "float32", 16, 1031)
    right = CONTESTANTS["policy_loss"]["rlcore torch"]
    assert error_of(case, right) <= 1e-5
    double = Contestant(lambda inputs: tuple(2 * x for x in right.run(inputs)))
    assert error_of(case, double) > checking.TOLERANCES["float32"]


def test_wrong_failing_and_missing_contestants_are_shown_as_such(monkeypatch, tmp_path):
    def raises(inputs):
        raise RuntimeError("no kernel for this\nand more")

    def needs(inputs):
        import a_package_that_nobody_has  # noqa: F401

    right = CONTESTANTS["token_logp"]["rlcore torch"]
    table = {
        "rlcore torch": right,
        "twice": Contestant(lambda inputs: (2 * right.run(inputs)[0],)),
        "failing": Contestant(raises),
        "missing": Contestant(needs),
        "elsewhere": Contestant(raises, needs_gpu=True),
    }
    monkeypatch.setitem(CONTESTANTS, "token_logp", table)
    case = "token_logp/forward/float32/N=4,V=64,B=2,T=2"
    path = tmp_path / "r.json"
    run.run_bench(run.BenchConfig(cases=[case], output=str(path), **CHEAP))
    found = {row.contestant: row for row in results.load(path).rows}
    expected = {"rlcore torch": "ok", "twice": "wrong", "failing": "failed", "missing": "absent"}
    expected |= {"elsewhere": "unable", "eager": "ok", "torch.compile": "unable"}
    assert {name: row.status for name, row in found.items()} == expected
    assert found["failing"].note == "RuntimeError: no kernel for this"
    assert found["missing"].note == "needs a_package_that_nobody_has"
    assert found["twice"].error == pytest.approx(1, abs=1e-3) and found["twice"].seconds
    text = tables.markdown(results.load(path))
    for words in ("wrong: its error", "failed: RuntimeError", "missing: needs a_package"):
        assert words in text


def test_the_command_fails_where_ours_is_wrong(monkeypatch, tmp_path, capsys):
    right = CONTESTANTS["token_logp"]["rlcore torch"]
    wrong = Contestant(lambda inputs: (right.run(inputs)[0] + 1,))
    case = "token_logp/forward/float32/N=4,V=64,B=2,T=2"
    config = run.BenchConfig(cases=[case], output=str(tmp_path / "r.json"), **CHEAP)
    assert run.bench(config) == 0
    monkeypatch.setitem(CONTESTANTS["token_logp"], "rlcore torch", wrong)
    assert run.bench(config) == 1
    assert "wrong: rlcore torch" in capsys.readouterr().out


def test_every_case_reads_back_from_its_key():
    for name, cases in SETS.items():
        every = list(cases())
        assert every and len(set(every)) == len(every), f"{name} has a case twice"
        assert [Case.parse(case.key) for case in every] == every


def test_unknown_cases_and_contestants_are_named():
    with pytest.raises(UserError, match=r"unknown case 'token_logprop'\. Did you mean"):
        select(["token_logprop"])
    with pytest.raises(UserError, match="unknown contestant 'tlr'"):
        run.run_bench(run.BenchConfig(cases=["check"], contestants=["tlr"], device="cpu"))
    with pytest.raises(UserError, match="--device must be cpu or cuda"):
        run.run_bench(run.BenchConfig(device="tpu"))


def test_a_run_that_hit_its_time_limit_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "r.json"
    cases = ["token_logp/forward/float32/N=4,V=64,B=2,T=2", "gae/forward/float32/B=2,T=9"]
    stopped = run.BenchConfig(cases=cases, output=str(path), limit_seconds=0.0, **CHEAP)
    run.run_bench(dataclasses.replace(stopped, cases=cases[:1], limit_seconds=60.0))
    first = results.load(path)
    assert first.cases == cases[:1]
    run.run_bench(dataclasses.replace(stopped, resume=True))
    assert results.load(path).cases == cases[:1]
    run.run_bench(dataclasses.replace(stopped, resume=True, limit_seconds=60.0))
    whole = results.load(path)
    assert whole.cases == cases and whole.finished
    assert whole.rows[: len(first.rows)] == first.rows and whole.floors == first.floors


def test_resuming_refuses_results_of_another_machine(tmp_path):
    path = tmp_path / "r.json"
    config = run.BenchConfig(cases=["gae/forward/float32/B=2,T=9"], output=str(path), **CHEAP)
    run.run_bench(config)
    values = json.loads(path.read_text())
    values["machine"]["device"] = "another"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="made with another device"):
        run.run_bench(dataclasses.replace(config, resume=True))


def test_interleaved_runs_contestants_in_turn_and_repeats_short_ones(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    times = timing.interleaved({"long": takes("l", 1.0), "short": takes("s", 1e-3)}, rounds=3)
    assert "".join(order) == "ls" + 3 * "lss"
    assert times["long"].median == pytest.approx(1.0) and times["short"].samples == 3
    assert times["short"].median == pytest.approx(1e-3)


def test_floor_is_the_larger_of_bytes_and_products():
    measured = floors.Floors(1e9, {"float32": 1e12, "bfloat16": 4e12})
    logits = rows("token_logprob", "bfloat16", 100, 1000, "forward")
    assert measured.seconds(logits) == pytest.approx(100 * 1000 * 2 / 1e9)
    assert measured.seconds(dataclasses.replace(logits, direction="backward")) == pytest.approx(
        2 * 100 * 1000 * 2 / 1e9
    )
    head = Case.parse("linear_policy_loss/forward+backward/bfloat16/N=80,V=1000,H=500,B=8,T=10")
    assert measured.seconds(head) == pytest.approx(
        max(6 * 80 * 500 * 1000 / 4e12, 2 * (80 + 1000) * 500 * 2 / 1e9)
    )
    masked = dataclasses.replace(head, masked=0.5)
    assert OPERATIONS["linear_policy_loss"].products(masked) == 3 * 80 * 500 * 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_call_is_its_tensors():
    """float32 logits of 16 MiB: eager PyTorch keeps a log-softmax and makes a gradient at least."""
    case = rows("token_logp", "float32", 128, 32768)
    logits = case.N * case.V * 4
    eager = memory.in_fresh_process(case, "eager", 1)
    ours = memory.in_fresh_process(case, "rlcore torch", 1)
    assert 1.9 * logits <= eager <= 5 * logits
    assert logits <= ours < eager
    with pytest.raises(RuntimeError, match="nobody"):
        memory.in_fresh_process(case, "nobody", 1)


def test_steps_of_both_trainers_have_the_exact_gradient():
    pytest.importorskip("trl")
    from rlcore.bench.contestants import steps

    case = Case("grpo_step", "forward+backward", "float32", V=500, H=32, B=4, T=8)
    found = steps.measure(case, set(), CPU, rounds=1, seconds=1.0)
    assert [row.status for row in found] == ["ok", "ok"], found
    assert all(row.error < 1e-5 and row.more["tokens/s"] > 0 for row in found)


def test_the_bench_command_takes_cases_as_words(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rlcore", "bench", "check", "gae", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == next(check()).key, done.stderr
    of_cpu = [case.key for case in SETS["cpu"]() if case.op == "gae"]
    assert set(of_cpu) <= set(lines) and not list(tmp_path.iterdir())
    assert "gae/forward/float32/B=64,T=32768" not in lines, "of a GPU's set"
    assert f"{len(list(check())) + len(of_cpu)} cases, " in done.stdout
    assert "at most about" in done.stdout and "0 MiB" not in lines[-1]


def test_an_operations_name_means_its_cases_of_the_devices_set():
    for device in ("cpu", "gpu"):
        wanted = [case for case in SETS[device]() if case.op == "token_logp"]
        assert select(["token_logp"], device) == wanted and wanted
    assert all(case.op != "token_logprob" for case in select(["token_logp"]))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ((0, 39, 39, 0, 0.0), "case 1 of 39"),
        ((7, 39, 32, 7, 52.5), "case 8 of 39, about 4 min left"),
        ((37, 39, 2, 10, 100.0), "case 38 of 39, about 20 s left"),
    ],
)
def test_the_bench_says_where_it_is_and_what_is_left(told, said):
    assert telling.progress(*told) == said


TOKEN_LOGP, GAE = "token_logp/forward/float32/N=4,V=64,B=2,T=2", "gae/forward/float32/B=2,T=9"
STEP = "grpo_step/forward+backward/float32/V=500,H=32,B=4,T=8"


def said_by(config: run.BenchConfig) -> str:
    screen = Console(file=io.StringIO(), width=80)
    run.run_bench(config, screen)
    return screen.file.getvalue()


def test_a_dry_run_counts_who_would_run_and_nothing_that_is_done(tmp_path):
    path = str(tmp_path / "r.json")
    dry = run.BenchConfig(cases=[TOKEN_LOGP, GAE, STEP], dry_run=True, output=path, **CHEAP)
    known = contestants.contestants("token_logp")
    able = [name for name, each in known.items() if not each.unable(SMALL, CPU)]
    assert "rlcore triton" in known and "rlcore triton" not in able
    assert f"1 cases, {len(able)} times of contestants" in said_by(
        dataclasses.replace(dry, cases=[TOKEN_LOGP])
    )
    of_step = said_by(dataclasses.replace(dry, cases=[STEP]))
    assert f"1 cases, {len(steps.CONTESTANTS)} times" in of_step and "logits are 62 KiB" in of_step
    one = said_by(dataclasses.replace(dry, contestants=["rlcore-torch"]))
    assert "3 cases, 2 times of contestants" in one
    assert "logits" not in said_by(dataclasses.replace(dry, cases=[GAE]))
    with pytest.raises(UserError, match="unknown contestant 'tlr'"):
        said_by(dataclasses.replace(dry, contestants=["tlr"]))
    assert not (tmp_path / "r.json").exists()
    said_by(dataclasses.replace(dry, cases=[GAE], dry_run=False))
    left = said_by(dataclasses.replace(dry, resume=True))
    assert "2 cases, " in left and GAE not in left


def test_a_stop_at_the_limit_names_no_case_that_does_not_run_and_counts_those_left(tmp_path):
    path = str(tmp_path / "r.json")
    whole = run.BenchConfig(cases=[TOKEN_LOGP, GAE], output=path, **CHEAP)
    said_by(dataclasses.replace(whole, cases=[GAE]))
    said = said_by(dataclasses.replace(whole, resume=True, limit_seconds=0.0))
    assert said.splitlines() == ["stopped at the time limit, 1 cases left: --resume"]


def test_a_case_fits_80_columns_with_its_remarks_below_the_table():
    screen = Console(file=io.StringIO(), width=80)
    note = "RuntimeError: " + "a long message of another library " * 3
    given = [
        Row(TOKEN_LOGP, "liger fused linear preference", seconds=1e-3, floor=1e-5, error=1e-7,
            status="ok", peak_bytes=5000, more={"tokens/s": 12345}),
        Row(TOKEN_LOGP, "rlcore torch", "failed", note=note),
        Row(TOKEN_LOGP, "trl", "absent", note="needs trl"),
    ]  # fmt: skip
    telling.print_case(screen, Case.parse(TOKEN_LOGP), given)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert lines[2] == "liger fused linear preference  1 ms   100.00  1e-07  5 KiB"
    assert lines[4] == "liger fused linear preference: tokens/s 12345"
    assert lines[5].startswith("rlcore torch: failed: RuntimeError: a long")
    assert lines[-2] == "not run: trl (needs trl)"
