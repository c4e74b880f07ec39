"""The ordinary assertions in a compact form, for many wrong versions of an operation in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import DEVICE
from helpers.cases import LAYOUTS, PolicyInputs, batch, flat, policy_inputs, random_target
from helpers.checks import check_policy_loss, check_token_logprob

ALL = ("old_logp", "ref_logp", "importance_sampling_ratio", "mask")
EVERYTHING = {"beta": 0.1, "entropy_coef": 0.02, "temperature": 1.3, "delta": 1.5}
CLIP_HIGHER = {"epsilon": 0.1, "epsilon_high": 0.3}


def as_operator(check: Callable[[], None]) -> Callable[[], None]:
    """The check under a dispatch mode, where the registered operator serves the call.

    Its gradient is contiguous, whatever the logits' strides are.
    """

    def run() -> None:
        with FlopCounterMode(display=False):
            check()

    return run


def token_logprob_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(logits: torch.Tensor, target: torch.Tensor | None = None, **options):
        target = random_target(logits) if target is None else target
        return partial(
            check_token_logprob, op, logits, target, device=DEVICE, backend=backend, **options
        )

    yield as_operator(check(LAYOUTS["padded_vocabulary"](torch.float32)))
    for entropy in (True, False):
        yield check(flat(4, 130, torch.float32), temperature=0.7, entropy=entropy)
        yield check(flat(2, 9001, torch.float32), temperature=1.3, entropy=entropy)
        yield check(LAYOUTS["shifted_by_one_token"](torch.bfloat16), entropy=entropy)
        logits = flat(4, 130, torch.float32)
        mask = torch.tensor([True, False, True, False])
        logits[~mask] = float("nan")
        yield check(logits, mask=mask, entropy=entropy)
        logits = flat(2, 9001, torch.float32)
        logits[:, :8500] = -float("inf")
        yield check(logits, target=logits.argmax(-1), entropy=entropy)
        yield check(flat(3, 2, torch.float32), entropy=entropy)
        yield partial(a_nan_spoils_its_row, op, backend, entropy)


def a_nan_spoils_its_row(op: Callable, backend: str, entropy: bool) -> None:
    logits = flat(3, 9001, torch.float32).to(DEVICE)
    logits[1, 5000] = float("nan")
    target = random_target(logits).to(DEVICE)
    out = op(logits.requires_grad_(), target, entropy=entropy, backend=backend)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in out if x is not None), logits)
    spoilt = [[False, True, False]]
    assert [x.isnan().tolist() for x in out if x is not None] == spoilt * (2 + entropy)
    assert gradient.isnan().all(-1).tolist() == [False, True, False]


def far_reference() -> PolicyInputs:
    """Tokens on both sides of the bound of k3, and far beyond it."""
    inputs = policy_inputs(flat(32, 130, torch.float32), "old_logp", "ref_logp", beta=0.5)
    inputs.options["ref_logp"] += torch.linspace(0, 60, 32)
    return inputs


def policy_loss_checks(op: Callable, backend: str) -> Iterator[Callable[[], None]]:
    def check(logits: torch.Tensor, *names: str, upstream: float = 1.0, **options):
        inputs = policy_inputs(logits, *names, masked=0.3, **options)
        return partial(
            check_policy_loss, op, inputs, device=DEVICE, backend=backend, upstream=upstream
        )

    yield as_operator(check(LAYOUTS["padded_vocabulary"](torch.float32), "old_logp"))
    yield check(flat(32, 130, torch.float32), *ALL, **EVERYTHING, **CLIP_HIGHER)
    yield check(flat(32, 130, torch.float32), "old_logp", "ref_logp", beta=0.1, kl_estimator="k1")
    yield check(flat(4, 130, torch.float32), "ref_logp", beta=0.5, kl_estimator="k2")
    yield partial(check_policy_loss, op, far_reference(), device=DEVICE, backend=backend)
    names = ("old_logp", "ref_logp")
    yield check(flat(32, 130, torch.float32), *names, beta=0.5, kl_estimator="k3_ratio")
    yield check(flat(4, 130, torch.float32), "mask", surrogate="reinforce", upstream=1.7)
    yield check(flat(2, 9001, torch.float32), "ref_logp", **EVERYTHING)
    yield check(flat(2, 20_000, torch.bfloat16), entropy_coef=0.1)
    inputs = policy_inputs(flat(4, 130, torch.float32), "old_logp")
    mask = inputs.options["mask"] = torch.tensor([True, False, True, False])
    inputs.logits[~mask] = float("nan")
    yield partial(check_policy_loss, op, inputs, device=DEVICE, backend=backend)
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        for num_items in (None, 7):
            options = {"loss_agg_mode": mode, "num_items": num_items}
            logits = LAYOUTS["shifted_by_one_token"](torch.float32)
            yield check(logits, "old_logp", "mask", **options)
    inputs = policy_inputs(batch(3, 4, 40, torch.float32), loss_agg_mode="seq-mean-token-sum")
    inputs.options["mask"] = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    yield partial(check_policy_loss, op, inputs, device=DEVICE, backend=backend)
    options = {"loss_agg_mode": "seq-mean-token-sum-norm", "norm_length": 12}
    yield check(batch(3, 5, 40, torch.float32), "mask", **options)


BATTERIES = {"token_logprob": token_logprob_checks, "policy_loss": policy_loss_checks}
