"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on a model, through peft.

The layers go into the model itself, which keeps its class and its forward: W x becomes
W x + (alpha / r) B A x. With the adapter switched off the model is what training started from,
a reference that costs no memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlcore.errors import UserError, reason_of

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


def base_of_adapter(name_or_path: str) -> str | None:
    """The model that an adapter was trained on; None where no adapter is there.

    A relative path is looked for from the adapter's own directory upwards, and then from the
    working directory.
    """
    directory = Path(name_or_path)
    if directory.is_dir():
        config = directory / ADAPTER_CONFIG
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        try:
            config = find_adapter_config_file(name_or_path)
        except Exception:  # of no such name; loading it says so
            config = None
    if config is None or not Path(config).is_file():
        return None
    base = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if directory.is_dir() and not Path(base).is_absolute():
        above = (parent / base for parent in directory.resolve().parents)
        base = next((str(path) for path in above if (path / "config.json").is_file()), base)
    return base


def load_adapter(model: Any, name_or_path: str) -> dict[str, Any]:
    """Put a saved adapter into the model; returns transformers' loading info.

    Raises:
        UserError: peft is not installed, or the adapter's files do not fit the model.
    """
    require_peft()
    try:
        info = model.load_adapter(name_or_path)
    except Exception as error:
        reason = reason_of(error)
        raise UserError(f"cannot load the adapter in {name_or_path!r}: {reason}") from error
    return info.to_dict()


def is_brought(model: Any, name: str) -> bool:
    """Whether the adapter in the model has a weight of its own for the base's `name`."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(model.get_submodule(name.rpartition(".")[0]), ModulesToSaveWrapper)


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
        UserError: peft is not installed, no layer is called so, or one that has its weight in
            common with another, to which an adapter could not be added in the end.
    """
    require_peft()
    from peft import LoraConfig

    names = list(target_modules)
    is_classifier = hasattr(model, NEW_HEAD)
    unfit = _routers(model) + _sharing(model)
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        fan_in_fan_out=transposed,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        exclude_modules=unfit if names == [ALL_LINEAR] and unfit else None,
        modules_to_save=[NEW_HEAD] if is_classifier else None,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(config)
    except ValueError as error:
        raise UserError(f"lora_target_modules {' '.join(names)}: {reason_of(error)}") from error
    # a step of the optimizer is finer than half precision; what is frozen may stay in it
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _check_merges(model)
    base = Path(getattr(model, "name_or_path", ""))
    if base.is_dir():
        # a relative path would mean something else to whoever loads the adapter elsewhere
        for written in model.peft_config.values():
            written.base_model_name_or_path = str(base.resolve())


def _routers(model: Any) -> list[str]:
    """The routers that are linear layers: they give more than one output, so no adapter fits."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "Router" in type(module).__name__
    ]


def _sharing(model: Any) -> list[str]:
    """The layers that have a weight in common: what is added to it for one is added for all."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := vars(module)["_parameters"].get("weight"), torch.nn.Parameter):
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    return [name for names in owners.values() if len(names) > 1 for name in names]


def _check_merges(model: Any) -> None:
    """Raise UserError where an adapter stands beside a weight that other layers use too."""
    shared = set(_sharing(model))
    for name, module in model.named_modules():
        if name in shared and _is_adapter_layer(module):
            raise UserError(
                f"an adapter on {name} cannot be merged, as the layer has its weight in common "
                "with another: leave it out of lora_target_modules"
            )


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
    """Add the adapter into the weights it stands beside; the model is then a plain one.

    Raises:
        UserError: a weight is used by other layers as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _check_merges(model)
    layers = {name: module for name, module in model.named_modules() if _is_adapter_layer(module)}
    # a layer of experts is wrapped once for each of its weights: all go in, then the outermost off
    for layer in layers.values():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    for name, layer in layers.items():
        if not any(name.startswith(f"{other}.") for other in layers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _without_wrapper(layer))
    model._hf_peft_config_loaded = False
    del model.peft_config
    # transformers noted how the adapter's file names its weights, and would save the model's so
    vars(model).pop("_weight_conversions", None)
    return model.requires_grad_(True)


def _without_wrapper(layer: Any) -> torch.nn.Module:
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.modules_to_save[layer.active_adapters[0]]
    return layer.get_base_layer()


def _is_adapter_layer(module: torch.nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def checkpoint_adapters_alone(accelerator: Any) -> None:
    """From now on the accelerator's checkpoints hold a model's adapter, not its frozen weights."""

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        if not weights:  # sharded: accelerate has written every process's part, base and adapter
            return
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
