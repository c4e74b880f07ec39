"""Logits to the policy loss and its gradient: every algorithm's V-wide work, in one launch.

    loss = sum_t weight_t (ratio_is,t surrogate(logp_t, old_logp_t, A_t) + beta KL_t - c H_t)
    dlogits_j = (g (1[target] - p_j) + weight c p_j (log p_j + H)) / T,   g = dloss/dlogp

Floor: one read and one write of the logits. A row's second sweep comes from registers and L2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import resolve_backend, takes_short_way
from ..blocks import statistics_dtype
from ..checks import check_inplace, check_targets_in_range, checks_types
from ..formulas.sequence_ratio import share_sequence_ratio
from ..formulas.surrogates import PerToken, PolicyOptions, policy_terms
from ..implementation import implementation
from ..limits import known
from .policy_inputs import DEFAULTS, PolicyArguments, knows_derivative, prepare_policy
from .token_logprob import TokenLogprob, token_logprob

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: a differentiable scalar, and detached per-token values."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    kl: Tensor | None
    clipped: Tensor


class _PolicyLoss(torch.autograd.Function):
    """The short way of eager mode: the forward makes the gradient, the backward hands it out."""

    @staticmethod
    def forward(ctx, logits, inplace, backend, target, *arguments):
        run = implementation(backend)
        dlogits = run.gradient_memory(logits, inplace)
        loss, *rest = run.policy_loss_forward_backward(logits, dlogits, target, *arguments)
        ctx.save_for_backward(dlogits)
        ctx.backend, ctx.inputs = backend, 4 + len(arguments)
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        ctx.set_materialize_grads(False)
        return loss.sum(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * ctx.inputs
        (dlogits,) = ctx.saved_tensors
        # a graph that is kept for another backward keeps this gradient as it is
        if torch._C._autograd._get_current_graph_task_keep_graph():
            dlogits = dlogits.clone()
        implementation(ctx.backend).scale_rows(dlogits, dloss)
        return dlogits, *(None,) * (ctx.inputs - 1)


@torch.library.custom_op("rlcore::policy_loss", mutates_args=())
def policy_loss_op(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    ratio: Tensor | None,
    weight: Tensor,
    surrogate: str,
    kl_estimator: str,
    numbers: list[float],
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token losses, logp, entropy, kl, clipped, dlogits); kl is empty without ref_logp."""
    check_targets_in_range(target, weight != 0, logits.shape[-1], backend)
    options = PolicyOptions.of(surrogate, kl_estimator, numbers)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    loss, logp, entropy, kl, clipped = implementation(backend).policy_loss_forward_backward(
        logits, dlogits, target, advantage, old_logp, ref_logp, ratio, weight, options, temperature
    )
    return loss, logp, entropy, loss.new_empty(0) if kl is None else kl, clipped, dlogits


@policy_loss_op.register_fake
def _(logits, target, advantage, old_logp, ref_logp, *_):
    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device=logits.device)

    dtype, shape = statistics_dtype(logits), target.shape
    kl = empty((0,) if ref_logp is None else shape, dtype)
    loss, logp, entropy = (empty(shape, dtype) for _ in range(3))
    return loss, logp, entropy, kl, empty(shape, torch.bool), empty(logits.shape, logits.dtype)


def _setup_context(ctx, inputs, output):
    *_, ctx.inputs = len(inputs), len(inputs)
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dloss, *_):
    (dlogits,) = ctx.saved_tensors
    dlogits = None if dloss is None else (dlogits * dloss.unsqueeze(-1)).to(dlogits.dtype)
    return dlogits, *(None,) * (ctx.inputs - 1)


policy_loss_op.register_autograd(_op_backward, setup_context=_setup_context)


@checks_types(options=PolicyArguments, defaults=DEFAULTS)
def policy_loss(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    inplace_backward: bool = False,
    backend: str | None = None,
    **options: Unpack[PolicyArguments],
) -> PolicyLoss:
    """Policy loss of sampled tokens, straight from the logits, with its gradient.

    Per token, with logp = log softmax(logits / temperature)[target]:
        loss_t = importance_sampling_ratio * surrogate(logp, old_logp, advantage)
                 + beta * KL(pi || ref) - entropy_coef * H
    PPO's clipped surrogate is arXiv:1707.06347 eq. 7; GRPO's loss is arXiv:2402.03300 eq. 3 (its
    KL is "k3", eq. 4), which is this one with group advantages and "seq-mean-token-mean".

    Args:
        logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, any strides.
        target: integers (N,) or (B, T) in [0, V): the sampled tokens.
        advantage: (N,), (B, T), or (B,) spread over T.
        old_logp: (N,) or (B, T), of the policy that sampled, at the same temperature. None =
            the present policy sampled: ratio 1.
        ref_logp: likewise of the reference policy, for the KL; needed where beta is not 0.
        mask: bool (N,) or (B, T), true = the token counts; elsewhere all results and the
            gradient are 0 whatever the inputs hold. None = every token counts.
        surrogate: "reinforce", "ppo_clip" (the default), "ppo_penalty", "cispo", "cispo_abs",
            "sapo", "gmpo", "dppo_tv", "dppo_kl", "kl_cov", or another of SURROGATES, which
            `register_surrogate` adds to.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; 0.2, and
            epsilon_high None = epsilon.
        delta: bound on the ratio where the advantage is negative (dual clip); None = none.
        beta: coefficient of the KL term; 0.
        kl_estimator: "k1", "k2", "k3" (the default), or "k3_ratio", which is k3 times pi / pi_old
            at the importance_sampling_level: its gradient is the reverse KL's, off-policy too.
            See KL_ESTIMATORS for what the others' gradients estimate.
        entropy_coef: coefficient of the entropy bonus; 0.
        temperature: positive, 1; divides the logits before everything else.
        importance_sampling_level: "token", the default: each token has its own ratio; "sequence":
            a sequence's tokens share exp(mean of logp - old_logp) (GSPO, arXiv:2507.18071, eq. 7),
            by rows of (B, T) or by cu_seqlens. The gradient is then made in a pass of its own.
        importance_sampling_ratio: (N,), (B, T) or (B,): detached weights on the surrogate alone.
        loss_agg_mode, num_items, norm_length, cu_seqlens: how tokens become one scalar,
            "token-mean" if not said otherwise; see `token_weight`. With `num_items` counted over
            the full batch, micro-batches and ranks add up to its loss and gradient exactly.
        surrogate_params: further parameters of the surrogate, by name; the table has defaults.
        inplace_backward: permits the logits' storage to take the gradient, already in this call;
            the logits are then used up. Under torch.compile the graph plans its own memory and
            makes no use of the permission.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        PolicyLoss(loss, logp, entropy, kl, clipped): a scalar that is differentiable (once) in
        the logits alone, then per-token values without gradient, float32 (float64 for float64
        logits): kl is None without ref_logp; clipped (bool) is true where the clip holds the
        gradient at zero. A token of advantage 0 has no surrogate loss and a clipped one no gradient
        however large the ratio; what lies beyond the dtype is held at its largest number.

    Raises:
        ValueError: a wrong shape, dtype, device, name or range; an option that the surrogate has
            no use for; a target out of range at a counted position (on a GPU only under
            RLCORE_CHECK=1: there the row becomes NaN).
    """
    check_inplace(logits, inplace_backward)
    backend = resolve_backend(backend, logits)
    prepared, mask, weight, per_token = prepare_policy(logits, target, advantage, options)
    temperature = options["temperature"]
    if not _makes_gradient_in_forward(logits, prepared, backend):
        statistics = token_logprob(
            logits, target, temperature=temperature, mask=mask,
            inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip
        cu_seqlens = options["cu_seqlens"]
        return composed_policy_loss(statistics, mask, weight, per_token, prepared, cu_seqlens)
    if takes_short_way(logits, target, mask, weight, *per_token):
        check_targets_in_range(target, mask, logits.shape[-1], backend)
        return PolicyLoss(
            *_PolicyLoss.apply(
                logits, inplace_backward, backend, target, *per_token, weight, prepared, temperature
            )
        )
    loss, logp, entropy, kl, clipped, _ = policy_loss_op(
        logits, target, *per_token, weight, *prepared.flat(), temperature, backend
    )
    kl = None if per_token.ref_logp is None else kl.detach()
    return PolicyLoss(loss.sum(), logp.detach(), entropy.detach(), kl, clipped)


def _makes_gradient_in_forward(logits: Tensor, options: PolicyOptions, backend: str) -> bool:
    """Whether the one-launch path serves the call.

    float16 waits for the upstream gradient: a loss scaler puts its factor there, without which
    small gradients would underflow to 0.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and logits.dtype != torch.float16
        and knows_derivative(options, backend)
    )


def composed_policy_loss(
    statistics: TokenLogprob,
    mask: Tensor,
    weight: Tensor,
    per_token: PerToken,
    options: PolicyOptions,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """The PyTorch formula on differentiable statistics: a forward alone, or autograd's backward.

    cu_seqlens are the boundaries of packed (N,) tokens, for a ratio at sequence level.
    """
    logp, entropy, _ = statistics
    per_token = [None if t is None else torch.where(mask, t, 0.0) for t in per_token]
    advantage, old_logp, *others = per_token
    clipped = torch.zeros_like(mask)
    if options.importance_sampling_level == "sequence":
        old_logp, clipped = share_sequence_ratio(
            logp, old_logp, advantage, mask, options, cu_seqlens
        )
        terms = policy_terms(logp, entropy, advantage, old_logp, *others, options)
        token_loss = terms.loss
    else:
        with torch.no_grad():
            terms = policy_terms(logp, entropy, advantage, old_logp, *others, options)
        slopes = [(logp, terms.dlogp)]
        if options.entropy_coef:
            slopes.append((entropy, torch.full_like(entropy, -options.entropy_coef)))
        token_loss = known(terms.loss, *slopes)
    loss = torch.where(mask, token_loss * weight, 0.0).sum()
    kl = None if terms.kl is None else torch.where(mask, terms.kl.detach(), 0.0)
    return PolicyLoss(loss, logp.detach(), entropy.detach(), kl, (terms.clipped | clipped) & mask)
