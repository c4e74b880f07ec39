"""From judged completions to rewards of their tokens, over the batches of all processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import rlcore as rl
from rlcore.functional.advantages import whiten
from rlcore.trainers.shared.collect import Sampled
from rlcore.trainers.shared.experience import Experience
from rlcore.trainers.shared.run import Run


def judged_only(sampled: Sampled) -> tuple[Experience, torch.Tensor]:
    """(experience, score (N,)): completions that nobody judged count in no loss, and score 0."""
    score = sampled.mine(sampled.all_scores)
    judged = ~score.isnan()
    experience = sampled.experience
    counted = dataclasses.replace(experience, mask=experience.mask & judged[:, None])
    return counted, torch.where(judged, score, 0.0)


def token_reward(
    experience: Experience, score: torch.Tensor, kl_coef: float, kl_estimator: str = "k1"
) -> torch.Tensor:
    """(N, C): -kl_coef KL to the reference for each token, and the score on the last one."""
    old_logp, ref_logp = experience.old_logp, experience.ref_logp
    if kl_coef == 0:
        # nobody to differ from
        old_logp = ref_logp = torch.zeros(experience.mask.shape, device=score.device)
    return rl.shaped_reward(
        score, old_logp, ref_logp, experience.mask, beta=kl_coef, kl_estimator=kl_estimator
    )


def objective_metrics(
    run: Run, experience: Experience, score: torch.Tensor, reward: torch.Tensor
) -> dict[str, float]:
    """TRL's "objective/...": means over the judged completions of all processes, sums over tokens.

    With kl = logp - ref_logp, entropy = -logp and non_score_reward = what the KL took off.
    """
    per_token = {"entropy": -experience.old_logp}
    if experience.ref_logp is not None:
        per_token["kl"] = experience.old_logp - experience.ref_logp
    sums = {name: _row_sums(value, experience.mask) for name, value in per_token.items()}
    sums["rlhf_reward"] = _row_sums(reward, experience.mask)
    counted = experience.mask.any(1)
    sums["scores"] = torch.where(counted, score, 0.0)
    sums["non_score_reward"] = sums["rlhf_reward"] - sums["scores"]
    totals = torch.stack(
        [counted.double().sum(), *(value.double().sum() for value in sums.values())]
    )
    count, *totals = run.accelerator.reduce(totals, "sum").tolist()
    return {
        f"objective/{name}": total / max(count, 1.0)
        for name, total in zip(sums, totals, strict=True)
    }


def _row_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,): each row's sum over its counted tokens."""
    return torch.where(mask, values, 0.0).sum(1)


def whitened(
    run: Run, values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True
) -> torch.Tensor:
    """`rl.whiten` of (N, C) values over the counted tokens of all processes."""
    everyone = whiten(everywhere(run, values), everywhere(run, mask), shift_mean=shift_mean)
    return mine(run, everyone, values)


def everywhere(run: Run, values: Any) -> torch.Tensor:
    """(M, ...): the values (N, ...) of all processes in their order, rows padded to one length."""
    accelerator = run.accelerator
    if values.dim() > 1:
        # accelerate pads a bool with integers, and hands those back
        values = accelerator.pad_across_processes(values, dim=1).to(values.dtype)
    return accelerator.gather(values.contiguous())


def mine(run: Run, everyone: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share, of the shape of `like`, of what `everywhere` gave."""
    start = run.accelerator.process_index * len(like)
    share = everyone[start : start + len(like)]
    return share if like.dim() == 1 else share[:, : like.shape[1]]
