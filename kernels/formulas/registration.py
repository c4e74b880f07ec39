"""Surrogates of a user's own: checked against autograd, then in the table like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..backend import HAS_TRITON, INTERPRETED, tl, triton
from .surrogates import LEVELS, SURROGATES, Surrogate

POINTS = 256
# what the formulas are tried with where a parameter has no default
TRIED = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": 3.0}
TRIED_OTHERWISE = 0.7


def register_surrogate(
    name: str,
    torch_formula: Callable[..., tuple[Tensor, Tensor, Tensor]],
    triton_formula: Callable | None = None,
    *,
    parameters: tuple[str, ...] = (),
    defaults: Mapping[str, float] | None = None,
    levels: tuple[str, ...] = LEVELS,
) -> None:
    """Adds a surrogate that `policy_loss` and its kin then know by `name`.

    A formula is f(logp, old_logp, advantage, parameters) -> (loss, dloss/dlogp, clipped),
    elementwise; parameters is a tuple of numbers. clipped must be true only where the derivative
    is 0. Detach what is to be a constant: calls without a fused kernel differentiate the loss.

    Args:
        torch_formula: in PyTorch, on tensors of any shape. It serves the torch backend at once,
            and Triton's as well, in two passes, where there is no twin.
        triton_formula: its twin on a token's scalars, decorated with `triton.jit`, for the
            one-launch kernels.
        parameters: names in order: "epsilon", "epsilon_high" and "delta" are the arguments of
            every policy loss, the others come from surrogate_params.
        defaults: values of those others; one without a default must be passed with every call.
        levels: the importance_sampling_levels that make sense of it.

    Raises:
        ValueError: the name is taken; a formula returns the wrong thing, is not elementwise, or
            its derivative is not the loss's (by autograd, at random points in float64); the twin
            disagrees with it (tried where Triton runs); a default belongs to no parameter.
    """
    if name in SURROGATES:
        raise ValueError(f"surrogate {name!r} is taken: choose another name")
    defaults = dict(defaults or {})
    unknown = [p for p in defaults if p not in parameters or p in TRIED]
    if unknown:
        raise ValueError(
            f"defaults may hold {[p for p in parameters if p not in TRIED]}, got {unknown}"
        )
    if not levels or any(level not in LEVELS for level in levels):
        raise ValueError(f"levels must be some of {LEVELS}, got {levels}")
    values = tuple(float((TRIED | defaults).get(p, TRIED_OTHERWISE)) for p in parameters)
    _check_formula(name, torch_formula, values)
    if triton_formula is not None:
        _check_twin(name, torch_formula, triton_formula, values)
    logp, old_logp, advantage = _points(torch.float64)
    idle = torch_formula(logp, old_logp, 0 * advantage, values)[1]
    SURROGATES[name] = Surrogate(
        torch_formula, triton_formula, tuple(parameters), defaults,
        needs_advantage=not idle.any(), levels=tuple(levels),
    )  # fmt: skip


def _points(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """logp, old_logp and advantages of both signs, with ratios from 0.2 to 5."""
    generator = torch.Generator().manual_seed(0)
    u, v, w = torch.rand(3, POINTS, generator=generator, dtype=torch.float64)
    old_logp = -0.1 - 4 * u
    logp = (old_logp + 3.2 * (v - 0.5)).clamp(max=-1e-3)
    return [x.to(device, dtype) for x in (logp, old_logp, 4 * (w - 0.5))]


def _check_formula(name: str, formula: Callable, values: tuple[float, ...]) -> None:
    logp, old_logp, advantage = _points(torch.float64)
    logp.requires_grad_()
    parts = formula(logp, old_logp, advantage, values)
    _check_parts(name, parts, logp)
    loss, dlogp, clipped = parts
    want = torch.zeros_like(logp)
    if loss.requires_grad:
        (want,) = torch.autograd.grad(loss.sum(), logp)
    _compare(name, "its derivative is not that of its loss", dlogp.detach(), want, 1e-7)
    if dlogp[clipped].any():
        raise ValueError(
            f"surrogate {name!r}: clipped is true where the derivative is not 0; clipped means "
            "that the clip holds the gradient at zero"
        )
    few = formula(logp[:3].detach(), old_logp[:3], advantage[:3], values)[0]
    _compare(name, "a token's loss depends on the other tokens", few, loss[:3].detach(), 1e-7)


def _check_parts(name: str, parts: object, logp: Tensor) -> None:
    is_three = isinstance(parts, tuple) and len(parts) == 3
    if not is_three or any(not isinstance(p, Tensor) or p.shape != logp.shape for p in parts):
        raise ValueError(
            f"surrogate {name!r} must return a tuple (loss, dlogp, clipped) of tensors of logp's "
            "shape"
        )
    if parts[2].dtype != torch.bool:
        raise ValueError(f"surrogate {name!r} must return a bool clipped, got {parts[2].dtype}")


def _check_twin(name: str, formula: Callable, twin: Callable, values: tuple[float, ...]) -> None:
    if not HAS_TRITON:
        return
    if not hasattr(twin, "fn"):
        raise ValueError(f"triton_formula of {name!r} must be decorated with triton.jit")
    if not INTERPRETED and not torch.cuda.is_available():
        return
    points = _points(torch.float32, "cpu" if INTERPRETED else "cuda")
    loss, dlogp = torch.empty_like(points[0]), torch.empty_like(points[0])
    clipped = torch.empty(POINTS, dtype=torch.bool, device=loss.device)
    _formula_kernel[(POINTS,)](
        *points, loss, dlogp, clipped, values or (0.0,), FORMULA=twin, enable_fp_fusion=True
    )
    want = formula(*points, values)
    for part, got, expected in zip(("loss", "dlogp"), (loss, dlogp), want, strict=False):
        _compare(name, f"triton_formula's {part} is not torch_formula's", got, expected, 1e-4)
    _compare(name, "triton_formula clips other tokens", clipped.float(), want[2].float(), 0.0)


@triton.jit
def _formula_kernel(
    Logp, OldLogp, Advantage, Loss, Dlogp, Clipped, parameters, FORMULA: tl.constexpr
):
    token = tl.program_id(0)
    loss, dlogp, clipped = FORMULA(
        tl.load(Logp + token), tl.load(OldLogp + token), tl.load(Advantage + token), parameters
    )
    tl.store(Loss + token, loss)
    tl.store(Dlogp + token, dlogp)
    tl.store(Clipped + token, clipped)


def _compare(name: str, message: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got - want).abs()
    wrong = ~(error <= tolerance * (1 + want.abs()))
    if wrong.any():
        worst = int(wrong.to(torch.float64).mul(error.nan_to_num(torch.inf)).nan_to_num(0).argmax())
        raise ValueError(
            f"surrogate {name!r}: {message}, at {int(wrong.sum())} of {len(got)} random points; "
            f"at one {got[worst].item():.6g} instead of {want[worst].item():.6g}"
        )
