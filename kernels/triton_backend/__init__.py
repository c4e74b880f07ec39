"""How a GPU computes it: Triton kernels, and the tiles and launches that they share."""

from .categorical_kl import categorical_kl_backward, categorical_kl_forward
from .fisher import fisher_vector_product
from .launch import gradient_memory, row_width
from .policy_loss import has_formula, policy_loss_forward_backward, scale_rows
from .scan_launch import gae, gae_from_scores, shaped_reward
from .token_logprob import (
    KEEPS_SOFTMAX,
    token_logprob_backward,
    token_logprob_backward_slice,
    token_logprob_forward,
)

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
