"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on a model, through peft.

The layers go into the model itself, which keeps its class and its forward: W x becomes
W x + (alpha / r) B A x. With the adapter switched off the model is what training started from,
a reference that costs no memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlcore.errors import UserError

# peft's word for every linear layer but the output head
ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# where the layer that a sequence classifier adds to its backbone is called so, it is trained whole
NEW_HEAD = "score"


def require_peft() -> None:
    """Raise UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need peft: pip install 'rlcore[peft]'")


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether an adapter, and not a whole model, lies in that directory."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    seed: int = 0,
) -> None:
    """Freeze the model and put a trainable adapter of rank `r` beside its linear layers.

    Args:
        target_modules: endings of the names of the layers to adapt, or "all-linear".
        seed: of its first weights, which depend on nothing that was drawn or loaded before.

    Raises:
        UserError: peft is not installed, or no layer is called so.
    """
    require_peft()
    from peft import LoraConfig

    names = list(target_modules)
    is_classifier = hasattr(model, NEW_HEAD)
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        fan_in_fan_out=transposed,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        modules_to_save=[NEW_HEAD] if is_classifier else None,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"lora_target_modules {' '.join(names)}: {reason}") from error


def has_adapter(model: Any) -> bool:
    """Whether an adapter is in the model."""
    return getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """The model without its adapter for a while: what training started from."""
    layers = [module for module in model.modules() if _is_adapter_layer(module)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft freezes what it switches off
        for parameter in trained:
            parameter.requires_grad_(True)


def merge_adapter(model: Any) -> Any:
    """Add the adapter into the weights it stands beside; the model is then a plain one."""
    for name, module in list(model.named_modules()):
        if _is_adapter_layer(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _merged(module))
    model._hf_peft_config_loaded = False
    del model.peft_config
    # transformers noted how the adapter's file names its weights, and would save the model's so
    vars(model).pop("_weight_conversions", None)
    return model.requires_grad_(True)


def _merged(layer: Any) -> torch.nn.Module:
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.modules_to_save[layer.active_adapters[0]]
    layer.merge()
    return layer.get_base_layer()


def _is_adapter_layer(module: torch.nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def checkpoint_adapters_alone(accelerator: Any) -> None:
    """From now on the accelerator's checkpoints hold a model's adapter, not its frozen weights."""

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        for index in _adapted(accelerator, models):
            if accelerator.is_main_process:
                accelerator.unwrap_model(models[index]).save_pretrained(directory)
            del weights[index]

    def load(models: list[Any], directory: str) -> None:
        for index in _adapted(accelerator, models):
            _load_adapter(accelerator.unwrap_model(models[index]), Path(directory))
            del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _adapted(accelerator: Any, models: Sequence[Any]) -> list[int]:
    """The places of the models that have an adapter, the last first."""
    places = reversed(range(len(models)))
    return [place for place in places if has_adapter(accelerator.unwrap_model(models[place]))]


def _load_adapter(model: Any, directory: Path) -> None:
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(directory / ADAPTER_WEIGHTS)
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys:
        raise UserError(
            f"the adapter in {directory} is another than this run's: it has "
            f"{result.unexpected_keys[0]}"
        )
