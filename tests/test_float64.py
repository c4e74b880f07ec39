"""float64 inputs are computed with float64 numbers: no option passes through float32 on its way."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from torch import Tensor

import rlcore as rl
from rlcore.kernels.formulas.surrogates import SURROGATES

# None of them is a float32 number.
T, BETA, COEF, GAMMA, LAM = 0.7, 0.13, 0.07, 0.97, 0.93


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


LOGITS, OTHER, TARGET = randn(4, 99), randn(4, 99), torch.tensor([3, 0, 98, 50], device=DEVICE)
OLD, REF, ADVANTAGE = randn(4) - 4, randn(4) - 4, randn(4)
REWARD, VALUE, SCORE = randn(3, 50), randn(3, 50), randn(3)
MASK = torch.arange(50, device=DEVICE) < torch.tensor([[50], [31], [7]], device=DEVICE)
SCANNED = {"mask": MASK, "gamma": GAMMA, "lam": LAM}


def token_logprob(backend: str) -> list[Tensor]:
    z = LOGITS.clone().requires_grad_()
    out = rl.token_logprob(z, TARGET, temperature=T, backend=backend)
    return [*out, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), z)]


def policy_loss(surrogate: str, kl_estimator: str):
    old = None if surrogate == "reinforce" else OLD
    more = {"epsilon_high": 5.1} if surrogate == "cispo_abs" else {}

    def run(backend: str) -> list[Tensor]:
        z = LOGITS.clone().requires_grad_()
        out = rl.policy_loss(
            z, TARGET, ADVANTAGE, old_logp=old, ref_logp=REF, beta=BETA, entropy_coef=COEF,
            kl_estimator=kl_estimator, temperature=T, surrogate=surrogate, backend=backend, **more,
        )  # fmt: skip
        return [out.loss, out.kl, *torch.autograd.grad(out.loss, z)]

    return run


def categorical_kl(backend: str) -> list[Tensor]:
    p, q = LOGITS.clone().requires_grad_(), OTHER.clone().requires_grad_()
    kl = rl.categorical_kl(p, q, temperature=T, backend=backend)
    return [kl, *torch.autograd.grad(kl.sum(), (p, q))]


OPERATIONS = {
    "token_logprob": token_logprob,
    "categorical_kl": categorical_kl,
    "fisher": lambda b: [rl.fisher_vector_product(LOGITS, OTHER, temperature=T, backend=b)],
    "gae": lambda b: [*rl.gae(REWARD, VALUE, **SCANNED, backend=b)],
    "return": lambda b: [rl.discounted_return(REWARD, mask=MASK, gamma=GAMMA, backend=b)],
    "shaped": lambda b: [rl.shaped_reward(SCORE, REWARD, VALUE, MASK, beta=BETA, backend=b)],
    "gae_from_scores": lambda b: [
        *rl.gae_from_scores(SCORE, REWARD, VALUE, REWARD, beta=BETA, **SCANNED, backend=b)
    ],
    **{f"policy_loss {k}": policy_loss("ppo_clip", k) for k in ("k1", "k2", "k3", "k3_ratio")},
    **{
        f"policy_loss {name}": policy_loss(name, "k3")
        for name, surrogate in SURROGATES.items()
        if surrogate.triton is not None
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_options_are_float64_beside_float64_tensors(name, device):
    for ours, reference in zip(*(OPERATIONS[name](b) for b in ("triton", "torch")), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-14)
