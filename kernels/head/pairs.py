"""Preference losses from hidden states: a pair's logits at a time, and its gradient at once.

    L = sum_b formula(sum_t w_t logp_t of chosen b, of rejected b);   dL/dlogp_t = w_t dL/d(its sum)

A pair's loss asks about that pair alone. So the chunks are whole pairs: their logits are made, the
sums and the formula's derivative follow, and the row kernel turns the same logits into their
gradient: 6 N H V operations, nothing recomputed. Where a pair is longer than the budget, or the
loss couples the pairs, logp comes from `linear_token_logprob`, by its plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import resolve_backend
from ..blocks import RowGradients, statistics_dtype, without_autocast
from ..checks import check_rows, check_targets_in_range, checks_types
from ..formulas.pair_losses import Parameters
from ..implementation import implementation
from ..pairs.answers import Answers, beyond_shorter, summed, wpo_weight
from ..pairs.preference_loss import PreferenceLoss, PreferenceOptions, preference_options
from ..rows.token_logprob import TokenLogprob
from .autograd import scaled
from .chunks import Chunk, Gathered, Gradients3, Run, unit_of
from .inputs import prepare_head
from .plan import LinearPlan, make_plan
from .products import Products, gradient_dtype
from .token_passes import kept_gradients, softmaxes_of
from .tokens import is_plain, needs_of, prepared_token_logprob


@checks_types(options=Parameters, defaults=asdict(Parameters()))
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    use_weighting: bool = False,
    ld_alpha: float | None = None,
    num_items: int | float | Tensor | None = None,
    backend: str | None = None,
    **parameters: float,
) -> PreferenceLoss:
    """`preference_loss` of a head's logits, from its input, without the logits.

    The head's arguments are those of `linear_token_logprob`, the losses' those of
    `preference_loss`. Pairs are gone through a few at a time: 6 N H V operations, nothing
    recomputed (but in bfloat16 and float16 beyond the budget, as in `linear_policy_loss`), where a
    pair's logits fit `chunk_bytes` and the loss does not couple pairs ("aot" does); else by the
    plan of `linear_token_logprob` (`plan_linear` shows it).

    Args:
        hidden: (2B, T, H), rows [chosen; rejected]: B chosen answers, then their rivals in order.
        target, mask: (2B, T); masked tokens (prompts, padding) cost no product.
        ref_logp: (2B,) the reference's summed log-probabilities; or None and
        ref_hidden, ref_weight, ref_bias: its own hidden states and head, asked here without a
            gradient. Losses without a reference take neither.
        use_weighting: weigh pairs by how likely the policy itself finds both answers (WPO, Zhou et
            al. 2024, arXiv:2406.11827, with each token's probability over sum_j p_j^2).
        ld_alpha: weight in [0, 1] of the log-probabilities of what an answer has beyond the
            shorter one's length (LD-DPO, Liu et al. 2024, arXiv:2409.06411). A given ref_logp has
            to be such a sum too.

    Returns:
        PreferenceLoss; the loss is differentiable (once) in hidden, weight and bias. The
        log-probabilities are weighted by ld_alpha where that is given.

    Raises:
        ValueError: as in `preference_loss` and `linear_token_logprob`; rows that are no pairs;
            ref_logp and ref_hidden both given, or neither where the loss has a reference.
    """
    options = preference_options(
        loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, **parameters
    )
    _check_rows_are_pairs(
        hidden, target, mask, ref_logp, ref_hidden, ref_weight, options, temperature
    )
    backend = resolve_backend(backend, hidden)
    form = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    asked = {"target": target, "mask": mask, "chunk_bytes": chunk_bytes, "backend": backend}
    token_weight = beyond_shorter(mask, ld_alpha)
    if ref_hidden is not None:
        with torch.no_grad():
            reference = prepare_head(ref_hidden, ref_weight, ref_bias, **form)
            ref_logp = summed(_logprob(reference, **asked).logp, token_weight)
    prepared = prepare_head(hidden, weight, bias, **form)
    pair_weight = None
    if use_weighting:
        *tensors, head = prepared

        def ask(temperature: float) -> TokenLogprob:
            return _logprob((*tensors, replace(head, temperature=temperature)), **asked)

        pair_weight = wpo_weight(ask, mask, head.temperature)
    answers = Answers(mask, token_weight, ref_logp, pair_weight, num_items)
    return _preference(prepared, answers, options, asked)


def _logprob(prepared, *, target, mask, chunk_bytes, backend) -> TokenLogprob:
    return prepared_token_logprob(
        *prepared, target, mask, entropy=False, entropy_gradient=False, chunk_bytes=chunk_bytes,
        backend=backend,
    )  # fmt: skip


def _preference(prepared, answers: Answers, options, asked) -> PreferenceLoss:
    """One pass over pairs where that can be, else the composed way."""
    *tensors, head = prepared
    target, backend = asked["target"], asked["backend"]
    needs, plan = needs_of(*tensors), None
    # first, as a traced call has no numbers for a plan to read
    if is_plain(*tensors, target, answers.mask) and not options.couples_pairs:
        plan = plan_pairs(
            *tensors[:2], answers.mask.sum(1), needs, chunk_bytes=asked["chunk_bytes"],
            separate_gradient=head.softcap is not None,
        )  # fmt: skip
    if plan is None:
        return answers.preference_loss(_logprob(prepared, **asked).logp, options)
    check_targets_in_range(target, answers.mask, len(tensors[1]), backend)
    loss, *rest = _LinearPreferenceLoss.apply(
        *tensors, target.reshape(-1), answers, options, Run(head, plan, needs, backend)
    )
    return PreferenceLoss(loss, *rest)


def plan_pairs(
    hidden: Tensor,
    weight: Tensor,
    counts: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    chunk_bytes: int | None,
    separate_gradient: bool = False,
) -> LinearPlan | None:
    """The plan of one pass over pairs with `counts` (2B,) tokens; None where a pair is too long."""
    if not any(needs):
        return None
    make = partial(
        make_plan, hidden, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=False,
        separate_gradient=separate_gradient,
    )  # fmt: skip
    plan, pairs = make(), counts.view(2, -1).sum(0)
    longest = int(pairs.max()) if pairs.numel() else 0
    if longest > plan.most_tokens:
        return None
    groups = _groups(counts, plan.chunk_tokens)
    return make(chunk_tokens=max([int(pairs[group].sum()) for group in groups] + [1]))


def _groups(counts: Tensor, most: int) -> list[slice]:
    """Consecutive pairs, as many as have at most `most` tokens together, or one that has more."""
    groups, start, held = [], 0, 0
    for pair, tokens in enumerate(counts.view(2, -1).sum(0).tolist()):
        if held and held + tokens > most:
            groups.append(slice(start, pair))
            start, held = pair, 0
        held += tokens
    return [*groups, slice(start, counts.numel() // 2)]


class _LinearPreferenceLoss(torch.autograd.Function):
    """The forward makes the gradients, the backward scales and hands them out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *arguments):
        statistics, gradients = preference_pass(hidden, weight, bias, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*statistics[1:])
        ctx.set_materialize_grads(False)
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 7
        return *scaled(ctx.saved_tensors, dloss), None, None, None, None


@without_autocast
def preference_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    answers: Answers,
    options: PreferenceOptions,
    run: Run,
) -> tuple[list[Tensor], Gradients3]:
    """[loss, chosen_reward, rejected_reward, chosen_logp, rejected_logp] and the gradients."""
    products = Products(weight, bias)
    half, length = len(answers.mask) // 2, answers.mask.shape[1]
    groups = _groups(answers.mask.sum(1), run.plan.chunk_tokens)
    chunk = Chunk(products, run)
    kept = kept_gradients(hidden, products, run, chunk, int(answers.mask.sum()))
    gathered = Gathered(hidden, products, run.needs, chunk, kept)
    like = {"dtype": statistics_dtype(hidden), "device": hidden.device}
    loss, per_pair = torch.zeros((), **like), torch.zeros(4, half, **like)
    low = hidden.dtype == torch.float16
    for pairs in groups:
        owners = torch.cat([torch.arange(half)[pairs], torch.arange(half)[pairs] + half])
        local = answers.mask[owners].nonzero()
        rows = (owners.to(local.device)[local[:, 0]] * length + local[:, 1]).to(hidden.device)
        hidden_rows = hidden[rows]
        z, dz = chunk.z[: len(rows)], chunk.dz[: len(rows)]
        run.head.cap_(products.logits(hidden_rows, z))
        statistics = implementation(run.backend).token_logprob_forward(
            z, target[rows], None, run.head.row_temperature, False
        )
        weights = None if answers.token_weight is None else answers.token_weight[owners]
        weights = None if weights is None else weights[local[:, 0], local[:, 1]].to(loss.dtype)
        group_loss, rewards, sums, dlogp = _group_loss(
            statistics.logp, local[:, 0], answers.mask[owners].sum(1), weights, answers, options,
            pairs,
        )  # fmt: skip
        loss += group_loss
        per_pair[:, pairs] = torch.stack([*rewards, *sums.chunk(2)])
        unit = unit_of(run.head, dlogp) if low else None
        gradients = RowGradients(dlogp)
        implementation(run.backend).token_logprob_backward(
            z, dz, target[rows], None, statistics, gradients.over(unit), run.head.row_temperature
        )
        if kept is not None:
            made = (hidden_rows, z, target[rows], run, None, gradients)
            kept.expect(len(rows), partial(softmaxes_of, *made))
        gathered.add(run.head.uncap_(dz, z), hidden_rows, rows, dlogp != 0, unit)
    return [loss, *per_pair], gathered.finish(gradient_dtype(weight.dtype))


@torch.enable_grad()
def _group_loss(logp, owner, counts, weights, answers, options, pairs):
    """(loss, rewards, sums (2b,), dloss/dlogp of each token) of a group of pairs."""
    weighted = logp if weights is None else logp * weights
    # segment by segment and in order: index_add would add up in any order on a GPU. In float64,
    # as one addend after the other loses digits by the thousands that an answer has
    sums = torch.segment_reduce(weighted.double(), "sum", lengths=counts, initial=0, unsafe=True)
    sums = sums.to(weighted.dtype).requires_grad_()
    loss, *rewards = answers.loss(sums, options, pairs)
    (dsums,) = torch.autograd.grad(loss, sums)
    dlogp = dsums[owner] if weights is None else dsums[owner] * weights
    return loss.detach(), rewards, sums.detach(), dlogp


def _check_rows_are_pairs(
    hidden, target, mask, ref_logp, ref_hidden, ref_weight, options: PreferenceOptions, temperature
) -> None:
    if hidden.dim() != 3 or len(hidden) % 2:
        raise ValueError(
            f"hidden must have shape (2B, T, H), rows [chosen; rejected], got {tuple(hidden.shape)}"
        )
    for name, rows in {"hidden": hidden, "ref_hidden": ref_hidden}.items():
        if rows is not None:
            check_rows(rows, target, mask=mask, temperature=temperature, name=name)
    names = ", ".join(options.loss_types)
    if ref_logp is not None and ref_hidden is not None:
        raise ValueError("give ref_logp or ref_hidden, not both: they are the same reference")
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight go together: give both or neither")
    given = ref_logp is not None or ref_hidden is not None
    if given != options.uses_reference:
        verb = "has no use for" if given else "needs"
        raise ValueError(f"loss_type {names} {verb} a reference: ref_logp or ref_hidden")
    if ref_logp is not None and ref_logp.shape != hidden.shape[:1]:
        raise ValueError(
            f"ref_logp must have shape ({len(hidden)},), one sum an answer, got "
            f"{tuple(ref_logp.shape)}"
        )
