"""The scans as their definitions read, loops over single tokens in float64, and their batteries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from helpers import DEVICE
from helpers.checks import on
from helpers.judge import EPS32
from helpers.oracle import KL


@dataclass(frozen=True)
class Rows:
    """Arguments of the scans; None where a call goes without."""

    reward: Tensor
    value: Tensor
    mask: Tensor | None = None
    terminated: Tensor | None = None
    last_value: Tensor | None = None

    def options(self) -> dict[str, Tensor | None]:
        """The keyword arguments that gae and discounted_return share."""
        names = ("mask", "terminated", "last_value")
        return {name: on(DEVICE, getattr(self, name)) for name in names}


def random_rows(
    rows: int, length: int, *, counted=0.7, terminated=0.1, bootstrap=True, dtype=torch.float32
) -> Rows:
    """Random rows; what is not counted holds NaN. A share of None leaves the argument out."""
    mask = None if counted is None else torch.rand(rows, length) < counted
    reward, value = torch.randn(2, rows, length).to(dtype).unbind()
    if mask is not None:
        reward, value = (torch.where(mask, x, float("nan")) for x in (reward, value))
    cuts = None if terminated is None else torch.rand(rows, length) < terminated
    return Rows(reward, value, mask, cuts, torch.randn(rows).to(dtype) if bootstrap else None)


def naive_gae(rows: Rows, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantage, returns) by the recursion, one token after another."""
    shape = rows.reward.shape
    advantage = torch.zeros(shape, dtype=torch.float64)
    returns = torch.zeros(shape, dtype=torch.float64)
    for b in range(shape[0]):
        next_value = 0.0 if rows.last_value is None else rows.last_value[b].item()
        next_advantage = 0.0
        for t in reversed(range(shape[1])):
            if rows.mask is not None and not rows.mask[b, t]:
                continue
            if rows.terminated is not None and rows.terminated[b, t]:
                next_value = next_advantage = 0.0
            value = rows.value[b, t].item()
            delta = rows.reward[b, t].item() + gamma * next_value - value
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value
            advantage[b, t], returns[b, t] = next_advantage, next_advantage + value
    return advantage, returns


def naive_return(rows: Rows, gamma: float) -> Tensor:
    """The rewards to go: GAE of a value that is 0, but for the bootstrap, at lam = 1."""
    total = torch.zeros(rows.reward.shape, dtype=torch.float64)
    for b in range(len(total)):
        following = 0.0 if rows.last_value is None else rows.last_value[b].item()
        for t in reversed(range(total.shape[1])):
            if rows.mask is not None and not rows.mask[b, t]:
                continue
            if rows.terminated is not None and rows.terminated[b, t]:
                following = 0.0
            following = rows.reward[b, t].item() + gamma * following
            total[b, t] = following
    return total


def naive_shaped(score, logp, ref_logp, mask, *, beta: float, kl_estimator: str) -> Tensor:
    reward = torch.zeros(logp.shape, dtype=torch.float64)
    for b in range(len(reward)):
        counted = mask[b].nonzero().flatten().tolist()
        for t in counted:
            kl = KL[kl_estimator](logp[b, t].double(), ref_logp[b, t].double())
            reward[b, t] = -beta * kl
        if counted:
            reward[b, counted[-1]] += score[b].double()
    return reward


def assert_close(actual: Tensor, truth: Tensor, name: str, factor: float = 24) -> None:
    """The largest error is `factor` roundings of the largest value at most; NaN never passes."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}"
    eps = torch.finfo(actual.dtype).eps
    assert eps <= EPS32 and not actual.requires_grad, f"{name}: {actual.dtype}, or not detached"
    if not truth.numel():
        return
    error = (actual.detach().cpu().double() - truth).abs().max().item()
    bound = factor * eps * max(truth.abs().max().item(), 1.0)
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e}"


def check_gae(op: Callable, rows: Rows, *, backend: str, gamma=0.96875, lam=0.875) -> None:
    """Judges advantage and returns. The parameters are exact in float32, as kernels take them."""
    out = op(
        on(DEVICE, rows.reward), on(DEVICE, rows.value),
        gamma=gamma, lam=lam, backend=backend, **rows.options(),
    )  # fmt: skip
    advantage, returns = naive_gae(rows, gamma, lam)
    assert_close(out.advantage, advantage, "advantage")
    assert_close(out.returns, returns, "returns")


def check_return(op: Callable, rows: Rows, *, backend: str, gamma=0.96875) -> None:
    out = op(on(DEVICE, rows.reward), gamma=gamma, backend=backend, **rows.options())
    assert_close(out, naive_return(rows, gamma), "discounted return")


def scores_for(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(score, logp, ref_logp), NaN where `rows` do not count."""
    logp, ref_logp = -torch.rand(2, *rows.reward.shape).to(rows.reward.dtype)
    hidden = (torch.where(rows.mask, x, float("nan")) for x in (logp, ref_logp))
    return torch.randn(len(logp)).to(logp.dtype), *hidden


def check_shaped(op: Callable, rows: Rows, *, backend: str, beta=0.25, kl_estimator="k1") -> None:
    given = (*scores_for(rows), rows.mask)
    options = {"beta": beta, "kl_estimator": kl_estimator}
    out = op(*(on(DEVICE, x) for x in given), backend=backend, **options)
    assert_close(out, naive_shaped(*given, **options), "shaped reward")


def check_from_scores(
    op: Callable, rows: Rows, *, backend: str, kl_estimator="k1", gamma=0.96875, lam=0.875
) -> None:
    """Judges all four results."""
    given, options = scores_for(rows), {"beta": 0.25, "kl_estimator": kl_estimator}
    moved = [on(DEVICE, x) for x in (*given, rows.value, rows.mask)]
    more = {k: v for k, v in rows.options().items() if k != "mask"}
    out = op(*moved, gamma=gamma, lam=lam, backend=backend, **options, **more)
    rewards = replace(rows, reward=naive_shaped(*given, rows.mask, **options))
    advantage, returns = naive_gae(rewards, gamma, lam)
    assert_close(out.advantage, advantage, "advantage")
    assert_close(out.returns, returns, "returns")
    counted = advantage[rows.mask]
    mean = counted.mean() if len(counted) else torch.tensor(0.0)
    assert_close(out.mean, mean, "mean")
    variance = counted.var() if len(counted) > 1 else torch.tensor(0.0)
    assert_close(out.variance, variance, "variance")


def scan_as_a_tree(monkeypatch) -> None:
    """Makes the interpreter's scans combine in log2(n) steps as a GPU does, not one by one."""
    import numpy as np
    from triton.runtime.interpreter import ScanOps

    def generic_scan(self, inputs):
        axis, length = self.axis, inputs[0].handle.data.shape[self.axis]
        place = np.arange(length).reshape([length if i == axis else 1 for i in range(axis + 1)])
        place = place.reshape(place.shape + (1,) * (inputs[0].handle.data.ndim - axis - 1))
        step = 1
        while step < length:
            earlier = [self.to_tensor(np.roll(x.handle.data, step, axis), x.dtype) for x in inputs]
            combined = self.combine_fn.fn(*earlier, *inputs)
            inputs = [
                self.to_tensor(np.where(place < step, x.handle.data, y.handle.data), x.dtype)
                for x, y in zip(inputs, combined, strict=True)
            ]
            step *= 2
        return inputs

    monkeypatch.setattr(ScanOps, "generic_scan", generic_scan)


def _shapes(**options) -> Iterator[Rows]:
    for shape in [(3, 7), (2, 40), (2, 200), (1, 2100)]:
        yield random_rows(*shape, **options)


def gae_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    """Rows whose every token goes on, rows with pads, with holes, with cuts, short and split."""
    for options in [
        {},
        {"counted": None, "terminated": None},
        {"counted": None, "bootstrap": False},
        {"terminated": None},
    ]:
        for rows in _shapes(**options):
            yield partial(check_gae, op, rows, backend=backend)
    for rows in (padded_rows(3, 50), padded_rows(2, 90, ends=True)):
        yield partial(check_gae, op, rows, backend=backend)
    double = random_rows(2, 2052, terminated=None, dtype=torch.float64)
    yield partial(check_gae, op, double, backend=backend)


def padded_rows(rows: int, length: int, ends: bool = False) -> Rows:
    """Rows without holes: pads on both sides, one row full; `ends` terminates every other row."""
    filled = random_rows(rows, length, counted=None, terminated=None)
    start = torch.randint(length // 3, (rows, 1))
    stop = torch.randint(length // 2, length, (rows, 1))
    start[0], stop[0] = 0, length
    time = torch.arange(length)
    mask = (time >= start) & (time < stop)
    reward, value = (torch.where(mask, x, float("nan")) for x in (filled.reward, filled.value))
    cut = (time == stop - 1) & (torch.arange(rows)[:, None] % 2 == 0) if ends else None
    return Rows(reward, value, mask, cut, filled.last_value)


def return_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    for options in [{}, {"counted": None, "terminated": None}]:
        for rows in _shapes(**options):
            yield partial(check_return, op, rows, backend=backend)


def shaped_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    for rows, estimator in zip(_shapes(), ("k1", "k2", "k3", "k1"), strict=True):
        yield partial(check_shaped, op, rows, backend=backend, kl_estimator=estimator)
    for counted in (0.02, 0.0):
        sparse = random_rows(3, 2100, counted=counted)
        yield partial(check_shaped, op, sparse, backend=backend)


def from_scores_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    for rows, estimator in zip(_shapes(), ("k3", "k2", "k1", "k1"), strict=True):
        yield partial(check_from_scores, op, rows, backend=backend, kl_estimator=estimator)
    for counted in (0.02, 0.0):
        sparse = random_rows(3, 2100, counted=counted)
        yield partial(check_from_scores, op, sparse, backend=backend)
    yield partial(check_from_scores, op, padded_rows(3, 50, ends=True), backend=backend)


SCAN_BATTERIES = {
    "gae": gae_checks,
    "discounted_return": return_checks,
    "shaped_reward": shaped_checks,
    "gae_from_scores": from_scores_checks,
}
