"""The fused head: from hidden states and lm_head's weight to losses and gradients, chunk by chunk.

    s = (hidden W^T + bias) logit_scale,   z = softcap tanh(s / softcap)  or  s,   then z / T
    dhidden = ds W,   dW = ds^T hidden,   dbias = sum ds

A chunk of tokens makes its logits (fp32), a row kernel turns them into their gradient, and the two
backward products follow while the chunk is at hand: 6 N H V operations, and never (N, V) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import policy_loss as rows_policy
from . import token_logprob as rows_logprob
from .backend import refuse_transforms, resolve_backend
from .blocks import select_rows, statistics_dtype
from .checks import check_rows, check_targets_in_range
from .linear_inputs import prepare_head
from .linear_plan import LinearPlan, make_plan
from .linear_products import Head, Products
from .policy_inputs import prepare_policy
from .policy_loss import PolicyLoss, composed_policy_loss
from .surrogates import SURROGATES, PolicyOptions
from .token_logprob import TokenLogprob


class _Gradients:
    """The gradients of hidden, weight and bias, gathered chunk by chunk; None where unneeded."""

    def __init__(self, hidden: Tensor, products: Products, needs: tuple[bool, bool, bool]):
        weight, accumulator = products.weight, products.accumulator
        like = {"dtype": accumulator, "device": weight.device}
        self.products = products
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        self.dweight = torch.zeros(weight.shape, **like) if needs[1] else None
        self.dbias = torch.zeros(weight.shape[0], **like) if needs[2] else None

    def add(self, ds: Tensor, hidden: Tensor, rows: slice | Tensor, keep: Tensor | None) -> None:
        """Takes in a chunk; rows where `keep` (n,) is false have no gradient: no product either."""
        if keep is not None and not keep.all():
            kept = keep.nonzero().squeeze(-1)
            ds, hidden = ds[kept], hidden[kept]
            rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
        if self.dhidden is not None:
            self.dhidden[rows] = self.products.dhidden(ds)
        if self.dweight is not None:
            self.products.add_dweight(ds, hidden, self.dweight)
        if self.dbias is not None:
            self.dbias += ds.sum(0, dtype=self.dbias.dtype)

    def finish(self) -> list[Tensor | None]:
        dtype = self.products.weight.dtype
        return [
            None if g is None else g.to(dtype) for g in (self.dhidden, self.dweight, self.dbias)
        ]


class _Chunk:
    """Memory for a chunk's logits and their gradient, which share it where they can."""

    def __init__(self, products: Products, head: Head, plan: LinearPlan, backend: str):
        shape = (plan.chunk_tokens, plan.vocabulary)
        # Triton's 16-byte stores want every row of both to start at a 16-byte boundary
        width = -(-plan.vocabulary // 16) * 16 if backend == "triton" else plan.vocabulary
        weight = products.weight
        empty = torch.empty((shape[0], width), dtype=products.accumulator, device=weight.device)
        self.z = empty[:, : shape[1]]
        self.dz = self.z
        if products.low_precision or head.softcap is not None:
            self.dz = torch.empty_like(empty, dtype=weight.dtype)[:, : shape[1]]


def _policy_pass(
    hidden, weight, bias, target, per_token, token_weight, options, head, plan, needs, backend
):
    """One pass over the chunks: per-token (loss, logp, entropy, kl, clipped) and the gradients."""
    products = Products(weight, bias)
    gradients = _Gradients(hidden, products, needs)
    chunk = _Chunk(products, head, plan, backend)
    dtype = statistics_dtype(hidden)
    statistics = [torch.zeros(target.shape, dtype=dtype, device=target.device) for _ in range(4)]
    statistics.append(torch.zeros(target.shape, dtype=torch.bool, device=target.device))
    unit, token_weight = _unit_weight(token_weight, hidden.dtype)
    for rows in select_rows(token_weight != 0, len(target), plan.chunk_tokens):
        hidden_rows = hidden[rows]
        z, dz = chunk.z[: len(hidden_rows)], chunk.dz[: len(hidden_rows)]
        head.cap_(products.logits(hidden_rows, z))
        given = [None if t is None else t[rows] for t in per_token]
        parts = rows_policy._forward_backward(
            backend, z, dz, target[rows], *given, token_weight[rows], options, head.row_temperature
        )
        for whole, part in zip(statistics, parts, strict=True):
            if part is not None:
                whole[rows] = part
        gradients.add(head.uncap_(dz, z), hidden_rows, rows, _flows(given, parts[-1], options))
    loss, logp, entropy, kl, clipped = statistics
    dgradients = gradients.finish()
    if unit is not None:
        loss = loss * unit
        dgradients = [None if g is None else (g.float() * unit).to(g.dtype) for g in dgradients]
    return (loss, logp, entropy, None if per_token[2] is None else kl, clipped), dgradients


def _unit_weight(token_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """For float16, weights over a power of two so that the largest is about 1, and that power.

    A gradient of 1/N would leave float16's range in the products; a power of two costs no bit.
    """
    if dtype != torch.float16 or not token_weight.numel():
        return None, token_weight
    largest = token_weight.max()
    unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
    return unit, token_weight / unit


def _flows(given: list[Tensor | None], clipped: Tensor, options: PolicyOptions) -> Tensor | None:
    """Rows that may have a gradient, or None where all may."""
    if options.beta or options.entropy_coef:
        return None
    advantage, _, _, ratio = given
    flows = ~clipped & (advantage != 0)
    return flows if ratio is None else flows & (ratio != 0)


class _LinearPolicyLoss(torch.autograd.Function):
    """The forward makes the gradients, the backward scales and hands them out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *arguments):
        with torch.autocast(hidden.device.type, enabled=False):
            parts, gradients = _policy_pass(hidden, weight, bias, *arguments)
        loss, *rest = parts
        ctx.save_for_backward(*gradients)
        ctx.inputs = 3 + len(arguments)
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        ctx.set_materialize_grads(False)
        return loss.sum(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * ctx.inputs
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [_scaled(g, dloss, keep_graph) for g in ctx.saved_tensors]
        return *gradients, *(None,) * (ctx.inputs - 3)


def _scaled(gradient: Tensor | None, scale: Tensor, keep: bool) -> Tensor | None:
    """gradient * scale, in its own memory unless it must be kept for another backward."""
    if gradient is None or (scale.device.type == "cpu" and scale == 1 and not keep):
        return gradient
    return gradient * scale.to(gradient.dtype) if keep else gradient.mul_(scale)


class _LinearTokenLogprob(torch.autograd.Function):
    """(logp, entropy | None, lse), differentiable by recomputing or by what the plan has kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, mask, with_entropy, head, plan, needs, backend):
        with torch.autocast(hidden.device.type, enabled=False):
            statistics, saved = _logprob_pass(
                hidden, weight, bias, target, mask, with_entropy, head, plan, backend
            )
        logp, entropy, lse, row_max, log_sum = statistics
        ctx.save_for_backward(hidden, weight, bias, target, mask, entropy, row_max, log_sum, *saved)
        ctx.head, ctx.plan, ctx.needs, ctx.backend = head, plan, needs, backend
        ctx.keeps = plan.strategy == "kept-logits"
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dlse):
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            if ctx.plan.strategy == "unit-gradient":
                gradients = [_scale_unit_gradient(ctx, dlogp, dlse), None, None]
            else:
                *saved, kept = ctx.saved_tensors if ctx.keeps else (*ctx.saved_tensors, None)
                gradients = _logprob_backward(
                    *saved, kept, dlogp, dentropy, dlse, ctx.head, ctx.plan, ctx.needs, ctx.backend
                )
        return *gradients, *(None,) * 7


def _logprob_pass(hidden, weight, bias, target, mask, with_entropy, head, plan, backend):
    """Statistics of every token, and what the plan keeps for the backward."""
    products = Products(weight, bias)
    chunk = _Chunk(products, head, plan, backend)
    dtype, shape = statistics_dtype(hidden), (len(target), plan.vocabulary)
    logp, entropy, lse, row_max, log_sum = (
        torch.zeros(target.shape, dtype=dtype, device=target.device) for _ in range(5)
    )
    statistics = [logp, entropy if with_entropy else None, lse]
    statistics += [row_max, log_sum] if backend == "triton" else [None, None]
    saved = ()
    if plan.strategy == "kept-logits":
        saved = (torch.empty(shape, dtype=dtype, device=target.device),)
    if plan.strategy == "unit-gradient":
        saved = (hidden.new_zeros(hidden.shape, dtype=dtype), torch.ones_like(logp))
    for rows in select_rows(mask, len(target), plan.chunk_tokens):
        hidden_rows = hidden[rows]
        z = chunk.z[: len(hidden_rows)]
        head.cap_(products.logits(hidden_rows, z))
        parts = rows_logprob._forward(
            z, target[rows], None, head.row_temperature, with_entropy, backend
        )
        for whole, part in zip(statistics, parts, strict=True):
            if whole is not None:
                whole[rows] = part
        if plan.strategy == "kept-logits":
            saved[0][rows] = z
        if plan.strategy == "unit-gradient":
            _keep_unit_gradient(
                saved, rows, z, chunk.dz[: len(z)], target[rows], parts, head, products, backend
            )
    return statistics, saved


def _keep_unit_gradient(saved, rows, z, dz, target, parts, head, products, backend):
    """Stores dlse/dhidden = p W / T of a chunk, and the softcap's slope at the targets."""
    unit_gradient, slope = saved
    if head.softcap is not None:
        chosen = z.gather(-1, target[:, None].long()).squeeze(-1)
        slope[rows] = 1 - (chosen / head.softcap).square()
    _, entropy, _, row_max, log_sum = parts
    rows_logprob._backward(
        backend, z, dz, target, None, entropy, row_max, log_sum,
        None, torch.ones_like(parts[0]), None, head.row_temperature,
    )  # fmt: skip
    unit_gradient[rows] = products.dhidden(head.uncap_(dz, z)).to(unit_gradient.dtype)


def _scale_unit_gradient(ctx, dlogp: Tensor | None, dlse: Tensor | None) -> Tensor:
    """dhidden = dlogp (W[target] slope scale / T - dlse/dhidden) + dlse (dlse/dhidden)."""
    _, weight, _, target, mask, _, _, _, unit_gradient, slope = ctx.saved_tensors
    zero = torch.zeros_like(slope)
    dlogp, dlse = (zero if g is None else torch.where(mask, g, 0.0) for g in (dlogp, dlse))
    at_target = dlogp * slope * (ctx.head.logit_scale / ctx.head.temperature)
    inside = torch.where(mask, target, 0).long()
    dhidden = (dlse - dlogp)[:, None] * unit_gradient
    return dhidden.add_(weight[inside] * at_target[:, None]).to(weight.dtype)


def _logprob_backward(
    hidden, weight, bias, target, mask, entropy, row_max, log_sum, kept,
    dlogp, dentropy, dlse, head, plan, needs, backend,
) -> list[Tensor | None]:  # fmt: skip
    products = Products(weight, bias)
    gradients = _Gradients(hidden, products, needs)
    chunk = _Chunk(products, head, plan, backend)
    given = [dlogp, dlse, dentropy]
    flows = mask.clone()
    flows &= torch.stack([g != 0 for g in given if g is not None]).any(0)
    for rows in select_rows(flows, len(target), plan.chunk_tokens):
        hidden_rows = hidden[rows]
        z, dz = chunk.z[: len(hidden_rows)], chunk.dz[: len(hidden_rows)]
        if kept is not None:
            z.copy_(kept[rows])
        else:
            head.cap_(products.logits(hidden_rows, z))
        row = [None if t is None else t[rows] for t in (entropy, row_max, log_sum, *given)]
        rows_logprob._backward(backend, z, dz, target[rows], None, *row, head.row_temperature)
        gradients.add(head.uncap_(dz, z), hidden_rows, rows, None)
    return gradients.finish()


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> TokenLogprob:
    """`token_logprob` of a head's logits, from its input, without the logits.

    With s = logit_scale (hidden weight^T + bias), z = softcap tanh(s / softcap) (or s), everything
    is as in `token_logprob` on logits z. Sums run in float32, and the logits are never rounded to
    a lower precision.

    Args:
        hidden: (N, H) or (B, T, H), float32, bfloat16, float16 or float64.
        weight: (V, H), the head's weight (a sharded DTensor is gathered). Where its dtype is not
            hidden's, the products run in the one that holds both; inside autocast, in autocast's.
        target: integers (N,) or (B, T) in [0, V).
        bias: (V,) or None.
        temperature, softcap, logit_scale: positive; softcap None = none.
        mask: bool (N,) or (B, T), true = the token counts; masked tokens cost no product.
        entropy: False leaves the entropy out, uncomputed and None.
        chunk_bytes: budget for the logits that exist at one time; None = 64 MiB on a CPU, 768
            MiB elsewhere; below one token's, one token at a time. See `plan_linear`.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        TokenLogprob(logp, entropy, lse), each of target's shape, differentiable once in hidden,
        weight and bias.

    Raises:
        ValueError: a wrong shape, dtype, device or range, as in `token_logprob`; a layer in the
            place of its weight.
    """
    check_rows(hidden, target, mask=mask, temperature=temperature, name="hidden")
    shape = target.shape
    flat, weight, bias, head = prepare_head(
        hidden, weight, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    backend = resolve_backend(backend, hidden)
    check_targets_in_range(target, mask, weight.shape[0], backend)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=target.device)
    needs = _needs(flat, weight, bias)
    plan = make_plan(
        flat, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=True,
        separate_gradient=softcap is not None, with_entropy=entropy,
    )  # fmt: skip
    if not _is_plain(flat, weight, bias, target, mask):
        logp, entropies, lse, _, _ = torch.ops.rlcore.linear_token_logprob(
            flat, weight, bias, target.reshape(-1), mask.reshape(-1), entropy, head.temperature,
            head.softcap, head.logit_scale, chunk_bytes, list(needs), backend,
        )  # fmt: skip
        entropies = entropies.view(shape) if entropy else None
        return TokenLogprob(logp.view(shape), entropies, lse.view(shape))
    statistics = _LinearTokenLogprob.apply(
        flat,
        weight,
        bias,
        target.reshape(-1),
        mask.reshape(-1),
        entropy,
        head,
        plan,
        needs,
        backend,
    )
    return TokenLogprob(*(None if t is None else t.view(shape) for t in statistics))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    surrogate: str = "ppo_clip",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    num_items: int | float | Tensor | None = None,
    norm_length: int | float | None = None,
    cu_seqlens: Tensor | None = None,
    surrogate_params: dict[str, float] | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """`policy_loss` of a head's logits, from its input, without the logits.

    The head's arguments are those of `linear_token_logprob`, all others those of `policy_loss`.
    The gradients of hidden, weight and bias are made in the same pass over the chunks (6 N H V
    operations, nothing recomputed), only for the inputs that need one; masked tokens cost no
    product, and clipped ones or those with advantage 0 no backward product.

    Returns:
        PolicyLoss(loss, logp, entropy, kl, clipped); the loss is differentiable (once) in hidden,
        weight and bias.

    Raises:
        ValueError: as in `policy_loss` and `linear_token_logprob`.
    """
    backend = resolve_backend(backend, hidden)
    options, mask, token_weight, per_token = prepare_policy(
        hidden, target, advantage, old_logp, ref_logp, mask, importance_sampling_ratio,
        surrogate=surrogate, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, beta=beta,
        kl_estimator=kl_estimator, entropy_coef=entropy_coef, temperature=temperature,
        importance_sampling_level=importance_sampling_level, loss_agg_mode=loss_agg_mode,
        num_items=num_items, norm_length=norm_length, cu_seqlens=cu_seqlens,
        surrogate_params=surrogate_params, name="hidden",
    )  # fmt: skip
    flat, weight, bias, head = prepare_head(
        hidden, weight, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    needs = _needs(flat, weight, bias)
    knows_derivative = backend == "torch" or SURROGATES[surrogate].triton is not None
    if not any(needs) or not knows_derivative:
        statistics = linear_token_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, mask=mask, chunk_bytes=chunk_bytes, backend=backend,
        )  # fmt: skip
        return composed_policy_loss(statistics, mask, token_weight, per_token, options)
    check_targets_in_range(target, mask, weight.shape[0], backend)
    plan = make_plan(
        flat, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=False,
        separate_gradient=softcap is not None,
    )  # fmt: skip
    per_token = [None if t is None else t.view(-1) for t in per_token]
    if not _is_plain(flat, weight, bias, target, token_weight, *per_token):
        loss, *rest = torch.ops.rlcore.linear_policy_loss(
            flat, weight, bias, target.reshape(-1), *per_token, token_weight.view(-1), surrogate,
            list(options.parameters), kl_estimator, options.beta, options.entropy_coef,
            head.temperature, head.softcap, head.logit_scale, chunk_bytes, list(needs), backend,
        )[:5]  # fmt: skip
        logp, entropy, kl, clipped = (t.detach() for t in rest)
        rest = (logp, entropy, None if ref_logp is None else kl, clipped)
        return PolicyLoss(loss, *(None if t is None else t.view(target.shape) for t in rest))
    loss, *rest = _LinearPolicyLoss.apply(
        flat, weight, bias, target.reshape(-1), per_token, token_weight.view(-1), options, head,
        plan, needs, backend,
    )  # fmt: skip
    return PolicyLoss(loss, *(None if t is None else t.view(target.shape) for t in rest))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Plain eager tensors, served chunk by chunk in sight of FLOP counters and memory trackers.

    Others (torch.compile, fake tensors) are served by the registered operators.
    """
    if torch.compiler.is_compiling():
        return False
    refuse_transforms(tensors)
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _needs(*inputs: Tensor | None) -> tuple[bool, ...]:
    """Which inputs need a gradient."""
    grad = torch.is_grad_enabled()
    return tuple(grad and t is not None and t.requires_grad for t in inputs)


def plan_linear(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    loss: str = "policy",
    softcap: float | None = None,
    entropy: bool = True,
    chunk_bytes: int | None = None,
) -> LinearPlan:
    """What `linear_policy_loss` (loss="policy") or `linear_token_logprob` ("logprob") would do.

    Takes the tensors of the call (tensors on the "meta" device will do), and looks at shapes,
    dtypes, requires_grad and the budget alone. Print the plan to see operations, passes, chunks
    and peak memory.

    Raises:
        ValueError: an unknown loss, or weight not (V, H).
    """
    if loss not in ("policy", "logprob"):
        raise ValueError(f"loss must be 'policy' or 'logprob', got {loss!r}")
    needs = _needs(hidden, weight, bias)
    hidden, weight, *_ = prepare_head(
        hidden, weight, bias, temperature=1.0, softcap=softcap, logit_scale=1.0
    )
    return make_plan(
        hidden, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=loss == "logprob",
        separate_gradient=softcap is not None, with_entropy=entropy,
    )  # fmt: skip


from . import linear_ops  # noqa: E402, F401  registers the operators, which need this module
