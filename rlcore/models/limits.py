"""What a model can take: so many positions, and ids of so many tokens."""

from __future__ import annotations

from typing import Any

from rlcore.data.loaded import Extent
from rlcore.errors import UserError

# of these rotary scalings max_position_embeddings is what they start from
STRETCHED = ("linear", "dynamic", "yarn")


def check_extent(model: Any, extent: Extent, tokenizer: Any, new_tokens: int = 0) -> None:
    """Raise UserError where the data has longer sequences or higher ids than the model knows.

    Args:
        model: as transformers loads it.
        tokenizer: with the token that pads.
        new_tokens: that are sampled behind each sequence, at most.
    """
    name = model.config.name_or_path
    window = context_window(model.config)
    length = extent.length + new_tokens
    if window is not None and length > window:
        sampled = f" and max_completion_length {new_tokens} make {length}" if new_tokens else ""
        options = "max_completion_length or max_prompt_length" if new_tokens else "max_length"
        raise UserError(
            f"{extent.longest}: {extent.length} tokens{sampled}, but {name!r} has {window} "
            f"positions: lower {options}, or leave such rows out"
        )
    known = model.get_input_embeddings().weight.shape[0]
    used = {extent.token_id: extent.highest, tokenizer.pad_token_id: "padding"}
    for token_id, place in used.items():
        if token_id >= known:
            raise UserError(
                f"{place}: the token {tokenizer.decode([token_id])!r} has the id {token_id}, but "
                f"the embedding of {name!r} has {known} rows for a tokenizer of {len(tokenizer)} "
                "tokens: it is another model's, or wants model.resize_token_embeddings"
            )


def context_window(config: Any) -> int | None:
    """The positions that a model of that config tells apart; None: no limit is known."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # one for each type of layer, or one for all
    each = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return max([positions, *(_stretched(parameters, positions) for parameters in each)])


def _stretched(rope: dict[str, Any], positions: int) -> int:
    if rope.get("rope_type", rope.get("type")) not in STRETCHED:
        return positions
    start = rope.get("original_max_position_embeddings") or positions
    return int(start * (rope.get("factor") or 1.0))
