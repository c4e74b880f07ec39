"""Tiny random models of families that differ from a plain transformer: states, experts, routers."""

from __future__ import annotations

from typing import Any

import torch

from .tiny import SIZES, tiny_tokenizer

SHAPE = SIZES | {"max_position_embeddings": 128}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 8,
}
# what goes on from recurrent states beside, or instead of, keys and values
STATES = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Qwen3Next": LINEAR | EXPERTS,
    "Jamba": MAMBA
    | EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64},
    "Mamba": {"state_size": 8},
}
MIXTURES = {
    "Mixtral": EXPERTS,
    "Qwen3Moe": EXPERTS,
    "Olmoe": EXPERTS,
    "Phimoe": EXPERTS,  # its router's linear layer gives two results
    "Qwen3Next": STATES["Qwen3Next"],
}


def tiny_architecture(kind: str, **changes: Any) -> Any:
    """A random model of the configuration class `kind`Config, in evaluation mode."""
    import transformers

    tokenizer = tiny_tokenizer()
    options = SHAPE | (STATES | MIXTURES).get(kind, {}) | changes
    if kind == "Falcon":  # it works this one out
        del options["head_dim"]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
