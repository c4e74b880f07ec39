"""Random models small enough to run in milliseconds, one for each kind of architecture."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from rlcore.demo.arithmetic import make_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # wide enough that likeliest tokens are far from ties
    "initializer_range": 0.4,
}
PROMPTS = [
    "Ben has 9 pears, gets 8 more and finds 8. How many pears?",
    "7",
    "Ana has 5 coins",
    "How many cards? How many cards? How many cards?",
]


@functools.cache
def tiny_tokenizer() -> Any:
    """The embedded task's tokenizer; shared, so leave it as it is."""
    return make_tokenizer()


def tiny_model(kind: str = "qwen2", seed: int = 0, **changes: Any) -> Any:
    """A random model of that kind in evaluation mode, float32."""
    import transformers

    tokenizer = tiny_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4, **tokens
        ),
        "llama": lambda: transformers.LlamaConfig(**SIZES, **tokens),
        "qwen2": lambda: transformers.Qwen2Config(
            **{k: v for k, v in SIZES.items() if k != "head_dim"}, **tokens
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            sliding_window=8, query_pre_attn_scalar=8, **SIZES, **tokens
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            sliding_window=8, query_pre_attn_scalar=8, **SIZES, **tokens
        ),
    }
    config = configs[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_tiny(directory: Path, kind: str = "qwen2", seed: int = 0, **changes: Any) -> str:
    """A tiny model with its tokenizer as a model directory."""
    tiny_model(kind, seed, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def most_of(path: str | Path) -> str:
    """A copy of a file of rows without the last: held-out data that is not the training data."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    other = path.with_name(f"other_{path.name}")
    other.write_text("\n".join(lines[:-1]), encoding="utf-8")
    return str(other)
