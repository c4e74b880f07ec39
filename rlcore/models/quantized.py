"""Frozen weights in 4 bit, for an adapter beside them (QLoRA: Dettmers et al. 2023,
arXiv:2305.14314), through bitsandbytes.

    y = dequantize(W) x + (alpha / r) B A x

W is in NF4, by blocks whose scales are quantized too. Embeddings, norms and the output head stay as
they are.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.models.pretrained import from_pretrained


def require_bitsandbytes() -> None:
    """Raise UserError where bitsandbytes is not installed."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"load_in_4bit needs bitsandbytes: pip install 'rlcore[quantization]' ({error})"
        ) from error


def loading_in_4bit(name_or_path: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """What transformers takes to load that model's weights in 4 bit.

    Raises:
        UserError: nothing loadable there, or they are quantized already.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    require_bitsandbytes()
    config = from_pretrained(AutoConfig, "model", name_or_path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{name_or_path!r} is quantized already, and adapters are merged into whole weights: "
            "name the model that it was made from"
        )
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": how}


def made_trainable(model: Any, compute: torch.dtype | None = None) -> None:
    """Have gradients go through the layers in 4 bit, multiplying in `compute`; None: as they do.

    On CPUs with AVX512-BF16 bitsandbytes packs a layer's weight anew when it is first evaluated,
    and no gradient goes through such a layer.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            # its weight is packed back for this
            module.state_dict()
        if compute is not None:
            module.compute_dtype, module.compute_type_is_set = compute, True


def check_given(model: Any, four_bit: bool) -> bool:
    """Whether a model that a caller has loaded is in 4 bit, as it is then to be; if so, ready.

    Raises:
        UserError: it is, and is not to be, or the other way round.
    """
    if getattr(model, "is_quantized", False):
        if not (four_bit and getattr(model, "is_loaded_in_4bit", False)):
            raise UserError(
                "model is quantized, and its weights are to be trained: load it otherwise, or in "
                "4 bit for load_in_4bit and peft"
            )
        made_trainable(model)
        return True
    if four_bit:
        raise UserError(
            "load_in_4bit is set, but the model that was given is not in 4 bit: give its name, or "
            "load it so"
        )
    return False
