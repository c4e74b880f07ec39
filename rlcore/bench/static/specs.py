"""What each Triton kernel is compiled with, for compilers and disassemblers that need no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rlcore.bench.static import scan_specs
from rlcore.kernels.backend import tl
from rlcore.kernels.formulas.surrogates import SURROGATES
from rlcore.kernels.triton_backend import categorical_kl as categorical
from rlcore.kernels.triton_backend import fisher, policy_loss, token_logprob
from rlcore.kernels.triton_backend.launch import READ_THREADS, WRITE_THREADS, row_launch
from rlcore.kernels.triton_backend.tiles import ONE_SWEEP_TILE, TWO_SWEEP_TILE, choose_launch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHAPE = dict.fromkeys(token_logprob.UNSPECIALIZED, "i32")
READ, WRITE = (partial(row_launch, threads=threads) for threads in (READ_THREADS, WRITE_THREADS))
ONE_SWEEP, TWO_SWEEPS = (
    partial(choose_launch, tile_bytes=tile) for tile in (ONE_SWEEP_TILE, TWO_SWEEP_TILE)
)


def compile_specs(
    vocabularies: tuple[int, ...] = (50257, 128256, 151936),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> Iterator[dict[str, object]]:
    """Every kernel at its launch values: dicts of name, fn, signature, constexprs and options.

    A signature maps each parameter to its Triton type, "constexpr" for those in constexprs. The
    vocabulary is a run-time value; it only chooses the tile.
    """
    for dtype in dtypes:
        for vocabulary in vocabularies:
            for name, (fn, launch_of, signature, constants) in _kernels(POINTERS[dtype]).items():
                launch = launch_of(vocabulary, dtype.itemsize)
                options = launch.compiler_options()
                sizes = {k: v for k, v in launch.options().items() if k not in options}
                constants = {**constants, **sizes}
                yield {
                    "name": f"{name}[{dtype}, V={vocabulary}]".replace("torch.", ""),
                    "fn": fn,
                    "signature": {**signature, **dict.fromkeys(constants, "constexpr")},
                    "constexprs": constants,
                    "options": options,
                }
    yield from scan_specs.compile_specs()


def _kernels(logits: str) -> dict[str, tuple]:
    row = dict.fromkeys(["Logp", "Entropy", "Lse", "RowMax", "LogSum"], "*fp32")
    strides = {k: v for k, v in SHAPE.items() if not k.startswith("dstride")}
    return {
        "token_logprob_forward": (
            token_logprob.token_logprob_forward_kernel,
            READ,
            {"Logits": logits, "Target": "*i64", "Mask": "*i1", **row, **strides}
            | {"inv_temperature": "fp32"},
            {},
        ),
        "token_logprob_backward": (
            token_logprob.token_logprob_backward_kernel,
            WRITE,
            {"Logits": logits, "Dlogits": logits, "Target": "*i64", "Mask": "*i1"}
            | dict.fromkeys(["Entropy", "RowMax", "LogSum", "Dlogp", "Dlse", "Dentropy"], "*fp32")
            | {**SHAPE, "inv_temperature": "fp32"},
            {"SAME_PHASE": True},
        ),
        **_policy_losses(logits),
        "scale_rows": (
            policy_loss.scale_rows_kernel,
            WRITE,
            {"Rows": logits, "Scale": "*fp32", **strides},
            {},
        ),
        **_distribution_kernels(logits),
    }


def _policy_losses(logits: str) -> dict[str, tuple]:
    """The kernel with "ppo_clip" inside, and in one dtype with each of the other surrogates."""
    per_token = ["Advantage", "OldLogp", "RefLogp", "Ratio", "Weight"]
    per_token += ["Loss", "Logp", "Entropy", "KL"]
    signature = {"Logits": logits, "Dlogits": logits, "Target": "*i64", "Clipped": "*i1", **SHAPE}
    signature |= dict.fromkeys(per_token, "*fp32")
    signature |= dict.fromkeys(["inv_temperature", "beta", "entropy_coef"], "fp32")
    kernels = {}
    for name, surrogate in SURROGATES.items():
        if surrogate.triton is None or (name != "ppo_clip" and logits != "*bf16"):
            continue
        parameters = {"parameters": ("fp32",) * max(len(surrogate.parameters), 1)}
        constants = {"SURROGATE": surrogate.triton, "KL_ESTIMATOR": "k3"}
        constants |= {"WITH_BONUS": True, "SAME_PHASE": True}
        kernels["policy_loss" if name == "ppo_clip" else f"policy_loss_{name}"] = (
            policy_loss.policy_loss_kernel,
            WRITE,
            signature | parameters,
            constants,
        )
    return kernels


def _distribution_kernels(logits: str) -> dict[str, tuple]:
    row = dict.fromkeys(["KL", "PMax", "PLogSum", "QMax", "QLogSum"], "*fp32")
    pair = {"P": logits, "Q": logits}
    shape = dict.fromkeys(categorical.UNSPECIALIZED, "i32")
    forward_shape = dict.fromkeys(categorical.UNSPECIALIZED[:6], "i32")
    return {
        "categorical_kl_forward": (
            categorical.categorical_kl_forward_kernel,
            ONE_SWEEP,
            {**pair, "Mask": "*i1", **row, **forward_shape, "inv_temperature": "fp32"},
            {"SAME_PHASE": True},
        ),
        "categorical_kl_backward": (
            categorical.categorical_kl_backward_kernel,
            ONE_SWEEP,
            {**pair, "Dp": logits, "Dq": logits, "Mask": "*i1", **row, "Dkl": "*fp32", **shape}
            | {"inv_temperature": "fp32"},
            {"SAME_PHASE": True},
        ),
        "fisher_vector_product": (
            fisher.fisher_vector_product_kernel,
            TWO_SWEEPS,
            dict.fromkeys(["Logits", "Tangent", "Product"], logits)
            | dict.fromkeys(fisher.UNSPECIALIZED, "i32")
            | {"inv_temperature": "fp32"},
            {"DTYPE": tl.float32, "SAME_PHASE": True},
        ),
    }
