"""The rule by which results are judged: no worse than eager PyTorch at the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_no_worse_than_eager(
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    name: str,
    eps: float = EPS32,
    scale: float = 0.0,
    factor: float | None = None,
) -> None:
    """Holds RMS error(actual) <= factor * RMS error(eager) + 8 eps max(RMS(oracle), scale).

    `factor` is 1.1 in half precision, where all that errs is the last rounding, and 2 elsewhere,
    where two equally good orders of summation differ by so much.

    `eps` is the rounding of the arithmetic relative to the result: float32's, larger where the
    inputs are (a float32 logit of 1e4 is known to no better than 1e4 eps). `scale` is the size of
    the terms where they cancel. Infinite entries must agree exactly; a NaN never passes.
    """
    if factor is None:
        factor = 1.1 if actual.dtype in (torch.bfloat16, torch.float16) else 2.0
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}"
    actual, eager, oracle = (x.detach().double() for x in (actual, eager, oracle))
    finite = oracle.isfinite()
    assert not oracle.isnan().any(), f"{name}: the oracle itself is NaN"
    assert torch.equal(actual[~finite], oracle[~finite]), f"{name}: infinities differ"
    actual, eager, oracle = actual[finite], eager[finite], oracle[finite]
    bad = int((~actual.isfinite()).sum())
    assert not bad, f"{name}: {bad} of {actual.numel()} entries are not finite"
    error, baseline = rms(actual - oracle), rms(eager - oracle)
    bound = factor * baseline + 8 * eps * max(rms(oracle), scale)
    assert error <= bound, f"{name}: RMS error {error:.3e} > {bound:.3e} (eager {baseline:.3e})"


def assert_gradient_no_worse_than_eager(
    actual: Tensor, eager: Tensor, oracle: Tensor, target: Tensor, *, name: str, **judged
) -> None:
    """The same for dlogits (..., V), judged apart in the target's column and in all others."""
    columns = actual.shape[-1]
    is_target = torch.arange(columns, device=target.device) == target.unsqueeze(-1)
    for part, chosen in (("target column", is_target), ("other columns", ~is_target)):
        assert_no_worse_than_eager(
            actual[chosen], eager[chosen], oracle[chosen], name=f"{name}, {part}", **judged
        )
