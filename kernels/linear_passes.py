"""The passes of the fused head over its chunks: what runs between the checks and autograd.

A pass selects the rows that count, makes a chunk's logits, lets a row kernel turn them into
statistics or into their gradient, and gathers the products that follow.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import policy_loss as rows_policy
from . import token_logprob as rows_logprob
from .blocks import select_rows, statistics_dtype, without_autocast
from .linear_chunks import (
    Chunk,
    Gathered,
    Gradients3,
    KeptGradients,
    Run,
    at_rows,
    count_of,
    indices_of,
    store_rows,
    unit_of,
)
from .linear_products import Head, Products, gradient_dtype
from .linear_slices import SlicedGradient, Softmaxes, sliced_gradients
from .surrogates import SURROGATES, PolicyOptions, policy_terms


@without_autocast
def policy_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    per_token: list[Tensor | None],
    token_weight: Tensor,
    options: PolicyOptions,
    run: Run,
) -> tuple[list[Tensor | None], Gradients3]:
    """[loss, logp, entropy, kl, clipped], each (N,), and the gradients of the summed loss.

    per_token is [advantage, old_logp, ref_logp, importance_sampling_ratio].
    """
    products = Products(weight, bias)
    chunk = Chunk(products, run)
    like = {"dtype": statistics_dtype(hidden), "device": target.device}
    statistics = [torch.zeros(target.shape, **like) for _ in range(4)]
    statistics.append(torch.zeros(target.shape, dtype=torch.bool, device=target.device))
    unit = None
    if hidden.dtype == torch.float16 and len(target):
        unit = unit_of(token_weight)
        token_weight = token_weight / unit
    chunks = list(select_rows(token_weight != 0, len(target), run.plan.chunk_tokens))
    kept = kept_gradients(hidden, products, run, chunk, sum(map(count_of, chunks)))
    gathered = Gathered(hidden, products, run.needs, chunk, kept)
    for rows in chunks:
        hidden_rows, given = hidden[rows], at_rows(per_token, rows)
        z, dz = chunk.z[: len(hidden_rows)], chunk.dz[: len(hidden_rows)]
        run.head.cap_(products.logits(hidden_rows, z))
        parts = rows_policy._forward_backward(
            run.backend, z, dz, target[rows], *given, token_weight[rows], options,
            run.head.row_temperature,
        )  # fmt: skip
        store_rows(statistics, rows, parts)
        if kept is not None:
            made = (parts, hidden_rows, z, target[rows], given, token_weight[rows], options, run)
            kept.expect(len(hidden_rows), partial(_policy_softmaxes, *made))
        ds = run.head.uncap_(dz, z)
        gathered.add(ds, hidden_rows, rows, _flows(given, parts[-1], options))
    if unit is not None:
        statistics[0] *= unit
    if per_token[2] is None:
        statistics[3] = None
    return statistics, gathered.finish(unit, gradient_dtype(weight.dtype))


def kept_gradients(hidden, products, run: Run, chunk: Chunk, coming: int) -> KeptGradients | None:
    """For a dweight of low precision, which is made of all tokens at the end."""
    if not (run.needs[1] and run.plan.dz_tokens):
        return None
    return KeptGradients(hidden, products, run, chunk, coming)


def softmaxes_of(hidden, z, target, run: Run, entropy, dlogp, dentropy) -> Softmaxes:
    """What makes the gradient of a chunk's logits z again."""
    logp, _, _, row_max, log_sum = rows_logprob._forward(
        z, target, None, run.head.row_temperature, False, run.backend, True
    )
    return Softmaxes(hidden, target, logp, row_max, log_sum, entropy, dlogp, None, dentropy)


def _policy_softmaxes(parts, hidden, z, target, given, token_weight, options, run) -> Softmaxes:
    _, logp, entropy, _, _ = parts
    advantage, *others = given
    terms = policy_terms(logp, entropy, advantage, *others, options)
    dentropy = -options.entropy_coef * token_weight if options.entropy_coef else None
    entropy = entropy if options.entropy_coef else None
    return softmaxes_of(hidden, z, target, run, entropy, terms.dlogp * token_weight, dentropy)


def _flows(given: list[Tensor | None], clipped: Tensor, options: PolicyOptions) -> Tensor | None:
    """Rows that may have a gradient, or None where all may."""
    if options.beta or options.entropy_coef:
        return None
    advantage, _, _, ratio = given
    flows = ~clipped
    if SURROGATES[options.surrogate].needs_advantage:
        flows &= advantage != 0
    return flows if ratio is None else flows & (ratio != 0)


@without_autocast
def logprob_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    with_entropy: bool,
    run: Run,
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """[logp, entropy, lse, row_max, log_sum], each (N,) or None, and what the plan keeps."""
    products = Products(weight, bias)
    chunk = Chunk(products, run, run.plan.strategy == "unit-gradient")
    like = {"dtype": statistics_dtype(hidden), "device": target.device}
    present = (True, with_entropy, True, True, True)
    statistics = [torch.zeros(target.shape, **like) if p else None for p in present]
    saved = ()
    if run.plan.strategy == "kept-logits":
        saved = (chunk.z,)  # one chunk holds every counted token
    if run.plan.strategy == "unit-gradient":
        saved = (torch.zeros(hidden.shape, **like), torch.ones(target.shape, **like))
    for rows in select_rows(mask, len(target), run.plan.chunk_tokens):
        hidden_rows = hidden[rows]
        z = chunk.z[: len(hidden_rows)]
        run.head.cap_(products.logits(hidden_rows, z))
        parts = rows_logprob._forward(
            z, target[rows], None, run.head.row_temperature, with_entropy, run.backend,
            run.plan.strategy in ("kept-logits", "recompute"),
        )  # fmt: skip
        store_rows(statistics, rows, parts)
        if run.plan.strategy == "unit-gradient":
            dz = chunk.dz[: len(z)]
            _keep_unit_gradient(saved, rows, z, dz, target[rows], parts, products, run)
    return statistics, saved


def _keep_unit_gradient(saved, rows, z, dz, target, parts, products, run: Run) -> None:
    """Stores dlse/dhidden = p W / T of a chunk, and the softcap's slope at the targets."""
    unit_gradient, slope = saved
    if run.head.softcap is not None:
        inside = target.long().clamp(0, z.shape[-1] - 1)
        chosen = z.gather(-1, inside[:, None]).squeeze(-1)
        slope[rows] = 1 - (chosen / run.head.softcap).square()
    _, entropy, _, row_max, log_sum = parts
    rows_logprob._backward(
        run.backend, z, dz, target, None, entropy, row_max, log_sum,
        None, torch.ones_like(parts[0]), None, run.head.row_temperature,
    )  # fmt: skip
    unit_gradient[rows] = products.dhidden(run.head.uncap_(dz, z)).to(unit_gradient.dtype)


def scale_unit_gradient(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    saved: tuple[Tensor, Tensor],
    dlogp: Tensor | None,
    dlse: Tensor | None,
    head: Head,
) -> Tensor:
    """dhidden = dlogp (W[target] slope scale / T - dlse/dhidden) + dlse (dlse/dhidden)."""
    unit_gradient, slope = saved
    zero = torch.zeros_like(slope)
    dlogp, dlse = (zero if g is None else torch.where(mask, g, 0.0) for g in (dlogp, dlse))
    at_target = dlogp * slope * (head.logit_scale / head.temperature)
    # a counted target out of range has made its row NaN already: nothing outside may be read
    inside = torch.where(mask, target, 0).long().clamp(0, weight.shape[0] - 1)
    dhidden = (dlse - dlogp)[:, None] * unit_gradient
    return dhidden.add_(weight[inside] * at_target[:, None]).to(weight.dtype)


@without_autocast
def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    statistics: list[Tensor | None],
    kept: Tensor | None,
    given: list[Tensor | None],
    run: Run,
) -> Gradients3:
    """The gradients, from those given of (logp, lse, entropy), a slice of the vocabulary at a time.

    statistics is [logp, entropy, row_max, log_sum]. `kept` holds the logits of the rows that the
    mask counts, in their order, or is None: then the logits are made again.
    """
    unit = None
    if hidden.dtype == torch.float16 and len(target):
        unit = unit_of(*(None if g is None else torch.where(mask, g, 0.0) for g in given))
        given = [None if g is None else g / unit for g in given]
    flows = mask & torch.stack([g != 0 for g in given if g is not None]).any(0)
    rows = next(select_rows(flows, len(target), max(len(target), 1)), slice(0, 0))
    logp, entropy, row_max, log_sum = statistics
    dlogp, dlse, dentropy = given
    whole = Softmaxes(
        hidden, target, logp, row_max, log_sum, None if dentropy is None else entropy, dlogp, dlse,
        dentropy,
    )  # fmt: skip
    sliced = SlicedGradient(whole.at(rows), Products(weight, bias), run.head, run.backend)
    place = None if kept is None else (mask.cumsum(0) - 1)[rows]
    dhidden, dweight, dbias = sliced_gradients(
        sliced, kept, place, run.needs, run.plan.slice_columns, unit
    )  # fmt: skip
    if dhidden is not None and len(dhidden) != len(hidden):
        whole = hidden.new_zeros(hidden.shape)
        dhidden = whole.index_copy_(0, indices_of(rows, hidden.device), dhidden)
    return [dhidden, dweight, dbias]
