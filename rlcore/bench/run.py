"""`rlcore bench`: every chosen case with every contestant, checked, timed, beside its floor."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console

from rlcore.bench import floors, machine, memory, telling, timing
from rlcore.bench.cases import Case, select
from rlcore.bench.checking import TOLERANCES, Truth, call, gradients, with_leaves
from rlcore.bench.contestants import steps
from rlcore.bench.contestants.rows import Contestant, contestants, names
from rlcore.bench.operations import OPERATIONS, Inputs, Operation
from rlcore.bench.results import results
from rlcore.bench.results.results import Results, Row
from rlcore.errors import UserError, unknown_name
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count, NotNegative, Range

# below so many logits, what a call takes is the host's time to issue it
MOST_IDLE_LOGITS = 1 << 16


@dataclass
class BenchConfig(Checked):
    """Benchmark"""

    # sets (check, cpu, gpu, large, scaling, cpu-scaling), operations or whole cases; default: cpu
    # or gpu, by the device, of which an operation's cases are taken too
    cases: list[str] = field(default_factory=list)
    # only these (rlcore-triton, trl-chunked, ...); default: all
    contestants: list[str] = field(default_factory=list)
    # "cuda" or "cpu"; default: a GPU where there is one
    device: str | None = None
    # JSON file; default: benchmarks/results/<device>-<date>.json
    output: str | None = None
    # go on with the cases that the output file does not hold yet
    resume: bool = False
    # stop before a case once so many seconds have passed; --resume goes on
    limit_seconds: Annotated[float, Range(0, infinite=True)] = math.inf
    # on a CPU: times each contestant is run, all in turn
    rounds: Count = 7
    # on a CPU: a case takes no further round after so many seconds
    case_seconds: NotNegative = 40.0
    # on a CPU: threads of PyTorch
    threads: Count = 1
    # torch.compile of the plain formula too, which takes a compiler and a minute an operation
    compile: bool = False
    # peak memory (on a CPU in a fresh process each, seconds apiece)
    memory: bool = True
    # list the cases and what they cost, and stop
    dry_run: bool = False


def bench(config: BenchConfig) -> int:
    """The command: exit status 1 where a contestant of ours is wrong or fails."""
    run = run_bench(config)
    rows = run.rows if run else []
    bad = [r for r in rows if r.contestant.startswith("rlcore") and r.status in ("wrong", "failed")]
    for row in bad:
        print(f"{row.status}: {row.contestant} in {row.case}: {row.note or row.error}")
    return int(bool(bad))


def run_bench(config: BenchConfig, console: Console | None = None) -> Results | None:
    """Measure, print a table a case, and write the results after each.

    Raises UserError on an unknown case or contestant, a device that is not here, or an output file
    to resume that was made on another machine.
    """
    console = console or Console()
    device = _device(config.device)
    of_device = device.type.replace("cuda", "gpu")
    cases = select(config.cases or [of_device], of_device)
    _check_names(config.contestants)
    path = Path(config.output) if config.output else default_output(device)
    if config.dry_run:
        done = set(results.load(path).cases) if config.resume and path.exists() else set()
        cases = [case for case in cases if case.key not in done]
        telling.print_cost(console, cases, _wanted(config), device, config.case_seconds)
        return None
    torch.set_num_threads(config.threads if device.type == "cpu" else torch.get_num_threads())
    run = _open(config, device, path, cases)
    done, begun, measured = set(run.cases), time.perf_counter(), 0
    for number, case in enumerate(cases):
        if case.key in done:
            continue
        left = sum(each.key not in done for each in cases[number:])
        passed = time.perf_counter() - begun
        if passed > config.limit_seconds:
            console.print(f"stopped at the time limit, {left} cases left: --resume")
            return run
        where = telling.progress(number, len(cases), left, measured, passed)
        console.print(where, style="dim", highlight=False)
        measured += 1
        run.rows += measure_case(case, config, device, floors.Floors(**run.floors))
        run.save(path)
        telling.print_case(console, case, run.of(case.key))
    run.finished = True
    run.save(path)
    console.print(f"written to {path}", highlight=False)
    return run


def default_output(device: torch.device) -> Path:
    import datetime

    name = f"{machine.slug(device)}-{datetime.date.today().isoformat()}.json"
    return Path("benchmarks/results") / name


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device here: leave it out")
    return torch.device(name)


def _wanted(config: BenchConfig) -> set[str]:
    """The contestants that were named, as the tables call them; none: all."""
    return {name.replace("-", " ") for name in config.contestants}


def _check_names(wanted: Sequence[str]) -> None:
    known = {name.replace(" ", "-") for name in [*names(), *steps.CONTESTANTS]}
    for name in wanted:
        if name.replace(" ", "-") not in known:
            raise unknown_name("contestant", name, known)


def _open(config: BenchConfig, device: torch.device, path: Path, cases: Sequence[Case]) -> Results:
    """Fresh results with the floors measured, or those in the file that is to be resumed."""
    described = machine.describe(device)
    if config.resume and path.exists():
        run = results.load(path)
        for part in ("device", "versions"):
            if run.machine.get(part) != described[part]:
                raise UserError(f"{path} was made with another {part}: give another --output")
        run.finished = False
        return run
    measured = floors.measure(device, tuple({case.dtype for case in cases}))
    conditions = _conditions(config, device)
    return Results(described, conditions, dataclasses.asdict(measured))


def _conditions(config: BenchConfig, device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [
            "CUDA events, L2 flushed before each call, median of 300 ms of calls after a warm-up",
            "peak memory: the allocator's, above the inputs",
        ]
    said = [
        f"{config.threads} thread(s), contestants in turn in one process, median of at most "
        f"{config.rounds} rounds",
        "peak memory: resident, one call in a fresh process, above the inputs",
    ]
    load = machine.load()
    if load is not None and load > 0.5:
        said.append(
            f"other work ran on the machine (load average {load:.1f} at the start): ratios within "
            "a case hold, single times and times the floor less so"
        )
    return said


def measure_case(
    case: Case, config: BenchConfig, device: torch.device, floor: floors.Floors
) -> list[Row]:
    """The rows of one case: every contestant checked, then those that ran timed."""
    wanted = _wanted(config)
    if case.op == "grpo_step":
        return steps.measure(case, wanted, device, config.rounds, config.case_seconds)
    torch.manual_seed(0)
    entry = _Entry(case, OPERATIONS[case.op], device, config)
    rows: dict[str, Row] = {}
    for name, contestant in contestants(case.op).items():
        if wanted and name.replace("-", " ") not in wanted:
            continue
        rows[name] = entry.check(name, contestant)
        if device.type == "cuda" and rows[name].status in ("ok", "wrong"):
            rows[name] = entry.time_on_gpu(contestant, rows[name])
    if device.type == "cpu":
        entry.time_on_cpu(rows)
    least = floor.seconds(case)
    return [dataclasses.replace(row, floor=least) for row in rows.values()]


class _Entry:
    """A case with its inputs and its truth."""

    def __init__(self, case: Case, operation: Operation, device: torch.device, config: BenchConfig):
        self.case, self.operation, self.device, self.config = case, operation, device, config
        self.inputs = operation.make(case, device)
        self.truth = Truth(case, operation, self.inputs)

    def check(self, name: str, contestant: Contestant) -> Row:
        """Runs the contestant once and judges it."""
        row = Row(self.case.key, name, "unable", tolerance=TOLERANCES[self.case.dtype])
        reason = contestant.unable(self.case, self.device) or self._left_out(name)
        if reason:
            return dataclasses.replace(row, note=reason)
        try:
            outputs, grads = call(
                contestant, self.operation, self.prepared(contestant), self.case.direction
            )
            error = self.truth.error(outputs, (contestant.restore or list)(grads))
        except ModuleNotFoundError as missing:
            return dataclasses.replace(row, status="absent", note=f"needs {missing.name}")
        except Exception as raised:
            return dataclasses.replace(row, status="failed", note=_first_line(raised))
        finally:
            self._release()
        status = "ok" if error <= row.tolerance else "wrong"
        return dataclasses.replace(row, status=status, error=error)

    def _left_out(self, name: str) -> str | None:
        compiled = name == "torch.compile" and not self.config.compile
        return "needs --compile" if compiled else None

    def prepared(self, contestant: Contestant) -> Inputs:
        return with_leaves(self.operation, (contestant.prepare or dict)(self.inputs))

    def timed_call(self, contestant: Contestant) -> Callable[[], object]:
        """One call in the case's direction; for "backward" the graph is made once."""
        inputs = self.prepared(contestant)
        if self.case.direction != "backward":
            return lambda: call(contestant, self.operation, inputs, self.case.direction)
        outputs = list(contestant.run(inputs))
        return lambda: gradients(self.operation, inputs, outputs, retain_graph=True)

    def time_on_gpu(self, contestant: Contestant, row: Row) -> Row:
        try:
            run = self.timed_call(contestant)
            times = timing.on_gpu(run)
            peak = memory.on_gpu(run) if self.config.memory else None
            if self.case.N * self.case.V < MOST_IDLE_LOGITS:
                row = dataclasses.replace(row, host_seconds=timing.host_seconds(run))
        except Exception as raised:
            return dataclasses.replace(row, status="failed", note=_first_line(raised))
        finally:
            run = None
            self._release()
        return _with_times(row, times, peak)

    def time_on_cpu(self, rows: dict[str, Row]) -> None:
        """Times all that ran, in turn; their memory one after the other."""
        ran = {name for name, row in rows.items() if row.status in ("ok", "wrong")}
        calls = {n: self.timed_call(c) for n, c in contestants(self.case.op).items() if n in ran}
        # malloc keeps its heap once it has freed a large block, as any training process has:
        # before that, every call pays for fresh pages
        torch.empty(31 << 20, dtype=torch.uint8)
        times = timing.interleaved(calls, self.config.rounds, self.config.case_seconds)
        for name in calls:
            peak = None
            if self.config.memory and self.case.op != "gae":
                peak = memory.in_fresh_process(self.case, name, self.config.threads)
            rows[name] = _with_times(rows[name], times[name], peak)

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _with_times(row: Row, times: timing.Times, peak: int | None) -> Row:
    return dataclasses.replace(
        row, seconds=times.median, low=times.low, high=times.high, samples=times.samples,
        peak_bytes=peak,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
