"""How every other device computes it: PyTorch by blocks of rows, with gradients by hand."""

from .distributions import (
    categorical_kl_backward,
    categorical_kl_forward,
    fisher_vector_product,
)
from .rows import (
    KEEPS_SOFTMAX,
    gradient_memory,
    has_formula,
    policy_loss_forward_backward,
    row_width,
    scale_rows,
    token_logprob_backward,
    token_logprob_backward_slice,
    token_logprob_forward,
)
from .scans import gae, gae_from_scores, shaped_reward

__all__ = [
    "KEEPS_SOFTMAX",
    "categorical_kl_backward",
    "categorical_kl_forward",
    "fisher_vector_product",
    "gae",
    "gae_from_scores",
    "gradient_memory",
    "has_formula",
    "policy_loss_forward_backward",
    "row_width",
    "scale_rows",
    "shaped_reward",
    "token_logprob_backward",
    "token_logprob_backward_slice",
    "token_logprob_forward",
]
