"""Divergences of two heads over the whole vocabulary from their hidden states, without the logits.

    forward_kl = KL(q || p),   reverse_kl = KL(p || q),
    jsd = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

The passes are those of linear_categorical_kl; the rows are categorical_divergence's.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import checks_types
from ..rows.categorical_divergence import check_kind
from .kl import divergence_of_heads


@checks_types
def linear_categorical_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    kind: str = "reverse_kl",
    jsd_beta: float = 0.5,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    other_logit_scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`categorical_divergence` of two heads' logits, from their inputs, without the logits.

    p = softmax(z / temperature) is the student, with z the logits that `linear_token_logprob`
    describes, from hidden, weight, bias, softcap and logit_scale; q likewise the teacher, from the
    others. "reverse_kl" is KL(p || q), "forward_kl" KL(q || p), "jsd" the generalised
    Jensen-Shannon divergence jsd_beta KL(q || m) + (1 - jsd_beta) KL(p || m), m = jsd_beta q +
    (1 - jsd_beta) p (GKD: Agarwal et al. 2023, arXiv:2306.13649 eq. 1).

    Its operations and memory are those of `linear_categorical_kl`: a frozen teacher has neither
    products nor memory for a gradient, and logits are held for a chunk of tokens.

    Args:
        hidden, other_hidden: (N, H) or (B, T, H), float32, bfloat16, float16 or float64, of the
            same leading shape; the two sides may differ in H and in dtype.
        weight, other_weight: (V, H), the heads' weights, of the same V.
        kind: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: in (0, 1); at 0.5 both sides count alike. Other kinds have no use for it.
        bias, other_bias: (V,) or None.
        softcap, other_softcap, logit_scale, other_logit_scale: positive; a softcap None = none.
        temperature: positive; divides the logits of both.
        mask: bool (N,) or (B, T), true = the token counts; others give 0, cost no product, and
            may hold anything. None = every token counts.
        chunk_bytes: as of `linear_categorical_kl`.
        backend: "triton", "torch", or None: see `use_backend`. The jsd's rows are PyTorch's on
            either.

    Returns:
        (N,) or (B, T), in nats, never below 0, float32 (float64 where either hidden is),
        differentiable once in hidden, weight and bias of both sides.

    Raises:
        ValueError: a wrong or different shape, a wrong dtype, device, range, kind or jsd_beta; a
            layer in the place of its weight.
    """
    check_kind(kind, jsd_beta)
    this = ("", hidden, weight, bias, softcap, logit_scale)
    other = ("other_", other_hidden, other_weight, other_bias, other_softcap, other_logit_scale)
    beta = jsd_beta if kind == "jsd" else None
    if kind == "forward_kl":
        this, other = other, this
    return divergence_of_heads(this, other, temperature, mask, chunk_bytes, backend, beta)
