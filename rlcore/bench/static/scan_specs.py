"""What the scan kernels are compiled with, for compilers and disassemblers that need no GPU."""

from __future__ import annotations

from collections.abc import Iterator

from rlcore.kernels.triton_backend.scan import UNSPECIALIZED, gae_kernel
from rlcore.kernels.triton_backend.scan_launch import LONG_TILE, choose_tile
from rlcore.kernels.triton_backend.score_scan import gae_from_scores_kernel, shaped_reward_kernel

LENGTHS = (500, 4096, 131072)
FLAGS = {"Mask": "*i1", "Terminated": "*i1"}
SHAPE = dict.fromkeys(UNSPECIALIZED, "i32")


def compile_specs() -> Iterator[dict[str, object]]:
    """Every kernel at its launch values: dicts of name, fn, signature, constexprs, attrs, options.

    Rows longer than a tile come twice: `gae` looks back, `gae_swept` walks the row.
    """
    for length in LENGTHS:
        tile, options = choose_tile(length)
        for name, (fn, signature, constants) in _kernels().items():
            if constants.get("WIDTH", 1) > 1 and length <= LONG_TILE:
                continue
            constants = {**constants, **tile, "ALIGNED": True}
            yield {
                "name": f"{name}[T={length}]",
                "fn": fn,
                "signature": {**signature, **dict.fromkeys(constants, "constexpr")},
                "constexprs": constants,
                "attrs": {
                    pointer: [["tt.divisibility", 16]]
                    for pointer, kind in signature.items()
                    if kind.startswith("*")
                },
                "options": options,
            }


def _kernels() -> dict[str, tuple]:
    floats = dict.fromkeys
    scores = floats(["Score", "Logp", "RefLogp"], "*fp32")
    results = floats(["Advantage", "Returns"], "*fp32")
    gae = {**floats(["Reward", "Value"], "*fp32"), **FLAGS, "LastValue": "*fp32", **results}
    gae |= {**SHAPE, **floats(["gamma", "lam"], "fp32")}
    return {
        "gae": (gae_kernel, {**gae, "Words": "*i64"}, {"WIDTH": 32}),
        "gae_swept": (gae_kernel, gae, {"Words": None, "WIDTH": 1}),
        "shaped_reward": (
            shaped_reward_kernel,
            {**scores, "Mask": "*i1", "Reward": "*fp32", **SHAPE, "beta": "fp32"},
            {"KL_ESTIMATOR": "k1"},
        ),
        "gae_from_scores": (
            gae_from_scores_kernel,
            {**scores, "Value": "*fp32", **FLAGS, "LastValue": "*fp32", **results}
            | {"Moments": "*fp32", **SHAPE, **floats(["beta", "gamma", "lam"], "fp32")},
            {"KL_ESTIMATOR": "k3"},
        ),
    }
