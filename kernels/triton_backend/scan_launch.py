"""Launches of the scans along time: tiles, grids, alignment."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..backend import triton
from .launch import number
from .scan import gae_kernel
from .score_scan import gae_from_scores_kernel, shaped_reward_kernel

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


def gae(reward, value, mask, terminated, last_value, gamma, lam, dtype):
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


def shaped_reward(score, logp, ref_logp, mask, beta, kl_estimator, dtype):
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


def gae_from_scores(
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
