"""Every kernel compiled for every target without a GPU: no spills, 16-byte accesses in loops."""

from __future__ import annotations

import pytest

from rlcore.bench.static.compile_gate import OURS, TARGETS, compiled
from rlcore.kernels.formulas.surrogates import SURROGATES

MODULES = (OURS, "helpers.canaries")
ROW_KERNELS = {"token_logprob_forward", "token_logprob_backward", "policy_loss", "scale_rows"}
VOCABULARIES = (50257, 128256, 151936)


def results(target: str, prefix: str = "", suffix: str = "") -> list[dict]:
    """What `target` got of the kernels, or of the canaries where the prefix asks for them."""
    return [
        result
        for result in compiled(MODULES)
        if result["target"] == target
        and result["name"].startswith(prefix)
        and result["name"].endswith(suffix)
        and result["name"].startswith("canary") == prefix.startswith("canary")
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_registers(target):
    found = results(target)
    assert {result["name"].split("[")[0] for result in found} >= ROW_KERNELS
    spilling = [result for result in found if (result["spills"], result["stack"]) != (0, 0)]
    assert not spilling


@pytest.mark.parametrize("name", [n for n, entry in SURROGATES.items() if entry.triton])
def test_the_gate_compiles_every_surrogate(name):
    kernel = "policy_loss" if name == "ppo_clip" else f"policy_loss_{name}"
    found = {r["target"] for r in compiled(MODULES) if r["name"].split("[")[0] == kernel}
    assert found == set(TARGETS)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("target", TARGETS)
def test_loops_load_and_store_16_bytes_at_every_vocabulary(target, vocabulary):
    found = results(target, suffix=f"[bfloat16, V={vocabulary}]")
    assert {result["name"].split("[")[0] for result in found} >= ROW_KERNELS
    for result in found:
        loads, stores = (
            [width for loop in result["loops"] for width in loop[kind]]
            for kind in ("loads", "stores")
        )
        assert set(loads) == {16} and set(stores) <= {16}, result
        if result["name"].split("[")[0] in ROW_KERNELS - {"token_logprob_forward"}:
            assert stores, f"no store was found in the loops of {result}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_gate_sees_narrow_accesses(target):
    (result,) = results(target, "canary unaligned")
    assert {w for loop in result["loops"] for w in (*loop["loads"], *loop["stores"])} == {2}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_gate_sees_spills(target):
    (result,) = results(target, "canary spilling")
    assert result["spills"] > 0 and result["stack"] > 0
