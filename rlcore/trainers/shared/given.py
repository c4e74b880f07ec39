"""What a caller gives a trainer besides its config: objects in the place of names, callbacks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from typing_extensions import Unpack

from rlcore.errors import UserError, unknown_name
from rlcore.models.loading import load_policy, load_tokenizer, made_ready
from rlcore.trainers.options.base import TrainConfig

__all__ = ["Callback", "Given", "Unpack"]

Config = TypeVar("Config", bound=TrainConfig)


class Callback(Protocol):
    """What one wants to hear of a run; override what one needs. The main process alone calls it.

    Any object will do that has one of the methods.
    """

    # each returns: type checkers take a method of nothing but words for an abstract one

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After every optimizer step, with its metrics."""
        return None

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """After every evaluation on held-out data: {"eval/...": value}."""
        return None

    def on_save(self, step: int, directory: Path) -> None:
        """After a checkpoint, or the finished model, is whole in `directory`."""
        return None


class Given(TypedDict, total=False):
    """Arguments of every `train_*`, all by name; an object stands for the config's name of it.

    model: a transformers model to train, in place; its `config.model` is then None.
    tokenizer: the model's; None: that of the place where the model was loaded from.
    dataset, eval_dataset: a datasets.Dataset or a list of rows, dicts.
    callbacks: one Callback or several, told of steps, evaluations and saves.
    tracker: an open Tracker to log to; None makes one in `config.output_dir`.
    """

    model: Any
    tokenizer: Any
    dataset: Any
    eval_dataset: Any
    callbacks: Callback | Sequence[Callback]
    tracker: Any


def with_objects(config: Config, given: Given) -> Config:
    """The config with the objects that were given in the place of their names.

    Raises:
        UserError: an unknown argument, or something given twice.
    """
    for name in given:
        if name not in Given.__annotations__:
            raise unknown_name("argument", name, Given.__annotations__)
    objects = {
        name: given[name]
        for name in ("model", "dataset", "eval_dataset")
        if given.get(name) is not None
    }
    callbacks_of(given)
    for name in objects:
        if getattr(config, name) is not None:
            named = f"in the config ({getattr(config, name)})"
            raise UserError(f"{name} is given twice, as an argument and {named}: leave one out")
    return dataclasses.replace(config, **objects)


def callbacks_of(given: Given) -> tuple[Callback, ...]:
    """The callbacks that were given.

    Raises:
        UserError: one that would hear of nothing.
    """
    found = given.get("callbacks") or ()
    found = tuple(found) if isinstance(found, list | tuple) else (found,)
    moments = [name for name in vars(Callback) if name.startswith("on_")]
    for each in found:
        if isinstance(each, type) or not any(hasattr(each, name) for name in moments):
            raise UserError(
                f"callbacks holds {each!r:.80}, which is no object with one of the methods "
                f"{', '.join(moments)}: see rlcore.trainers.Callback"
            )
    return found


def tokenizer_of(config: TrainConfig, given: Given) -> Any:
    """The tokenizer that was given, or that of the config's model, ready to train with.

    Raises:
        UserError: there is none, or it lacks a token that training needs.
    """
    if given.get("tokenizer") is not None:
        # a copy: it is told on which side to pad
        return _ready(config, copy.deepcopy(given["tokenizer"]))
    if isinstance(config.model, str):
        return load_tokenizer(config.model, **config.reading)
    source = config.model.config.name_or_path
    if not source:
        raise UserError("tokenizer: give the model's, as it was loaded from nowhere")
    return load_tokenizer(source, **config.reading)


def _ready(config: TrainConfig, tokenizer: Any) -> Any:
    reading = {name: v for name, v in config.reading.items() if name != "trust_remote_code"}
    return made_ready(tokenizer, "tokenizer", **reading)


def policy_of(config: TrainConfig, *, dropout: bool = True) -> Any:
    """The model to train, as the config says to load it; `dropout=False` switches it off.

    Raises:
        UserError: nothing loadable there, or no model to train.
    """
    model = load_policy(
        config.model,
        gradient_checkpointing=config.gradient_checkpointing,
        dropout=dropout,
        **config.policy_loading,
    )
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16:
        raise UserError(
            "the model's weights are float16, whose gradients would vanish: say dtype bfloat16 or "
            "float32"
        )
    return model
