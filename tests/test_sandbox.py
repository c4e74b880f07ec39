"""Programs in the sandbox: only right ones pass, and none gets hold of what is not its own."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.programs import NEEDS_NAMESPACE, PLEASING, RIGHT, TRICKS, WANTED

from rlcore.sampling import sandbox
from rlcore.sampling.sandbox import FENCES, describe, fences_here, judge, passes

ON_LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no sandbox here")
SQUARE = "def f(x): return x * x"
_NUMBERS = itertools.count(1)
SECONDS = 30.0  # for what ends by itself: other tests may have all the cores


def needs(*fences: str):
    """Skips a test where one of the fences does not hold: each machine has its own."""
    missing = set(fences) - set(fences_here() if os.name == "posix" else ())
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


def without(*fences: str) -> tuple[str, ...]:
    return tuple(name for name in fences_here() if name not in fences)


def running(mark: str) -> list[str]:
    """The processes whose command line holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_does_not_pass(name):
    if name in NEEDS_NAMESPACE and "pid" not in fences_here():
        pytest.skip("only a process namespace holds it")
    endless = "loop" in name or "sleep" in name
    assert not passes(TRICKS[name], WANTED, 1.0 if endless else SECONDS)


@pytest.mark.parametrize("name", PLEASING)
def test_a_wrong_program_does_not_please_tests_that_a_right_one_passes(name):
    wrong, tests, right = PLEASING[name]
    assert not passes(wrong, tests, SECONDS)
    assert passes(right, tests, SECONDS)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(name):
    if name == "processes" and "mount" not in fences_here():
        pytest.skip("locks between processes want a /dev/shm of one's own")
    assert passes(*RIGHT[name], SECONDS)


def test_where_no_fence_holds_the_verdict_is_still_the_judges():
    tricks = ["sys.exit at once", "os._exit when called", "equal to everything", "no f"]
    tricks += ["writes to every descriptor", "writes to its parents' outputs", "reads its own file"]
    assert passes(SQUARE, WANTED, SECONDS, fences=())
    for name in tricks:
        assert not passes(TRICKS[name], WANTED, SECONDS, fences=()), name


@pytest.mark.parametrize("fence", FENCES)
def test_each_fence_can_be_missing(fence):
    # who is not root has the other namespaces by that of users
    fences = without(fence, *(("mount", "pid", "net", "ipc") if fence == "user" else ()))
    assert passes(SQUARE, WANTED, SECONDS, fences=fences)
    assert not passes("def f(x): return 0", WANTED, SECONDS, fences=fences)


@pytest.mark.parametrize(
    "program, tests, verdict",
    [
        ("print('hi')", "", True),
        ("import sys; sys.exit(0)", "", True),
        ("import sys; sys.exit(1)", "", False),
        ("import os; os._exit(0)", "", False),
        ("print(", "", False),
        ("1 / 0", "", False),
        (SQUARE, "assert f(2) == 4\nassert f(2) == 5", False),
        (SQUARE, "import sys\nsys.exit(0)", False),
        (SQUARE, "assert g(2) == 4", False),
        (SQUARE, "def test_f(a_fixture):\n    assert f(2) == 4", False),
        (SQUARE, "f(", False),
        (f"{SQUARE}\n1 / 0", WANTED, False),
        (SQUARE, "# none", True),
        # what asks nothing is no test: nobody calls these
        (SQUARE, "def check(candidate):\n    assert candidate(2) == 5", False),
        (SQUARE, "class Check:\n    def test_f(self):\n        assert f(2) == 4", False),
        (
            SQUARE,
            "import unittest\nclass T(unittest.TestCase):\n    def f_is_right(self): f(2)",
            False,
        ),
        (SQUARE, "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", True),
    ],
)
def test_the_program_runs_to_its_end_and_every_test_must_hold(program, tests, verdict):
    assert passes(program, tests, SECONDS) is verdict


def reply(value) -> bytes:
    return json.dumps(value).encode() + b"\n"


@pytest.fixture
def in_process(monkeypatch):
    """The judge takes this process's place for the tests that it runs."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", [])


LOADED = reply("ready") + reply({"value": None})


@pytest.mark.parametrize(
    "replies",
    [
        b"",
        b"ready\n",
        reply("ready"),
        LOADED,
        LOADED + b"passed\n" * 9,
        LOADED + reply({"value": {"import": ["builtins", "len"]}}) + reply({"value": 4}),
        LOADED + reply({"value": {"import": ["unittest.mock", "ANY"]}}) * 9,
        LOADED + reply({"value": {"import": ["__main__", "f"]}}) * 9,
        LOADED + reply({"value": {"module": "__main__"}}) * 9,
        LOADED + reply({"value": {"reference": {"number": 0}}}) + reply({"value": True}) * 9,
        LOADED + reply({"value": {"reference": {"number": 0, "plain": True}}}) * 9,
        LOADED + reply({"callback": 0, "arguments": [], "named": {}}) * 9,
        LOADED + reply({"raised": {"type": {"import": ["builtins", "SystemExit"]}}}) * 9,
        LOADED + b"[" * 100_000 + b"\n",
        LOADED + reply({"value": {"tuple": 3}}),
        LOADED + reply({}) * 9,
        LOADED + b"null\n" * 9,
    ],
)
def test_no_reply_of_the_programs_side_is_a_verdict(replies, in_process):
    verdict = judge._judge(io.BytesIO(), io.BytesIO(replies), SQUARE, WANTED)
    assert verdict in (judge.FAILED, judge.BROKEN)
    assert (verdict == judge.BROKEN) == (not replies.startswith(reply("ready")))


def test_the_right_values_are_one(in_process):
    values = [
        reply({"value": {"reference": {"number": 0}}}) + reply({"value": v}) for v in (4, 9, 1)
    ]
    main, argv = sys.modules["__main__"], sys.argv
    try:
        replies = io.BytesIO(LOADED + b"".join(values))
        assert judge._judge(io.BytesIO(), replies, SQUARE, WANTED) == judge.PASSED
    finally:
        sys.modules["__main__"], sys.argv = main, argv


IN_A_CASE = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        f(2)"
SKIPPED = {"import": ["unittest.case", "SkipTest"]}


@pytest.mark.parametrize(
    "tests, replies",
    [
        # another function of the library's as f, and a class of it as a value
        ("assert f(2) == 2", [{"value": {"import": ["builtins", "abs"]}}]),
        (
            "assert f(2)() == {}",
            [
                {"value": {"reference": {"number": 0}}},
                {"value": {"import": ["collections", "Counter"]}},
            ],
        ),
        # the tests' own module
        ("wanted = 4\nassert P.wanted == wanted", [{"value": {"module": "__main__"}}]),
        # an exception that skips a test
        (
            IN_A_CASE,
            [
                {"value": {"reference": {"number": 0}}},
                {
                    "raised": {
                        "type": SKIPPED,
                        "arguments": [],
                        "object": {"reference": {"number": 1}},
                    }
                },
            ],
        ),
    ],
)
def test_the_other_side_does_not_choose_what_the_judge_takes_from_a_library(
    tests, replies, in_process
):
    replies = io.BytesIO(LOADED + b"".join(map(reply, replies)))
    assert judge._judge(io.BytesIO(), replies, SQUARE, tests) == judge.FAILED


# What the program can reach


REPORT = """
import os, resource, signal, socket
def status():
    return dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
def limits():
    return {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if "RLIMIT" in n}
def tried(f, *arguments):
    try:
        f(*arguments)
    except OSError as error:
        return type(error).__name__
    return "done"
def session(): return os.getsid(0), os.getpid()
def environment(): return dict(os.environ), os.getcwd()
def guards_files(): return tried(open, f"/proc/{os.getppid()}/fd/0")
def descriptors():
    return sum(tried(os.fstat, number) == "done" for number in range(256))
def files(): return os.listdir()
def everybodys(pid):
    out = b""
    try:
        names = os.listdir("/proc")
    except PermissionError:
        names = [pid]
    for name in names:
        for part in ("environ", "cmdline"):
            try:
                out += open(f"/proc/{name}/{part}", "rb").read()
            except OSError:
                pass
    return out
def read(path): return tried(open, path)
def write(path): return tried(open, path, "w")
def signalled(pid): return tried(os.kill, pid, 0)
def connect(port): return tried(lambda: socket.create_connection(("127.0.0.1", port), 1))
def namespaces():
    import ctypes, platform
    libc = ctypes.CDLL(None)
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    found = libc.unshare(0x10000000), libc.syscall(clone, 0x10000000 | 17, 0, 0, 0, 0)
    if found[1] == 0:
        os._exit(0)
    return found
"""


def reports(tests: str, seconds: float = SECONDS, **options) -> bool:
    return passes(REPORT, tests, seconds, **options)


def test_neither_environment_nor_files_of_ours_are_there(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    monkeypatch.chdir(tmp_path)
    assert reports(
        "own, folder = environment()\nassert own['HOME'] == own['TMPDIR'] == folder\n"
        "assert 'SECRET_OF_MINE' not in own and files() == ['program.py']\n"
        "import os\nassert 'SECRET_OF_MINE' not in os.environ and os.listdir() == []"
    )


def test_the_processor_time_of_a_process_and_all_other_limits_are_set():
    assert reports(
        "own = limits()\nassert own['RLIMIT_CPU'] == (8, 8), own\n"
        "assert own['RLIMIT_AS'] == (2 ** 29, 2 ** 29) and own['RLIMIT_CORE'] == (0, 0)\n"
        "assert own['RLIMIT_FSIZE'] == (2 ** 26, 2 ** 26) and own['RLIMIT_NOFILE'] == (256, 256)\n"
        "assert 0 < own['RLIMIT_NPROC'][0] < 10 ** 6",
        7.5,
        memory_bytes=2**29,
    )


def test_a_signal_to_our_session_reaches_neither_the_judge_nor_the_program():
    assert reports(
        f"import os\nassert os.getsid(0) not in (0, {os.getsid(0)})\n"
        "sid, pid = session()\nassert sid == pid"
    )


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
def test_no_right_of_roots_is_left_and_none_can_be_gained():
    assert reports(
        "own = status()\nassert int(own['CapEff'], 16) == int(own['CapPrm'], 16) == 0\n"
        "assert own['NoNewPrivs'].strip() == '1'",
        fences=without("pid", "mount"),
    )


HIDING = {"landlock": {"landlock"}, "user": {"user"}, "pid": {"user", "mount", "pid"}}


@pytest.mark.parametrize("fence", [pytest.param(name, marks=needs(name)) for name in HIDING])
def test_other_processes_environments_cannot_be_read(fence):
    """Whichever of the three fences there is."""
    mark = "a-secret-that-nobody-else-has"
    other = subprocess.Popen(["sleep", "60"], env={"SECRET_OF_MINE": mark})
    fences = [name for name in fences_here() if name in HIDING[fence]]
    try:
        seen = f"assert {mark.encode()!r} not in everybodys({other.pid})"
        assert reports(seen, fences=fences)
    finally:
        other.kill()
        other.wait()


@needs("landlock")
def test_files_outside_cannot_be_read_or_written(tmp_path):
    data = tmp_path / "answers.jsonl"
    data.write_text("4")
    tests = f"assert read({str(data)!r}) == write({str(data)!r}) == 'PermissionError'\n"
    tests += (
        "import os, json\nassert read(os.__file__) == 'done' and write(os.__file__) != 'done'\n"
    )
    tests += "assert write('own.txt') == 'done' and write(os.devnull) == 'done'"
    assert reports(tests)
    assert reports(tests, fences=["landlock"])
    assert data.read_text() == "4"


@needs("landlock")
def test_nor_do_tests_of_somebodys_data_reach_them(tmp_path):
    (tmp_path / "mine").write_text("4")
    reads = f"assert open({str(tmp_path / 'mine')!r}).read() == '4'"
    assert not passes("", reads, SECONDS)
    assert passes("", reads, SECONDS, fences=())


@pytest.mark.parametrize("fence", [pytest.param(f, marks=needs(f)) for f in ("net", "seccomp")])
def test_there_is_no_network(fence):
    fences = [fence] if fence == "seccomp" else [f for f in ("user", "net") if f in fences_here()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        tests = f"assert connect({server.getsockname()[1]}) != 'done'"
        assert reports(tests, fences=fences)
        assert not reports(tests, fences=())


@needs("pid")
def test_the_process_that_trains_cannot_be_signalled():
    """By its number: in a process namespace there is none, or it is another process's."""
    assert reports(f"assert signalled({os.getpid()}) != 'done' or {os.getpid()} < 4")


@needs("landlock")
def test_landlock_keeps_signals_and_tcp_in_where_it_knows_them():
    version = sandbox._probe()[1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = f"connect({server.getsockname()[1]})"
        assert reports(f"assert ({connected} != 'done') is {version >= 4}", fences=["landlock"])
    signals = f"assert (signalled({os.getpid()}) != 'done') is {version >= 6}"
    assert reports(signals, fences=["landlock"])


def test_a_program_has_two_pipes_and_no_other_file_of_ours():
    assert reports("assert descriptors() == 3 + 2, descriptors()")


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
@pytest.mark.parametrize("held", [True, False])
def test_the_files_of_its_guard_are_closed_to_a_program(held):
    """The verdict's pipe is among them."""
    fences = without("landlock") if held else ()
    assert reports("assert guards_files() == 'PermissionError'", fences=fences)


@needs("seccomp")
def test_a_program_makes_no_namespaces_of_its_own():
    assert reports("assert namespaces() == (-1, -1)\nassert status()['Seccomp'].strip() == '2'")


# What it can use up


@pytest.fixture
def mark():
    """Seconds for a program's `sleep`, by which it is known; none is left behind a failing test."""
    number = next(_NUMBERS)
    seconds = f"98{os.getpid()}.{number}"
    yield seconds
    for pid in running(seconds):
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
@pytest.mark.parametrize("fences", [None, ()])
def test_nothing_that_a_program_started_is_left(fences, mark):
    program = (
        f"import subprocess\nfor _ in range(3):\n"
        f"    subprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
        # an orphan in a session of its own
        f"    subprocess.run(['sh', '-c', 'sleep {mark} &'], start_new_session=True)\n{SQUARE}"
    )
    assert passes(program, WANTED, SECONDS, fences=fences)
    assert running(mark) == []
    assert not passes(f"{program}\nwhile True: pass", WANTED, 1.0, fences=fences)
    assert running(mark) == []


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
def test_nor_is_it_where_no_fence_holds_and_the_program_kills_its_guard(mark):
    program = (
        f"import os, subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
        "os.kill(os.getppid(), 9)\nwhile True: pass"
    )
    assert not passes(program, "", 1.0, fences=())
    assert running(mark) == []


@needs("pid")
def test_a_program_that_starts_too_many_processes_is_stopped(mark):
    # a hundred, not a bomb: enough for the limit of 64
    program = (
        "import subprocess, time\nchildren = [subprocess.Popen(['sleep', "
        f"'{mark}'], start_new_session=True) for _ in range(100)]\ntime.sleep(1)"
    )
    assert not passes(program, "", SECONDS)
    assert running(mark) == []


def test_a_program_that_takes_too_much_memory_fails():
    assert passes("x = bytearray(10_000_000)", "", SECONDS)
    assert not passes("x = bytearray(400_000_000)", "", SECONDS, memory_bytes=300_000_000)


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
@pytest.mark.parametrize("fences", [None, ()])
def test_the_memory_of_all_its_processes_together_is_limited(fences):
    program = (
        "import os, time\nfor _ in range(COUNT):\n    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * 60_000_000\n        time.sleep(1)\n        os._exit(0)\n"
        "for _ in range(COUNT): os.wait()"
    )
    options = dict(memory_bytes=200_000_000, fences=fences)
    assert passes(program.replace("COUNT", "1"), "", SECONDS, **options)
    assert not passes(program.replace("COUNT", "4"), "", SECONDS, **options)


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
@pytest.mark.parametrize("fences", [None, ()])
def test_the_disk_that_all_its_files_take_together_is_limited(fences):
    program = (
        "import time\nfor name in range(COUNT):\n    with open(str(name), 'wb') as f:\n"
        "        f.write(bytes(20_000_000))\ntime.sleep(.3)"
    )
    assert passes(program.replace("COUNT", "2"), "", SECONDS, fences=fences)
    assert not passes(program.replace("COUNT", "5"), "", SECONDS, fences=fences)


def test_a_program_that_does_not_end_is_stopped_in_time():
    started = time.monotonic()
    assert not passes("import time\ntime.sleep(1000)", "", 1.0)
    assert time.monotonic() - started < 6


STARTED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", {path!r}, submodule_search_locations=[])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.passes("import subprocess\\nsubprocess.run(['sleep', '{mark}'])", "", 60.0)
"""


@pytest.mark.skipif(not ON_LINUX, reason="Linux's")
def test_the_program_ends_with_the_process_that_trains(mark):
    code = STARTED.format(path=sandbox.__file__, mark=mark)
    trainer = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: running(f"sleep\0{mark}"))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: not running(f"sleep\0{mark}"))


def wait_until(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What is said of it


def test_one_line_says_which_fences_hold_and_which_do_not(monkeypatch):
    assert "\n" not in describe()
    monkeypatch.setattr(sandbox, "_probe", lambda: (("user", "landlock"), 5))
    line = describe()
    held, missing = line.split("; not to be had here: ")
    assert held.endswith("by resource limits, user namespace, Landlock (files, TCP)")
    assert "process namespace" in missing and "system call filter" in missing
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert "root" not in describe()
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(sandbox, "_probe", lambda: ((), 0))
    held, missing = describe().split("; not to be had here: ")
    assert held.endswith("by resource limits") and missing.count(",") == len(FENCES) - 1


def test_a_sandbox_that_does_not_start_is_an_error_and_no_verdict(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown fence 'moat'.*'uid'"):
        passes(SQUARE, WANTED, SECONDS, fences=["moat"])
    monkeypatch.setattr(sandbox, "_START", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"does not start behind its fences \(none\)"):
        passes(SQUARE, WANTED, SECONDS, fences=())


def test_as_many_programs_run_at_a_time_as_a_trainer_has_cores(monkeypatch):
    usable = len(os.sched_getaffinity(0)) if ON_LINUX else os.cpu_count()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert sandbox.cores() == usable
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(usable))
    assert sandbox.cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * usable))
    assert sandbox.cores() == 1
