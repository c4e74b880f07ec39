"""The fused head: from hidden states and lm_head's weight to losses and gradients, chunk by chunk.

    s = (hidden W^T + bias) logit_scale,   z = softcap tanh(s / softcap)  or  s,   then z / T
    dhidden = ds W,   dW = ds^T hidden,   dbias = sum ds

A chunk of tokens makes its logits (fp32), a row kernel turns them into their gradient, and the two
backward products follow while the chunk is at hand: 6 N H V operations, and never (N, V) memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import refuse_transforms, resolve_backend
from ..checks import check_name, check_rows, check_targets_in_range, checks_types
from ..formulas.surrogates import PerToken
from ..rows.policy_inputs import DEFAULTS, PolicyArguments, knows_derivative, prepare_policy
from ..rows.policy_loss import PolicyLoss, composed_policy_loss
from ..rows.token_logprob import TokenLogprob
from .autograd import LinearPolicyLoss, LinearTokenLogprob
from .chunks import Run
from .inputs import prepare_head
from .ops import linear_policy_loss_op, linear_token_logprob_op
from .plan import LinearPlan, make_plan
from .products import Head

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checks_types
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
        bias: (V,) or None; of a wider dtype than the products', it is added as it is (in float32
            to float32 sums), but inside autocast rounded as a linear layer's.
        temperature, softcap, logit_scale: positive; softcap None = none.
        mask: bool (N,) or (B, T), true = the token counts; masked tokens cost no product.
        entropy: False leaves the entropy out, uncomputed and None.
        chunk_bytes: budget for logits and their gradients at one time; None = 256 MiB on a CPU
            (of which a chunk takes 56), 2 GiB elsewhere; below one token's, one token at a time.
            See `plan_linear`.
        backend: "triton", "torch", or None: see `use_backend`.

    Returns:
        TokenLogprob(logp, entropy, lse), each of target's shape, differentiable once in hidden,
        weight and bias.

    Raises:
        ValueError: a wrong shape, dtype, device or range, as in `token_logprob`; a layer in the
            place of its weight.
    """
    check_rows(hidden, target, mask=mask, temperature=temperature, name="hidden")
    backend = resolve_backend(backend, hidden)
    prepared = prepare_head(
        hidden, weight, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    return prepared_token_logprob(
        *prepared, target, mask, entropy=entropy, entropy_gradient=entropy,
        chunk_bytes=chunk_bytes, backend=backend,
    )  # fmt: skip


def prepared_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    target: Tensor,
    mask: Tensor | None,
    *,
    entropy: bool,
    entropy_gradient: bool,
    chunk_bytes: int | None,
    backend: str,
) -> TokenLogprob:
    """`linear_token_logprob` of what `prepare_head` gives, hidden (N, H) among it.

    The entropy may be wanted without its gradient.
    """
    check_targets_in_range(target, mask, weight.shape[0], backend)
    shape = target.shape
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=target.device)
    needs = needs_of(hidden, weight, bias)
    given = (hidden, weight, bias, target.reshape(-1), mask.reshape(-1), entropy)
    if not is_plain(hidden, weight, bias, target, mask):
        logp, entropies, lse, _, _ = linear_token_logprob_op(
            *given, head.temperature, head.softcap, head.logit_scale, chunk_bytes, list(needs),
            backend,
        )  # fmt: skip
    else:
        plan = make_plan(
            hidden, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=True,
            separate_gradient=head.softcap is not None, with_entropy=entropy_gradient,
        )  # fmt: skip
        run = Run(head, plan, needs, backend)
        logp, entropies, lse = LinearTokenLogprob.apply(*given, run)
    entropies = entropies.view(shape) if entropy else None
    if entropy and not entropy_gradient:
        entropies = entropies.detach()
    return TokenLogprob(logp.view(shape), entropies, lse.view(shape))


@checks_types(options=PolicyArguments, defaults=DEFAULTS)
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
    backend: str | None = None,
    **options: Unpack[PolicyArguments],
) -> PolicyLoss:
    """`policy_loss` of a head's logits, from its input, without the logits.

        rl.linear_policy_loss(hidden[:, :-1], weight, input_ids[:, 1:], advantage, mask=mask[:, 1:])

    Row t of hidden is what `target[t]` is predicted from, so with a causal model the target is one
    token ahead, as above: unshifted tensors fit as well, and give the loss of other tokens.

    The head's arguments are those of `linear_token_logprob`, all others those of `policy_loss`.
    The gradients of hidden, weight and bias are made in the same pass over the chunks (6 N H V
    operations, nothing recomputed; in bfloat16 and float16 up to 8 for the tokens beyond the
    budget, see `plan_linear`), only for the inputs that need one; masked tokens cost no product,
    and clipped ones or those with advantage 0 no backward product.

    Returns:
        PolicyLoss(loss, logp, entropy, kl, clipped); the loss is differentiable (once) in hidden,
        weight and bias.

    Raises:
        ValueError: as in `policy_loss` and `linear_token_logprob`.
    """
    temperature = options["temperature"]
    check_rows(hidden, target, mask=options["mask"], temperature=temperature, name="hidden")
    backend = resolve_backend(backend, hidden)
    flat, weight, bias, head = prepare_head(
        hidden, weight, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    prepared, mask, token_weight, per_token = prepare_policy(
        flat.view(*hidden.shape), target, advantage, options, "hidden"
    )
    needs = needs_of(flat, weight, bias)
    if not any(needs) or not knows_derivative(prepared, backend):
        statistics = prepared_token_logprob(
            flat, weight, bias, head, target, mask, entropy=True,
            entropy_gradient=prepared.entropy_coef != 0, chunk_bytes=chunk_bytes, backend=backend,
        )  # fmt: skip
        cu_seqlens = options["cu_seqlens"]
        return composed_policy_loss(statistics, mask, token_weight, per_token, prepared, cu_seqlens)
    check_targets_in_range(target, mask, weight.shape[0], backend)
    per_token = PerToken(*(None if t is None else t.view(-1) for t in per_token))
    if not is_plain(flat, weight, bias, target, token_weight, *per_token):
        loss, *rest = linear_policy_loss_op(
            flat, weight, bias, target.reshape(-1), *per_token, token_weight.view(-1),
            *prepared.flat(),
            head.temperature, head.softcap, head.logit_scale, chunk_bytes, list(needs), backend,
        )[:5]  # fmt: skip
        logp, entropy, kl, clipped = (t.detach() for t in rest)
        rest = (logp, entropy, None if per_token.ref_logp is None else kl, clipped)
        return PolicyLoss(loss, *(None if t is None else t.view(target.shape) for t in rest))
    plan = make_plan(
        flat, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=False,
        separate_gradient=softcap is not None,
    )  # fmt: skip
    loss, *rest = LinearPolicyLoss.apply(
        flat, weight, bias, target.reshape(-1), per_token, token_weight.view(-1), prepared,
        Run(head, plan, needs, backend),
    )  # fmt: skip
    return PolicyLoss(loss, *(None if t is None else t.view(target.shape) for t in rest))


def is_plain(*tensors: Tensor | None) -> bool:
    """Plain eager tensors, served chunk by chunk in sight of FLOP counters and memory trackers.

    Others (torch.compile, fake tensors) are served by the registered operators.
    """
    if torch.compiler.is_compiling():
        return False
    refuse_transforms(tensors)
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def needs_of(*inputs: Tensor | None) -> tuple[bool, ...]:
    """Which inputs need a gradient."""
    grad = torch.is_grad_enabled()
    return tuple(grad and t is not None and t.requires_grad for t in inputs)


@checks_types
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
    and peak memory. A sharded DTensor weight is gathered for it, as in the call.

    Raises:
        ValueError: an unknown loss, or weight not (V, H).
    """
    check_name("loss", loss, ("policy", "logprob"))
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must have shape (N, H) or (B, T, H), got {tuple(hidden.shape)}")
    needs = needs_of(hidden, weight, bias)
    hidden, weight, *_ = prepare_head(
        hidden, weight, bias, temperature=1.0, softcap=softcap, logit_scale=1.0
    )
    return make_plan(
        hidden, weight, chunk_bytes=chunk_bytes, needs=needs, coupled=loss == "logprob",
        separate_gradient=softcap is not None, with_entropy=entropy,
    )  # fmt: skip
