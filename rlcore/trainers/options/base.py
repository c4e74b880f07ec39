"""The options that every trainer has, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from rlcore.errors import UserError, unknown_name
from rlcore.models.adapters import ALL_LINEAR, is_adapter, require_peft
from rlcore.models.quantized import require_bitsandbytes
from rlcore.runs.checked import Checked
from rlcore.runs.hub import check_hub
from rlcore.runs.options import OBJECT, REQUIRED, default_of
from rlcore.runs.output_dir import check_apart, check_output_dir
from rlcore.runs.ranges import (
    BelowOne,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Share,
    Steps,
    check_ranges,
)
from rlcore.runs.reporting import check_report_to
from rlcore.runs.resuming import check_same_options, places_of
from rlcore.trainers.options.load import LoadConfig, check_load_config
from rlcore.trainers.options.schedules import check_schedule

FUSED_HEAD = ("on", "off")
ADAPTERS = ("lora",)
KEEP_BEST = ("auto", "none")


@dataclass(kw_only=True)
class TrainConfig(LoadConfig, Checked):
    """Options of every trainer."""

    # directory or hub name of the causal language model to start from
    model: str = field(default=None, metadata=REQUIRED | {OBJECT: True})
    # .jsonl, .json, .csv, .parquet or .arrow file; or a directory or hub name, for its train split
    # or, as NAME:CONFIG/SPLIT, another; of several all rows
    dataset: str | list[str] = field(default=None, metadata=REQUIRED | {OBJECT: True})
    prompt_column: str = "prompt"  # what the column of the prompts is called in all data
    # where the model, its checkpoints and metrics.jsonl go
    output_dir: str = field(default=None, metadata=REQUIRED)
    overwrite_output_dir: bool = False  # replace output_dir's earlier run once this has finished
    resume: bool = False  # go on from output_dir's last complete checkpoint
    seed: Seed = 0  # of data order, dropout and sampling

    # Optimization

    learning_rate: Positive = 1e-6  # its peak
    lr_scheduler_type: str = "linear"  # constant, linear, cosine or warmup_stable_decay
    warmup_steps: Natural = 0  # optimizer steps of linear warm-up
    warmup_ratio: Fraction = 0.0  # the same as a share of all steps
    lr_min_ratio: Fraction = 0.0  # the share of the peak that the learning rate decays to
    # the last share of steps that warmup_stable_decay decays
    lr_decay_ratio: Share | None = None
    max_steps: Steps = -1  # optimizer steps; -1: as many as num_train_epochs need
    num_train_epochs: Positive = 1.0  # passes over the data, where max_steps is -1
    per_device_train_batch_size: Count = 8  # sequences in a micro-step on each process
    gradient_accumulation_steps: Count = 1  # micro-steps an optimizer step
    weight_decay: NotNegative = 0.0  # AdamW's, on matrices only
    adam_beta1: BelowOne = 0.9  # AdamW's first decay rate
    adam_beta2: BelowOne = 0.999  # AdamW's second decay rate
    max_grad_norm: NotNegative = 1.0  # gradients are clipped to this norm; 0: they are not
    # weight of the load-balancing loss that a mixture of experts adds to a trainer's
    router_aux_loss_coef: NotNegative = 0.0
    bf16: bool = False  # compute in bfloat16, weights stay as they are
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    fused_head: str = "on"  # losses straight from the head's input, without logits: on, off

    # Adapter

    peft: str | None = None  # lora: train an adapter beside the frozen weights
    lora_r: Count = 16  # the adapter's rank
    lora_alpha: Positive = 32.0  # the adapter's output is scaled by lora_alpha / lora_r
    lora_dropout: BelowOne = 0.0  # dropout before the adapter
    load_in_4bit: bool = False  # hold the frozen weights in 4 bit (QLoRA)
    # endings of the names of the layers to adapt; all-linear: all but the output head
    lora_target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])

    # Logging and saving

    logging_steps: Count = 1  # optimizer steps between lines of metrics
    save_steps: Natural | None = None  # steps between checkpoints; None: a tenth of all; 0: none
    # how many checkpoints stay; None: all where save_steps is given, else 2, so that the disk lasts
    save_total_limit: Count | None = None
    # held-out rows, like dataset; of splits the held-out one. NAME=DATASET ...: several sets, each
    # measured by itself
    eval_dataset: str | list[str] | None = field(default=None, metadata={OBJECT: True})
    eval_steps: Natural = 0  # optimizer steps between evaluations; 0: at start and end only
    # sequences, or prompts, of an evaluation at a time; None: as many as in training
    per_device_eval_batch_size: Count | None = None
    # the metric whose best model stays in output_dir/best, as eval/reward; auto: the held-out
    # reward, accuracy or loss where eval_steps is set; none: no model
    keep_best: str = "auto"
    # end after so many evaluations in a row without a better one; None: go on
    early_stopping_patience: Count | None = None
    # tensorboard, wandb, trackio, mlflow, swanlab
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None  # in those trackers; None: the output directory's name
    push_to_hub: str | None = None  # repository on the hub for the finished model, as owner/name

    @property
    def policy_loading(self) -> dict[str, Any]:
        """What the functions that load models take for the one to train."""
        compute = torch.bfloat16 if self.bf16 else "auto"
        return self.loading | {"four_bit": compute if self.load_in_4bit else None}

    @property
    def eval_batch_size(self) -> int:
        """Sequences, or prompts, of an evaluation that each process takes at a time."""
        return self.per_device_eval_batch_size or self.per_device_train_batch_size


def check_train_config(config: TrainConfig) -> None:
    """Raise UserError for an option out of its range, and for an output_dir that is not free."""
    for name in ("model", "dataset", "output_dir"):
        if getattr(config, name) is None:
            raise UserError(f"{name} is not given: name it in the {type(config).__name__}")
    check_ranges(config)
    check_load_config(config)
    check_report_to(config.report_to)
    if config.fused_head not in FUSED_HEAD:
        raise unknown_name("fused_head", config.fused_head, FUSED_HEAD)
    if config.max_steps == 0:
        raise UserError(f"max_steps must be at least 1, or -1, not {config.max_steps}")
    _check_evaluation(config)
    check_schedule(config)
    _check_adapter(config)
    if config.push_to_hub is not None:
        check_hub(config.push_to_hub)
    check_apart(config.output_dir, places_of(config))
    check_output_dir(config.output_dir, overwrite=config.overwrite_output_dir, resume=config.resume)
    if config.resume:
        check_same_options(config)


def _check_evaluation(config: TrainConfig) -> None:
    if config.eval_dataset is None:
        for name, unset in {"eval_steps": (0,), "keep_best": KEEP_BEST}.items():
            if getattr(config, name) not in unset:
                raise UserError(f"{name} is set, but there is no eval_dataset to evaluate on")
    if config.early_stopping_patience is not None and not config.eval_steps:
        raise UserError(
            "early_stopping_patience counts evaluations, and without eval_steps there are none "
            "before the end: set eval_steps"
        )


def _check_adapter(config: TrainConfig) -> None:
    if config.load_in_4bit:
        _check_4bit(config)
    if config.peft is None:
        for each in fields(config):
            is_set = getattr(config, each.name) != default_of(each)
            if each.name.startswith("lora_") and is_set:
                raise UserError(
                    f"{each.name} is set, but without peft there is no adapter: add --peft lora, "
                    "or leave it out"
                )
        return
    if config.peft not in ADAPTERS:
        raise unknown_name("peft", config.peft, ADAPTERS)
    if not config.lora_target_modules:
        raise UserError("lora_target_modules is empty: name layers, or all-linear")
    require_peft()
    if not isinstance(config.model, str):
        if not getattr(config.model, "name_or_path", ""):
            raise UserError(
                "peft saves the adapter alone, and the model that was given has no name that it "
                "could be put on again: save the model, and give its directory"
            )
    elif is_adapter(config.model):
        # the new adapter would name as its model one that lies nowhere
        raise UserError(
            f"model {config.model!r} is an adapter, and peft would put another on it: make it a "
            "whole model first with `rlcore merge`"
        )


def _check_4bit(config: TrainConfig) -> None:
    if config.peft is None:
        raise UserError(
            "load_in_4bit freezes the weights, and without an adapter none would be trained: add "
            "--peft lora, or leave it out"
        )
    if getattr(config, "sampler", "local") != "local":
        raise UserError(
            "load_in_4bit goes with sampler local: a server samples from whole weights, and the "
            "policy's are rounded to 4 bit"
        )
    require_bitsandbytes()
