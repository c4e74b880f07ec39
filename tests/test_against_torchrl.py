"""The scans against torchrl's value functionals, on the same tensors in float64.

torchrl's rewards, values and flags come as (B, T, 1), with the next state's value given apart.
`terminated` cuts the bootstrap and `done` the sum; here `terminated` does both, and only a row's
end is truncated, by `last_value`. torchrl has no mask: tokens that do not count are left out of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlcore as rl

functional = pytest.importorskip("torchrl.objectives.value.functional")
B, T = 5, 90
# torchrl takes them in float32, where these are the same; its convolution leaves out powers of
# gamma * lam below 1e-7, which these stay above
FRACTIONS = [(1.0, 0.9375), (0.984375, 0.9375), (0.875, 1.0)]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
# torchrl's loop, and the convolution that it recommends
ESTIMATES = ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def columns(*tensors: Tensor) -> list[Tensor]:
    return [x.unsqueeze(-1) for x in tensors]


def case(ended: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reward, value, terminated, last_value, and torchrl's value of the next state."""
    reward, value = torch.randn(2, B, T, dtype=torch.float64)
    last_value = torch.randn(B, dtype=torch.float64)
    terminated = (torch.rand(B, T) < 0.1) & ended
    following = torch.cat([value[:, 1:], last_value[:, None]], 1)
    return reward, value, terminated, last_value, following


@pytest.mark.parametrize("ended", [False, True], ids=["truncated", "ended inside"])
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("gamma, lam", FRACTIONS)
def test_gae_is_torchrls(gamma, lam, estimate, ended):
    reward, value, terminated, last_value, following = case(ended)
    done = terminated.clone()
    done[:, -1] = True
    theirs = getattr(functional, estimate)(
        gamma, lam, *columns(value, following, reward, done, terminated)
    )
    ours = rl.gae(reward, value, gamma=gamma, lam=lam, terminated=terminated, last_value=last_value)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.squeeze(-1), **CLOSE)


@pytest.mark.parametrize("gamma, lam", FRACTIONS[:2])
def test_returns_are_torchrls_td_lambda(gamma, lam):
    reward, value, terminated, last_value, following = case(True)
    done = terminated.clone()
    done[:, -1] = True
    theirs = functional.vec_td_lambda_return_estimate(
        gamma, lam, *columns(following, reward, done, terminated)
    )
    ours = rl.gae(reward, value, gamma=gamma, lam=lam, terminated=terminated, last_value=last_value)
    torch.testing.assert_close(ours.returns, theirs.squeeze(-1), **CLOSE)


def test_gae_with_tokens_left_out_is_torchrls_of_those_that_count():
    """Each row without its holes, which torchrl does not know."""
    reward, value, _, last_value, _ = case(False)
    mask = torch.rand(B, T) < 0.8
    ours = rl.gae(reward, value, gamma=0.984375, lam=0.9375, mask=mask, last_value=last_value)
    for row, counted in enumerate(mask):
        r, v = (x[row, counted][None] for x in (reward, value))
        following = torch.cat([v[:, 1:], last_value[row].view(1, 1)], 1)
        done, ended = torch.zeros(2, *r.shape, dtype=torch.bool)
        done[:, -1] = True
        theirs = functional.generalized_advantage_estimate(
            0.984375, 0.9375, *columns(v, following, r, done, ended)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[row, counted], other.flatten(), **CLOSE)
            assert not mine[row, ~counted].any()


@pytest.mark.parametrize("gamma", [1.0, 0.875])
def test_discounted_returns_are_torchrls_reward_to_go(gamma):
    reward, _, terminated, _, _ = case(True)
    done = terminated.clone()
    done[:, -1] = True
    theirs = functional.reward2go(*columns(reward, done), gamma)
    ours = rl.discounted_return(reward, gamma=gamma, terminated=terminated)
    torch.testing.assert_close(ours, theirs.squeeze(-1), **CLOSE)
