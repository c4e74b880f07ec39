"""The scans as operators: launches of the Triton kernels, and registration for graphs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..backend import triton
from ..torch_backend import scans as reference
from ..triton_backend.launch import number
from ..triton_backend.scan import gae_kernel
from ..triton_backend.score_scan import gae_from_scores_kernel, shaped_reward_kernel
from .checks import result_dtype

LANE_TOKENS = 4  # VECTOR of the kernels
# Tokens of a tile: at least SHORT_TILE in several short rows, at most LONG_TILE of one row.
SHORT_TILE, LONG_TILE = 1024, 2048
TOKENS_PER_THREAD = 8
# Tiles of a row that look back, at most (8M tokens); longer rows are swept by one program. Tiles
# wait for each other, which is proved under the interpreter but not yet on a device: on request.
MOST_TILES = 4096 if os.environ.get("RLCORE_SCAN_LOOK_BACK") == "1" else 1


def choose_tile(length: int) -> tuple[dict[str, int], dict[str, object]]:
    """Constants and compiler options, from the length alone: a row's bits do not depend on B."""
    tokens = max(min(triton.next_power_of_2(length), LONG_TILE), 32)
    rows = max(SHORT_TILE // tokens, 1)
    warps = max(rows * tokens // (32 * TOKENS_PER_THREAD), 1)
    # FP fusion is asked for by name: its default changes between Triton versions
    return {"ROWS": rows, "LANES": tokens // LANE_TOKENS}, {
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _launch(tensors: list[Tensor], length: int):
    """(constants with ALIGNED, options, rows of a program, tiles of a row)."""
    constants, options = choose_tile(length)
    aligned = length % LANE_TOKENS == 0 and all(
        t is None or t.data_ptr() % 16 == 0 for t in tensors
    )
    tiles = -(-length // (LANE_TOKENS * constants["LANES"]))
    return {**constants, "ALIGNED": aligned}, options, constants["ROWS"], tiles


def _launch_gae(reward, value, mask, terminated, last_value, gamma, lam, dtype):
    returns = torch.empty(reward.shape, dtype=dtype, device=reward.device)
    advantage = torch.empty_like(returns) if value is not None else None
    rows, length = reward.shape
    if returns.numel():
        given = [_dense(t) for t in (reward, value, mask, terminated, last_value)]
        constants, options, height, tiles = _launch([*given, advantage, returns], length)
        looks_back = 1 < tiles <= MOST_TILES and dtype == torch.float32
        words = None
        if looks_back:
            words = torch.full((rows, tiles), -1, dtype=torch.int64, device=reward.device)
        grid = rows * tiles if looks_back else triton.cdiv(rows, height)
        gae_kernel[(grid,)](
            *given, words, advantage, returns, rows, length, tiles,
            number(gamma, dtype), number(lam, dtype),
            WIDTH=triton.next_power_of_2(tiles), **constants, **options,
        )  # fmt: skip
    return returns.new_empty(0) if value is None else advantage, returns


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch_shaped_reward(score, logp, ref_logp, mask, beta, kl_estimator, dtype):
    reward = torch.empty(logp.shape, dtype=dtype, device=logp.device)
    rows, length = logp.shape
    if reward.numel():
        given = [_dense(t) for t in (score, logp, ref_logp, mask)]
        constants, options, height, tiles = _launch([*given, reward], length)
        shaped_reward_kernel[(triton.cdiv(rows, height),)](
            *given, reward, rows, length, tiles, number(beta, dtype),
            KL_ESTIMATOR=kl_estimator, **constants, **options,
        )  # fmt: skip
    return reward


def _launch_gae_from_scores(
    score,
    logp,
    ref_logp,
    value,
    mask,
    terminated,
    last_value,
    beta,
    kl_estimator,
    gamma,
    lam,
    dtype,
):
    returns = torch.empty(logp.shape, dtype=dtype, device=logp.device)
    advantage = torch.empty_like(returns)
    rows, length = logp.shape
    moments = returns.new_zeros((3, rows))
    if returns.numel():
        given = (score, logp, ref_logp, value, mask, terminated, last_value)
        given = [_dense(t) for t in given]
        constants, options, height, tiles = _launch([*given, advantage, returns], length)
        gae_from_scores_kernel[(triton.cdiv(rows, height),)](
            *given, advantage, returns, moments, rows, length, tiles,
            *(number(x, dtype) for x in (beta, gamma, lam)),
            KL_ESTIMATOR=kl_estimator, **constants, **options,
        )  # fmt: skip
    return advantage, returns, moments


def run_gae(
    reward: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    last_value: Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(advantage, returns); without a value the advantage is an empty tensor."""
    given = (reward, value, mask, terminated, last_value)
    run = _launch_gae if backend == "triton" else reference.gae
    return run(*given, gamma, lam, result_dtype(reward, value, last_value))


gae_op = torch.library.custom_op("rlcore::gae", run_gae, mutates_args=())


@gae_op.register_fake
def _(reward, value, mask, terminated, last_value, gamma, lam, backend):
    dtype = result_dtype(reward, value, last_value)
    returns = torch.empty(reward.shape, dtype=dtype, device=reward.device)
    return returns.new_empty(0 if value is None else reward.shape), returns


def run_shaped_reward(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    beta: float,
    kl_estimator: str,
    backend: str,
) -> Tensor:
    run = _launch_shaped_reward if backend == "triton" else reference.shaped_reward
    dtype = result_dtype(score, logp, ref_logp)
    return run(score, logp, ref_logp, mask, beta, kl_estimator, dtype)


shaped_reward_op = torch.library.custom_op(
    "rlcore::shaped_reward", run_shaped_reward, mutates_args=()
)


@shaped_reward_op.register_fake
def _(score, logp, ref_logp, *_):
    return logp.new_empty(logp.shape, dtype=result_dtype(score, logp, ref_logp))


def run_gae_from_scores(
    score: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    value: Tensor,
    mask: Tensor,
    terminated: Tensor | None,
    last_value: Tensor | None,
    beta: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantage, returns, moments (3, B): count, mean and squared deviations of each row)."""
    dtype = result_dtype(score, logp, ref_logp, value, last_value)
    given = (score, logp, ref_logp, value, mask, terminated, last_value)
    run = _launch_gae_from_scores if backend == "triton" else reference.gae_from_scores
    return run(*given, beta, kl_estimator, gamma, lam, dtype)


gae_from_scores_op = torch.library.custom_op(
    "rlcore::gae_from_scores", run_gae_from_scores, mutates_args=()
)


@gae_from_scores_op.register_fake
def _(score, logp, ref_logp, value, mask, terminated, last_value, *_):
    dtype = result_dtype(score, logp, ref_logp, value, last_value)
    advantage = logp.new_empty(logp.shape, dtype=dtype)
    return advantage, torch.empty_like(advantage), advantage.new_empty((3, logp.shape[0]))
