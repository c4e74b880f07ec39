"""GAE on a CPU, one thread, against the usual loop over T and torchrl (`make bench`).

Ratios come from contestants run in turn within one process; the targets are asserted.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from harness import interleaved
from scans import CONTESTANTS, GAMMA, LAM, make_rows, masked_loop, masks

import rlcore as rl

# rows, length, rounds, least ratio of the loop's time to ours, and of torchrl's
CASES = [(256, 4096, 5, 25, 25), (1, 32768, 3, 3000, 20), (8, 512, 21, 100, 10)]
SHAPES = [case[:3] for case in CASES]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # malloc keeps its heap once it has freed a large block, as any training process has; before
    # that every call pays for fresh pages, more than for its arithmetic
    torch.empty(31 << 20, dtype=torch.uint8)
    yield
    torch.set_num_threads(before)


def repeated(run, times: int):
    """`run` so many times in a row, as one call is too short to time, or pays for fresh pages."""

    def several():
        for _ in range(times):
            run()

    return several


def ratio_to(name: str, rows: int, length: int, rounds: int, **options) -> float:
    given = make_rows(rows, length)
    mine = lambda: rl.gae(*given, gamma=GAMMA, lam=LAM, backend="torch", **options)  # noqa: E731
    times = 20 if rows * length < 1 << 18 else 5
    seconds = interleaved(
        {"rlcore": repeated(mine, times), name: lambda: CONTESTANTS[name](*given)}, rounds
    )
    print(f"\n({rows}, {length}) {name}: {seconds[name]:.2e} s, rlcore: "
          f"{seconds['rlcore'] / times:.2e} s")  # fmt: skip
    return seconds[name] / (seconds["rlcore"] / times)


@pytest.mark.parametrize("rows, length, rounds, loop, torchrl", CASES)
def test_gae_against_the_loop_over_tokens(rows, length, rounds, loop, torchrl, record_property):
    ratio = ratio_to("loop", rows, length, rounds)
    record_property("loop / rlcore", ratio)
    print(f"loop / rlcore = {ratio:.0f}")
    assert ratio >= loop


@pytest.mark.skipif(importlib.util.find_spec("torchrl") is None, reason="torchrl is not installed")
@pytest.mark.parametrize("rows, length, rounds, loop, torchrl", CASES)
def test_gae_against_torchrl(rows, length, rounds, loop, torchrl, record_property):
    ratio = ratio_to("torchrl", rows, length, rounds)
    record_property("torchrl / rlcore", ratio)
    print(f"torchrl / rlcore = {ratio:.0f}")
    assert ratio >= torchrl


# least ratio of the time of a loop that knows of them to ours: rows of one run of tokens are a
# closed form as plain ones are; holes and ends inside a row are scanned
MASKED = {
    (256, 4096): {"right pads": 30, "tool tokens": 12, "packed episodes": 6},
    (1, 32768): {"right pads": 3000, "tool tokens": 1000, "packed episodes": 400},
    (8, 512): {"right pads": 100, "tool tokens": 25, "packed episodes": 15},
}


@pytest.mark.parametrize("kind", [k for k in masks(1, 8) if k != "no mask"])
@pytest.mark.parametrize("rows, length, rounds", SHAPES)
def test_masks_and_ends_against_the_loop(rows, length, rounds, kind, record_property):
    options = masks(rows, length)[kind]
    given = make_rows(rows, length)
    mine = lambda: rl.gae(*given, gamma=GAMMA, lam=LAM, backend="torch", **options)  # noqa: E731
    times = 20 if rows * length < 1 << 18 else 5
    contestants = {
        "rlcore": repeated(mine, times),
        "loop": lambda: masked_loop(*given, **options),
    }
    seconds = interleaved(contestants, min(rounds, 3))
    ratio = seconds["loop"] / (seconds["rlcore"] / times)
    record_property("loop / rlcore", ratio)
    print(f"\n({rows}, {length}) {kind}: loop / rlcore = {ratio:.0f}")
    assert ratio >= MASKED[rows, length][kind]


@pytest.mark.parametrize("kind", masks(1, 8))
def test_the_loop_with_masks_agrees_in_float64(kind):
    given, options = make_rows(4, 300), masks(4, 300)[kind]
    mine = rl.gae(*given, gamma=GAMMA, lam=LAM, backend="torch", **options)
    truth = masked_loop(*(x.double() for x in given), **options)
    for got, want in zip(mine, truth, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_agree_with_the_loop_in_float64(name):
    if name == "torchrl":
        pytest.importorskip("torchrl")
    given = make_rows(4, 700)
    exact = CONTESTANTS["loop"](*(x.double() for x in given))
    for mine, truth in zip(CONTESTANTS[name](*given), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=2e-5, rtol=0)
