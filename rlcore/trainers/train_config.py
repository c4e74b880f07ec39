"""The options that every trainer has, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlcore.checkpoint import check_output_dir
from rlcore.errors import UserError, unknown_name
from rlcore.tracking import check_report_to
from rlcore.trainers.schedules import check_schedule

FUSED_HEAD = ("on", "off")


@dataclass(kw_only=True)
class TrainConfig:
    """Options of every trainer."""

    model: str  # directory or hub name of the causal language model to start from
    dataset: str  # .jsonl, .json, .csv or .parquet file, or a dataset's hub name
    output_dir: str  # where the model, its checkpoints and metrics.jsonl go
    overwrite_output_dir: bool = False  # replace an earlier run in output_dir
    resume: bool = False  # go on from output_dir's last complete checkpoint
    seed: int = 0  # of data order, dropout and sampling

    # Optimization

    learning_rate: float = 1e-6  # its peak
    lr_scheduler_type: str = "linear"  # constant, linear, cosine or warmup_stable_decay
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    lr_min_ratio: float = 0.0  # the share of the peak that the learning rate decays to
    lr_decay_ratio: float | None = None  # the last share of steps that warmup_stable_decay decays
    max_steps: int = -1  # optimizer steps; -1: as many as num_train_epochs need
    num_train_epochs: float = 1.0  # passes over the data, where max_steps is -1
    per_device_train_batch_size: int = 8  # sequences in a micro-step on each process
    gradient_accumulation_steps: int = 1  # micro-steps an optimizer step
    weight_decay: float = 0.0  # AdamW's, on matrices only
    adam_beta1: float = 0.9  # AdamW's first decay rate
    adam_beta2: float = 0.999  # AdamW's second decay rate
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: they are not
    bf16: bool = False  # compute in bfloat16, weights stay float32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    fused_head: str = "on"  # losses straight from the head's input, without logits: on, off

    # Logging and saving

    logging_steps: int = 1  # optimizer steps between lines of metrics
    save_steps: int = 0  # optimizer steps between checkpoints; 0: none
    save_total_limit: int | None = None  # how many checkpoints stay
    eval_dataset: str | None = None  # held-out rows, like dataset
    eval_steps: int = 0  # optimizer steps between evaluations; 0: at the end only
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb


def check_train_config(config: TrainConfig) -> None:
    """Raise UserError for an option out of its range, and for an output_dir that is not free."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in ("warmup_steps", "save_steps", "eval_steps", "weight_decay", "max_grad_norm"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative, it is {getattr(config, name)}")
    check_report_to(config.report_to)
    if config.fused_head not in FUSED_HEAD:
        raise unknown_name("fused_head", config.fused_head, FUSED_HEAD)
    if not config.learning_rate > 0:
        raise UserError(f"learning_rate must be positive, not {config.learning_rate}")
    if config.max_steps != -1 and config.max_steps < 1:
        raise UserError(f"max_steps must be at least 1, or -1, not {config.max_steps}")
    if config.max_steps == -1 and not config.num_train_epochs > 0:
        raise UserError(f"num_train_epochs must be positive, not {config.num_train_epochs}")
    if config.eval_steps and config.eval_dataset is None:
        raise UserError("eval_steps is set, but there is no eval_dataset to evaluate on")
    if config.save_total_limit is not None and config.save_total_limit < 1:
        raise UserError(f"save_total_limit must be at least 1, not {config.save_total_limit}")
    check_schedule(config)
    check_output_dir(config.output_dir, overwrite=config.overwrite_output_dir, resume=config.resume)
