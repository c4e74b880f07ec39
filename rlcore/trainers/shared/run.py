"""What a trainer holds, and how it starts: the accelerator, the model on it, the optimizer.

Order of data, learning rate and sampling seeds are functions of the seed and the step alone, so a
resumed run needs nothing but weights, optimizer and random states to go on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlcore.data.ends import missing_end, set_end_tokens
from rlcore.errors import UserError
from rlcore.models.adapters import add_lora, checkpoint_adapters_alone
from rlcore.models.heads import Head, LogitsHead, choose_head
from rlcore.models.router_loss import RouterLoss
from rlcore.runs import checkpoint, output_dir
from rlcore.runs.facts import facts_of
from rlcore.runs.resuming import (
    check_same_inputs,
    check_same_options,
    fingerprints_of,
)
from rlcore.runs.samples import Sample
from rlcore.sampling.sampler import Sampler
from rlcore.trainers.options.base import TrainConfig
from rlcore.trainers.shared.given import Callback
from rlcore.trainers.shared.metrics import Moments
from rlcore.trainers.shared.stopping import StopRequest


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last step: all of its lines in metrics.jsonl
    model: Any  # unwrapped, on its device
    best: Path | None = None  # the directory of the model that did best on held-out data


@dataclass
class Best:
    """The best that was measured on held-out data so far."""

    metric: str | None = None
    value: float | None = None
    step: int = 0
    misses: int = 0  # measurements since then


@dataclass
class Run:
    """What a trainer holds: the machine, the model on it, and how far it has come."""

    config: TrainConfig
    accelerator: Any
    model: Any  # as prepared: possibly wrapped
    optimizer: Any
    tokenizer: Any
    total_steps: int
    first_step: int = 0  # optimizer steps that were done before this run
    num_tokens: float = 0.0  # seen so far, by all processes
    reward_moments: Moments = field(default_factory=Moments)  # of all rewards so far
    head: Head = field(default_factory=LogitsHead)  # how losses are had from the model
    router: RouterLoss | None = None  # the load-balancing loss of its experts, where it counts
    notes: list[str] = field(default_factory=list)  # what the user should know at the start
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of data and models
    stop: StopRequest = field(default_factory=StopRequest)
    coefficients: dict[str, float] = field(default_factory=dict)  # those that the run adapts
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by split, to be shown next
    best: Best = field(default_factory=Best)
    facts: dict[str, Any] = field(default_factory=dict)  # what a reader of the run wants to know
    tracker: Any | None = None
    sampler: Sampler | None = None  # of a run that samples
    callbacks: Sequence[Callback] = ()
    step: int = 0  # the last step that was begun
    prefix: str = ""  # of its quantities' names in errors

    def tell(self, event: str, *arguments: Any) -> None:
        """Call that method of every callback, on the main process."""
        for callback in self.callbacks if self.accelerator.is_main_process else ():
            if hasattr(callback, event):
                getattr(callback, event)(*arguments)

    def phase(self, name: str) -> None:
        """Say on the screen what begins now."""
        # a caller's own tracker may only log
        if hasattr(self.tracker, "phase"):
            self.tracker.phase(name)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left; they may come to an early end."""
        step = self.first_step
        while step < self.total_steps:
            step += 1
            yield step

    @property
    def policy(self) -> Any:
        """The model without its wrappers, for generation and saving."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_sharded(self) -> bool:
        """Every process must then run equally many forward passes."""
        return str(self.accelerator.distributed_type).endswith("FSDP")

    @property
    def wants_fused_head(self) -> bool:
        # a sharded head has no weight at hand outside the model's own forward
        return self.config.fused_head == "on" and not self.is_sharded


def make_accelerator(config: TrainConfig) -> Any:
    """The accelerator for this process, with the global random generators seeded."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, set_seed

    precision = "bf16" if config.bf16 else "no"
    # The precision is the process's; a later run in the same process may want another.
    state = AcceleratorState._shared_state
    if state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    # Buffers (rotary frequencies) are constants. DDP would send them around before a forward pass,
    # which not every process runs equally often.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[ddp])
    # Weights are loaded, not drawn, so processes may differ: their dropout should.
    set_seed((config.seed + accelerator.process_index) % 2**32)
    return accelerator


def total_steps(config: TrainConfig, rows: int, rows_per_step: float) -> int:
    """Optimizer steps of the run: max_steps, or what num_train_epochs over `rows` come to."""
    if config.max_steps != -1:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * rows / rows_per_step))


def start_run(
    config: TrainConfig,
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    steps: int,
    beside: Callable[[Run], None] | None = None,
    *,
    data: Iterable[Any] = (),
    notes: Iterable[str] = (),
) -> Run:
    """Prepare model and optimizer, and resume where that was asked; writes nothing.

    `beside` prepares what else the run trains and its checkpoints are to hold; `data` is what it
    trains on, row by row; `notes` are what the user should know of it.
    """
    if config.load_in_4bit and str(accelerator.distributed_type).endswith("FSDP"):
        raise UserError("load_in_4bit: weights in 4 bit cannot be sharded; launch without FSDP")
    if config.peft is not None:
        add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            seed=config.seed,
        )
        checkpoint_adapters_alone(accelerator)
    set_end_tokens(model, tokenizer)
    run = Run(config, accelerator, model, None, tokenizer, steps)
    run.head, head_note = choose_head(model, run.wants_fused_head)
    if config.router_aux_loss_coef:
        run.router = RouterLoss(model, config.router_aux_loss_coef)
    if head_note:
        run.notes.append(f"the fused head is off: {head_note}")
    if end_note := missing_end(tokenizer):
        run.notes.append(end_note)
    run.notes += notes
    run.facts = facts_of(model, len(data) if isinstance(data, Sized) else None)
    on_main(accelerator, lambda: _compare_with_before(run, data))
    run.model, run.optimizer = accelerator.prepare(model, make_optimizer(model, config))
    if beside is not None:
        beside(run)
    if config.resume:
        _load_last_checkpoint(run)
    return run


def _compare_with_before(run: Run, data: Iterable[Any]) -> None:
    """Note what the run reads; where it is resumed, that must be what it read before."""
    run.inputs = fingerprints_of(run.config, data)
    if run.config.resume:
        check_same_inputs(run.config, run.inputs)
        changes = check_same_options(run.config)
        run.notes += [changes] if changes else []


def _load_last_checkpoint(run: Run) -> None:
    previous, damaged = on_main(
        run.accelerator, lambda: output_dir.last_intact(run.config.output_dir)
    )
    run.notes += damaged
    state = checkpoint.load_checkpoint(run.accelerator, previous)
    if state["step"] > run.total_steps:
        raise UserError(f"{previous} is beyond this run's last step, {run.total_steps}")
    if state["step"] == run.total_steps:
        steps = run.total_steps
        run.notes.append(f"the run's {steps} steps were done before: nothing is left to train")
    run.step = run.first_step = state["step"]
    run.num_tokens = state["num_tokens"]
    run.reward_moments = Moments(**state["reward_moments"])
    run.coefficients.update(state["coefficients"])
    run.best = Best(**state["best"])


def on_main(accelerator: Any, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main process; its UserError every process raises."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    value, error = outcome
    if error is not None:
        raise error
    return value


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases and norms (one-dimensional parameters) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )
