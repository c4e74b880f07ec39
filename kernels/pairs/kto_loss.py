"""Losses of answers that are good or bad by themselves, from their log-probabilities.

    loss = mean over answers of  weight(label) * formula(log-ratio, reference point)

The formulas stand in formulas/unpaired_losses.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    check_denominators,
    check_finite,
    check_name,
    check_numbers,
    check_positive,
    checks_types,
)
from ..formulas.unpaired_losses import UNPAIRED_LOSSES
from ..limits import log_ratio
from .preference_loss import wide_dtype


@checks_types
def kto_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    kl: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """KTO on answers that are good or bad by themselves (Ethayarajh et al. 2024, arXiv:2402.01306).

    With r = logp - ref_logp: 1 - sigmoid(beta (r - kl)) for a desirable answer, 1 - sigmoid(beta
    (kl - r)) for an undesirable one, weighted; of the loss_type "apo_zero_unpaired" without kl.

    Args:
        logp, ref_logp: (B,) summed log-probabilities; gradients flow to logp alone.
        desirable: (B,) bool.
        loss_type: a key of UNPAIRED_LOSSES: "kto" or "apo_zero_unpaired".
        kl: the reference point, an estimate of KL(policy || reference) in nats, detached and not
            below 0: the mean log-ratio of answers to other prompts. 0 for "apo_zero_unpaired".
        beta, desirable_weight, undesirable_weight: positive.
        num_items: replaces B in the denominator.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, desirable not bool, an unknown loss_type, a parameter that
        is not positive, a kl that the loss has no use for.
    """
    check_name("loss_type", loss_type, UNPAIRED_LOSSES)
    row = UNPAIRED_LOSSES[loss_type]
    if not row.uses_kl and (isinstance(kl, Tensor) or kl != 0):
        raise ValueError(f"loss_type {loss_type} has no reference point: leave kl 0")
    numbers = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    check_positive(**numbers)
    check_finite(**numbers)
    check_denominators(num_items=num_items)
    if logp.dim() != 1:
        raise ValueError(f"logp must have shape (B,), one sum an answer, got {tuple(logp.shape)}")
    for name, tensor in (("ref_logp", ref_logp), ("desirable", desirable)):
        if tensor.shape != logp.shape:
            raise ValueError(
                f"{name} must have the shape of logp, {tuple(logp.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    logp = logp.to(wide_dtype(logp))
    if not isinstance(kl, Tensor):
        check_numbers(kl=kl)
        check_finite(kl=kl)
    kl = torch.as_tensor(kl, dtype=logp.dtype, device=logp.device).detach().clamp(min=0)
    if kl.dim() and kl.shape != logp.shape:
        raise ValueError(
            f"kl must be a number or have the shape of logp, {tuple(logp.shape)}, got "
            f"{tuple(kl.shape)}"
        )
    ratio = log_ratio(logp, ref_logp.detach().to(logp.dtype))
    weight = torch.full_like(ratio, undesirable_weight).masked_fill(desirable, desirable_weight)
    loss = weight * row.formula(ratio, kl, desirable, beta)
    return loss.sum() / (max(len(logp), 1) if num_items is None else num_items)
