"""The passes of the fused head over its chunks: what runs between the checks and autograd.

A pass selects the rows that count, makes a chunk's logits, lets a row kernel turn them into
statistics or into their gradient, and gathers the products that follow.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..blocks import (
    RowGradients,
    RowStatistics,
    select_rows,
    statistics_dtype,
    without_autocast,
)
from ..formulas.surrogates import SURROGATES, PerToken, PolicyOptions, policy_terms
from ..implementation import implementation
from .chunks import (
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
from .products import Head, Products, gradient_dtype
from .slices import SlicedGradient, Softmaxes, sliced_gradients


@without_autocast
def policy_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    per_token: PerToken,
    token_weight: Tensor,
    options: PolicyOptions,
    run: Run,
) -> tuple[list[Tensor | None], Gradients3]:
    """[loss, logp, entropy, kl, clipped], each (N,), and the gradients of the summed loss."""
    products = Products(weight, bias)
    chunk = Chunk(products, run)
    like = {"dtype": statistics_dtype(hidden), "device": target.device}
    statistics = [torch.zeros(target.shape, **like) for _ in range(4)]
    statistics.append(torch.zeros(target.shape, dtype=torch.bool, device=target.device))
    chunks = list(select_rows(token_weight != 0, len(target), run.plan.chunk_tokens))
    kept = kept_gradients(hidden, products, run, chunk, sum(map(count_of, chunks)))
    gathered = Gathered(hidden, products, run.needs, chunk, kept)
    leaves_out = _may_leave_tokens_out(per_token, options)
    for rows in chunks:
        hidden_rows, given = hidden[rows], PerToken(*at_rows(per_token, rows))
        z, dz = chunk.z[: len(hidden_rows)], chunk.dz[: len(hidden_rows)]
        run.head.cap_(products.logits(hidden_rows, z))
        parts, unit = _policy_rows(z, dz, target[rows], given, token_weight[rows], options, run)
        store_rows(statistics, rows, parts)
        if kept is not None:
            made = (parts, hidden_rows, z, target[rows], given, token_weight[rows], options, run)
            kept.expect(len(hidden_rows), partial(_policy_softmaxes, *made))
        ds = run.head.uncap_(dz, z)
        flows = _flows(given, parts[-1], options) if leaves_out else None
        gathered.add(ds, hidden_rows, rows, flows, unit)
    if per_token.ref_logp is None:
        statistics[3] = None
    return statistics, gathered.finish(gradient_dtype(weight.dtype))


def _policy_rows(
    z, dz, target, given, token_weight, options, run: Run
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """(loss, logp, entropy, kl, clipped) of a chunk; the unit that its gradient, in dz, is over."""
    temperature, rows = run.head.row_temperature, implementation(run.backend)
    if dz.dtype != torch.float16:
        parts = rows.policy_loss_forward_backward(
            z, dz, target, *given, token_weight, options, temperature
        )
        return parts, None
    # a unit follows from the derivatives, which follow from logp: not in one launch
    statistics = rows.token_logprob_forward(z, target, None, temperature, True)
    terms = policy_terms(statistics.logp, statistics.entropy, *given, options)
    gradients = _derivatives(terms, token_weight, options)
    unit = unit_of(run.head, gradients.dlogp, gradients.dentropy)
    rows.token_logprob_backward(z, dz, target, None, statistics, gradients.over(unit), temperature)
    loss = terms.loss * token_weight
    return (loss, statistics.logp, statistics.entropy, terms.kl, terms.clipped), unit


def _derivatives(terms, token_weight, options) -> RowGradients:
    """dloss/dlogp and, where there is an entropy bonus, dloss/dentropy."""
    dentropy = -options.entropy_coef * token_weight if options.entropy_coef else None
    return RowGradients(terms.dlogp * token_weight, dentropy)


def kept_gradients(hidden, products, run: Run, chunk: Chunk, coming: int) -> KeptGradients | None:
    """For a dweight of low precision, which is made of all tokens at the end."""
    if not (run.needs[1] and run.plan.dz_tokens):
        return None
    return KeptGradients(hidden, products, run, chunk, coming)


def softmaxes_of(
    hidden, z, target, run: Run, entropy: Tensor | None, gradients: RowGradients
) -> Softmaxes:
    """What makes the gradient of a chunk's logits z again."""
    statistics = implementation(run.backend).token_logprob_forward(
        z, target, None, run.head.row_temperature, False, True
    )
    return Softmaxes.of(hidden, target, statistics._replace(entropy=entropy), gradients)


def _policy_softmaxes(parts, hidden, z, target, given, token_weight, options, run) -> Softmaxes:
    _, logp, entropy, _, _ = parts
    gradients = _derivatives(policy_terms(logp, entropy, *given, options), token_weight, options)
    entropy = None if gradients.dentropy is None else entropy
    return softmaxes_of(hidden, z, target, run, entropy, gradients)


def _may_leave_tokens_out(per_token: PerToken, options: PolicyOptions) -> bool:
    """Whether to look in every chunk for tokens without a gradient, to take no product of them.

    A GPU waits for the answer each time: there only where an advantage or a ratio is 0, as clipped
    tokens alone are few.
    """
    if options.beta or options.entropy_coef:
        return False
    advantage, ratio = per_token.advantage, per_token.importance_sampling_ratio
    if advantage.device.type == "cpu":
        return True
    factors = [advantage] if SURROGATES[options.surrogate].needs_advantage else []
    factors += [] if ratio is None else [ratio]
    return bool(factors) and not torch.stack(factors).all()


def _flows(given: PerToken, clipped: Tensor, options: PolicyOptions) -> Tensor:
    """Rows that may have a gradient, where neither a KL nor an entropy bonus gives all one."""
    ratio, flows = given.importance_sampling_ratio, ~clipped
    if SURROGATES[options.surrogate].needs_advantage:
        flows &= given.advantage != 0
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
) -> tuple[RowStatistics, tuple[Tensor, ...]]:
    """The statistics, each (N,) or None, and what the plan keeps."""
    products = Products(weight, bias)
    chunk = Chunk(products, run, run.plan.strategy == "unit-gradient")
    like = {"dtype": statistics_dtype(hidden), "device": target.device}
    present = RowStatistics(True, with_entropy, True, True, True)
    statistics = RowStatistics(*(torch.zeros(target.shape, **like) if p else None for p in present))
    saved = ()
    if run.plan.strategy == "kept-logits":
        saved = (chunk.z,)  # one chunk holds every counted token
    if run.plan.strategy == "unit-gradient":
        saved = (torch.zeros(hidden.shape, **like), torch.ones(target.shape, **like))
    for rows in select_rows(mask, len(target), run.plan.chunk_tokens):
        hidden_rows = hidden[rows]
        z = chunk.z[: len(hidden_rows)]
        run.head.cap_(products.logits(hidden_rows, z))
        parts = implementation(run.backend).token_logprob_forward(
            z, target[rows], None, run.head.row_temperature, with_entropy,
            run.plan.strategy in ("kept-logits", "recompute"),
        )  # fmt: skip
        store_rows(statistics, rows, parts)
        if run.plan.strategy == "unit-gradient":
            dz = chunk.dz[: len(z)]
            _keep_unit_gradient(saved, rows, z, dz, target[rows], parts, products, run)
    return statistics, saved


def _keep_unit_gradient(
    saved, rows, z, dz, target, statistics: RowStatistics, products, run: Run
) -> None:
    """Stores -dlogp/dhidden = (p - 1[target]) W / T of a chunk, and the softcap's slope at targets.

    1 - p is rounded, not p: of a sure token, p in low precision would leave nothing.
    """
    unit_gradient, slope = saved
    if run.head.softcap is not None:
        inside = target.long().clamp(0, z.shape[-1] - 1)
        chosen = z.gather(-1, inside[:, None]).squeeze(-1)
        slope[rows] = 1 - (chosen / run.head.softcap).square()
    dlogp = -torch.ones_like(statistics.logp)
    unit = unit_of(run.head, dlogp) if dz.dtype == torch.float16 else None
    implementation(run.backend).token_logprob_backward(
        z, dz, target, None, statistics, RowGradients(dlogp).over(unit), run.head.row_temperature
    )
    dhidden = products.dhidden(run.head.uncap_(dz, z))
    unit_gradient[rows] = (dhidden if unit is None else dhidden * unit).to(unit_gradient.dtype)


def scale_unit_gradient(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    saved: tuple[Tensor, Tensor],
    gradients: RowGradients,
    head: Head,
) -> Tensor:
    """dhidden = (dlse - dlogp) u + dlse W[target] slope scale / T, with u = -dlogp/dhidden."""
    unit_gradient, slope = saved
    zero = torch.zeros_like(slope)
    dlogp, _, dlse = gradients
    dlogp, at_target = (zero if g is None else torch.where(mask, g, 0.0) for g in (dlogp, dlse))
    dhidden = (at_target - dlogp)[:, None] * unit_gradient
    if dlse is not None:
        at_target = at_target * slope * (head.logit_scale / head.temperature)
        # a counted target out of range has made its row NaN already: nothing outside may be read
        inside = torch.where(mask, target, 0).long().clamp(0, weight.shape[0] - 1)
        dhidden.add_(weight[inside] * at_target[:, None])
    return dhidden.to(weight.dtype)


@without_autocast
def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    statistics: RowStatistics,
    kept: Tensor | None,
    gradients: RowGradients,
    run: Run,
) -> Gradients3:
    """The inputs' gradients, from the statistics', a slice of the vocabulary at a time.

    `kept` holds the logits of the rows that the mask counts, in their order, or is None: then the
    logits are made again.
    """
    unit = None
    if hidden.dtype == torch.float16:
        masked = (None if g is None else torch.where(mask, g, 0.0) for g in gradients)
        unit = unit_of(run.head, *masked)
        gradients = gradients.over(unit)
    flows = mask & torch.stack([g != 0 for g in gradients if g is not None]).any(0)
    rows = next(select_rows(flows, len(target), max(len(target), 1)), slice(0, 0))
    if gradients.dentropy is None:
        statistics = statistics._replace(entropy=None)
    whole = Softmaxes.of(hidden, target, statistics, gradients)
    sliced = SlicedGradient(whole.at(rows), Products(weight, bias), run.head, run.backend)
    place = None if kept is None else (mask.cumsum(0) - 1)[rows]
    dhidden, dweight, dbias = sliced_gradients(
        sliced, kept, place, run.needs, run.plan.slice_columns, unit
    )  # fmt: skip
    if dhidden is not None and len(dhidden) != len(hidden):
        whole = hidden.new_zeros(hidden.shape)
        dhidden = whole.index_copy_(0, indices_of(rows, hidden.device), dhidden)
    return [dhidden, dweight, dbias]
