"""What is known of kernels without a GPU: as launched, compiled; bytes; compilations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

from rlcore.bench.static import limits, sass, static
from rlcore.bench.static.static import StaticConfig
from rlcore.errors import UserError

pytest.importorskip("triton")

# Calls whose launches differ: what is given and what is left out are kernels of their own.
VARIANTS = """
import torch
import rlcore as rl
from rlcore.bench.static.launches import recorded

N, T, V = 6, 40, 1031
z = torch.randn(2, 3, V, dtype=torch.bfloat16, requires_grad=True)
target, flags = torch.randint(V, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
advantage, ratio = torch.randn(2, 3), torch.rand(2, 3)
reward, value, long = torch.randn(3, T), torch.randn(3, T), torch.randn(1, 70_000)
mask, ends, last = torch.ones(3, T) > 0, torch.zeros(3, T) > 0, torch.randn(3)
hidden = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(V, 16, dtype=torch.bfloat16, requires_grad=True)
triton = dict(backend="triton")

def loss(**options):
    return rl.policy_loss(z, target, advantage, **options, **triton).loss.backward()

CALLS = {
    "logprob": lambda: sum(rl.token_logprob(z, target, **triton)).sum().backward(),
    "logprob, masked": lambda: sum(
        rl.token_logprob(z, target, mask=flags, **triton)).sum().backward(),
    "logp alone": lambda: rl.token_logprob(
        z, target, entropy=False, **triton).logp.sum().backward(),
    "loss": lambda: loss(),
    "loss, all options": lambda: loss(
        old_logp=advantage, ref_logp=advantage, mask=flags, beta=0.1, entropy_coef=0.1,
        importance_sampling_ratio=ratio, delta=3.0, kl_estimator="k2"),
    "loss, sequence level": lambda: loss(
        old_logp=advantage, importance_sampling_level="sequence"),
    "loss, float32": lambda: rl.policy_loss(
        z.detach().float().requires_grad_(), target, advantage, **triton).loss.backward(),
    "kl": lambda: rl.categorical_kl(z, z.detach(), **triton).sum().backward(),
    "kl, masked": lambda: rl.categorical_kl(z, z * 2, mask=flags, **triton).sum().backward(),
    "fisher": lambda: rl.fisher_vector_product(z.detach(), z.detach(), **triton),
    "head loss": lambda: rl.linear_policy_loss(
        hidden, weight, target, advantage, **triton).loss.backward(),
    "head logprob": lambda: sum(
        rl.linear_token_logprob(hidden, weight, target, **triton)).sum().backward(),
    "gae": lambda: rl.gae(reward, value, **triton),
    "gae, all options": lambda: rl.gae(
        reward, value, mask=mask, terminated=ends, last_value=last, **triton),
    "gae, long": lambda: rl.gae(long, long, **triton),
    "gae, bfloat16": lambda: rl.gae(reward.bfloat16(), value.bfloat16(), mask=mask, **triton),
    "return": lambda: rl.discounted_return(reward, **triton),
    "return, all options": lambda: rl.discounted_return(
        reward, mask=mask, terminated=ends, last_value=last, **triton),
    "shaped": lambda: rl.shaped_reward(last, reward, value, mask, beta=0.1, **triton),
    "from scores": lambda: rl.gae_from_scores(
        last, reward, value, value, mask, beta=0.1, **triton),
    "from scores, all options": lambda: rl.gae_from_scores(
        last, reward, value, value, mask, beta=0.1, terminated=ends, last_value=last, **triton),
}
seen = set()
for name, call in CALLS.items():
    with recorded("sm_90") as launches:
        call()
    assert launches, f"{name} launched nothing"
    for launch in launches:
        if (launch.kernel, launch.specialization) not in seen:
            seen.add((launch.kernel, launch.specialization))
            try:
                launch.compiled("sm_90")
            except Exception as error:
                print(f"{name}: {launch.kernel}: {error}")
print(len(seen), "kernels")
"""


def uninterpreted(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_every_variant_that_a_call_can_launch_compiles():
    done = uninterpreted("-c", VARIANTS)
    assert done.returncode == 0, done.stderr[-3000:]
    *failed, last = done.stdout.splitlines()
    assert not failed and int(last.split()[0]) >= 25, done.stdout


def test_recording_sees_alignment_constants_and_nothing_else():
    code = """
import torch, triton, triton.language as tl
from rlcore.bench.static.launches import recorded

@triton.jit
def kernel(X, n, scale, BLOCK: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK), n * scale)

x = torch.zeros(64)
def key(*arguments, block=16):
    with recorded() as launches:
        kernel[(1,)](*arguments, BLOCK=block)
    assert not x.any(), "a recorded launch ran"
    return launches[0].specialization

assert key(x, 3, 0.5) == key(x, 5, 0.25)
assert len({key(x, 3, 0.5), key(x[1:], 3, 0.5), key(x, 16, 0.5), key(x, 3, 0.5, block=32),
            key(x, 1, 0.5), key(x.double(), 3, 0.5)}) == 6
"""
    # Triton reads a kernel's source from its file
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        done = uninterpreted(file.name)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What the command finds for two operations and sm_90."""
    path = tmp_path_factory.mktemp("static") / "static.json"
    words = ["--ops", "policy_loss", "token_logprob", "--vocabularies", "50257"]
    done = uninterpreted("-m", "rlcore", "bench", "static", *words, "--output", str(path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())


def ours(entries):
    return [entry for entry in entries if entry["contestant"] == "rlcore triton"]


def test_ours_load_16_bytes_and_spill_nothing_as_launched(figures):
    found = ours(figures["compiled"])
    assert len(found) >= 4
    for entry in found:
        assert entry["loads"] == [16] and entry["spills"] == 0 and entry["loop"] > 0, entry


def test_ours_move_each_logit_as_often_as_the_floor_says(figures):
    moved = {entry["op"]: entry for entry in ours(figures["moved"])}
    assert moved["token_logprob"]["reads"] == pytest.approx(2, abs=1e-4)
    assert moved["policy_loss"]["reads"] == pytest.approx(2, abs=1e-4)
    assert all(entry["writes"] == pytest.approx(1, abs=1e-4) for entry in moved.values())


def test_no_kernel_of_ours_is_compiled_for_each_completion_length(figures):
    counts = {entry["kernel"]: entry for entry in ours(figures["compilations"])}
    assert {"rlcore policy_loss_kernel", "rlcore token_logprob_forward_kernel"} <= set(counts)
    for entry in counts.values():
        assert entry["lengths"] == 50 and entry["compilations"] <= static.FEW, entry


def test_a_kernel_with_the_length_as_a_constant_is_counted_50_times(figures):
    liger = [e for e in figures["compilations"] if e["contestant"] == "liger"]
    if not liger:
        pytest.skip("liger_kernel is not installed")
    assert {entry["compilations"] for entry in liger} == {50}


# instructions a logit, at most; what the code takes today, and a little
GATES = {
    "token_logprob_forward": 10.0,
    "token_logprob_backward": 9.5,
    "policy_loss": 18.0,
    "scale_rows": 5.5,
}


def test_machine_code_lets_our_sweeps_reach_the_memorys_bandwidth(figures):
    for entry in ours(figures["compiled"]):
        name = entry["kernel"].removeprefix("rlcore ").removesuffix("_kernel")
        assert entry["per_logit"]["issue"] <= GATES[name], (name, entry["per_logit"])
        assert entry["resident"] >= 1024 and entry["in_flight"] >= 32 * 1024, entry
        for device in ("H100", "H200"):
            allowed = entry["allowed"][device]
            assert min(allowed, key=allowed.get) == "memory", (name, device, allowed)


def test_a_loop_that_takes_more_is_limited_by_it(figures):
    # what the earlier sweeps took on an H200, in TB/s: 16.3 instructions a logit, and twice 16.8
    h200 = limits.DEVICES["H200"]
    read = limits.Sweep({"issue": 16.3, "special": 1.0, "alu": 4.0, "fma": 4.0}, 0.0, 32)
    allowed = limits.limits([read], 2, 1, 512, h200)
    assert allowed["issue"] == pytest.approx(3.64e12, rel=0.01) and allowed["special"] > 4.8e12
    assert min(allowed, key=allowed.get) == "latency", "16 KiB in flight are not enough either"
    both = [
        limits.Sweep({"issue": 16.8, "special": 1.0, "alu": 1, "fma": 1}, w, 32) for w in (0, 2)
    ]
    assert limits.limits(both, 2, 1, 2048, h200)["issue"] == pytest.approx(3.53e12, rel=0.01)
    # one block of 512 threads, each waiting for 32 bytes
    assert allowed["latency"] == pytest.approx(132 * 512 * 32 / 0.65e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "resident"),
    [(95, 256, 0, 512), (57, 256, 0, 1024), (128, 512, 0, 512), (73, 256, 0, 768),
     (32, 1024, 0, 2048), (32, 256, 0, 2048), (16, 32, 0, 1024), (32, 256, 120 * 1024, 256)],
)  # fmt: skip
def test_programs_share_a_multiprocessor_as_registers_and_memory_allow(
    registers, threads, shared, resident
):
    device = limits.DEVICES["H200"]
    assert limits.resident_threads(registers, threads, shared, device) == resident


SASS = [
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
    "IADD3 R2, P0, R2, 0x1000, RZ",
    "LDG.E.128 R8, desc[UR4][R2.64]",
    "FMNMX R20, R4, R21, !PT",
    "LDG.E.128 R12, desc[UR4][R2.64]",
    "MUFU.EX2 R22, R20",
    "FFMA R23, R22, R8, R23",
    "BRA 0x100",
]


def test_what_is_in_flight_ends_at_the_first_use():
    assert limits.in_flight(SASS, sass.widths) == 32
    assert limits.mix_of(SASS) == {"issue": 8, "special": 1, "alu": 2, "fma": 1}


def test_the_table_fits_eighty_columns():
    done = subprocess.run(
        [sys.executable, "-m", "rlcore", "bench", "static", "--ops", "token_logprob",
         "--vocabularies", "50257"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "80"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(len(line.rstrip()) <= 80 for line in done.stdout.splitlines()), done.stdout
    assert re.search(
        r"token_logprob_forward: 32 x 256, 16 / -\n    9\.\d, 64 KiB, H100", done.stdout
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 4}, "spills registers"),
        ({"loads": [2, 16]}, r"moves \[2, 16\] bytes at once"),
    ],
)
def test_faults_of_ours_are_named(figures, change, said):
    compiled = [entry | change for entry in ours(figures["compiled"])]
    assert list(static.faults({"compiled": ours(figures["compiled"]), "compilations": []})) == []
    found = list(static.faults({"compiled": compiled, "compilations": []}))
    assert found and all(re.search(said, fault) for fault in found)


def test_static_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(static, "INTERPRETED", False)
    with pytest.raises(UserError, match="unknown target 'sm_95'"):
        static.static(StaticConfig(targets=["sm_95"]))
    with pytest.raises(UserError, match="unknown operation 'gea'"):
        static.static(StaticConfig(ops=["gea"]))
    monkeypatch.setattr(static, "INTERPRETED", True)
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        static.static(StaticConfig())
