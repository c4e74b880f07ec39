"""What every trainer does the same way: start, data order, optimizer step, checkpoints, end.

Order of data, learning rate and sampling seeds are functions of the seed and the step alone, so a
resumed run needs nothing but weights, optimizer and random states to go on exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from rlcore.data.ends import missing_end, set_end_tokens
from rlcore.errors import TrainingStopped, UserError
from rlcore.models.adapters import add_lora, checkpoint_adapters_alone
from rlcore.models.heads import Head, LogitsHead, choose_head
from rlcore.models.loading import no_progress_bars
from rlcore.runs import checkpoint, output_dir
from rlcore.runs.atomic import remove_leftovers
from rlcore.runs.config import plain_values, save_config
from rlcore.runs.facts import facts_of, in_words
from rlcore.runs.hub import push
from rlcore.runs.reading import read_run
from rlcore.runs.report.card import write_card
from rlcore.runs.report.page import write_page
from rlcore.runs.resuming import (
    START_OPTIONS,
    check_same_inputs,
    check_same_options,
    fingerprints_of,
)
from rlcore.runs.run_record import note_facts, note_start, note_written, read_record
from rlcore.runs.samples import Sample, write_table
from rlcore.runs.tracking import Tracker
from rlcore.trainers.options.base import TrainConfig
from rlcore.trainers.options.schedules import learning_rate_scale
from rlcore.trainers.shared.divergence import check_sound, require_finite
from rlcore.trainers.shared.given import Callback, Given, callbacks_of
from rlcore.trainers.shared.metrics import Log, Moments
from rlcore.trainers.shared.stopping import StopRequest, stop_request

Item = TypeVar("Item")


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
    notes: list[str] = field(default_factory=list)  # what the user should know at the start
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of data and models
    stop: StopRequest = field(default_factory=StopRequest)
    coefficients: dict[str, float] = field(default_factory=dict)  # those that the run adapts
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by split, to be shown next
    best: Best = field(default_factory=Best)
    facts: dict[str, Any] = field(default_factory=dict)  # what a reader of the run wants to know
    tracker: Any | None = None
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
    if head_note:
        run.notes.append(f"the fused head is off: {head_note}")
    if end_note := missing_end(tokenizer):
        run.notes.append(end_note)
    run.notes += notes
    run.facts = facts_of(model, len(data) if isinstance(data, Sized) else None)
    _on_main(accelerator, lambda: _compare_with_before(run, data))
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
    previous, damaged = _on_main(
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


def _on_main(accelerator: Any, action: Callable[[], Any]) -> Any:
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


@contextlib.contextmanager
def tracking(run: Run, given: Given, description: str, columns: Iterable[str]) -> Iterator[Any]:
    """The caller's open tracker or one of our own, while the output directory is the run's.

    Signals ask the run to stop meanwhile. Writing begins here: until now all processes could look
    at the directory as it was.
    """
    with contextlib.ExitStack() as held:
        run.stop = held.enter_context(stop_request())
        # until every process has looked at the directory as it was
        run.accelerator.wait_for_everyone()
        _on_main(run.accelerator, lambda: _claim(run, held))
        run.callbacks = callbacks_of(given)
        tracker = given.get("tracker") or held.enter_context(
            _own_tracker(run, description, columns)
        )
        run.tracker = tracker
        for note in run.notes if run.accelerator.is_main_process else ():
            tracker.message(note)
        yield tracker
    # the processes meet here: none returns before the model is saved
    if signal_number := _asked_to_stop(run):
        raise _stopped(run, signal_number, run.total_steps)


def _claim(run: Run, held: contextlib.ExitStack) -> None:
    """Make the output directory this run's while `held` is; begin its record."""
    config, directory = run.config, Path(run.config.output_dir)
    claim = output_dir.claimed(
        directory, overwrite=config.overwrite_output_dir, resume=config.resume
    )
    run.notes += held.enter_context(claim)
    remove_leftovers(directory, output_dir.STAGED)
    before = read_record(directory)
    run.facts["id"] = (before and before.facts.get("id")) or uuid.uuid4().hex
    note_start(directory, type(config).__name__, run.inputs)
    note_facts(directory, run.facts | {"notes": run.notes})
    save_config(config, directory / output_dir.CONFIG_FILE, without=START_OPTIONS)


def _own_tracker(run: Run, description: str, columns: Iterable[str]) -> Tracker:
    return Tracker(
        run.config.output_dir,
        run.total_steps,
        description,
        columns=columns,
        report_to=run.config.report_to,
        enabled=run.accelerator.is_main_process,
        start_step=run.first_step,
        config=plain_values(run.config),
        run_name=run.config.run_name,
        run_id=run.facts.get("id"),
        subtitle=_subtitle(run),
    )


def _subtitle(run: Run) -> str:
    """Where the run is, what it trains and on how much: runs/grpo  Qwen2 0.34M, 294 rows."""
    facts = run.facts
    kind = facts["model"].removesuffix("ForCausalLM").removesuffix("ForSequenceClassification")
    words = f"{run.config.output_dir}  {kind} {in_words(facts['parameters'])}"
    return words if facts["rows"] is None else f"{words}, {facts['rows']} rows"


@functools.lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(rows, generator=generator).tolist()


def batch_indices(rows: int, size: int, number: int, seed: int) -> list[int]:
    """The rows of batch `number` (from 0): a cut from one endless row of shuffled epochs."""
    positions = range(number * size, (number + 1) * size)
    return [_epoch_order(rows, seed, place // rows)[place % rows] for place in positions]


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, order and all; neighbours come out far apart."""
    mixed = 0
    for part in parts:
        # Multiply-xorshift with Knuth's 64-bit multiplier.
        mixed = ((mixed ^ part) + 1) * 6364136223846793005 % (1 << 64)
        mixed ^= mixed >> 29
    return mixed % (1 << 63)


def split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive pieces of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def shared_out(run: Run, ordered: Sequence[Item], size: int) -> list[tuple[Sequence[Item], bool]]:
    """This process's part of `ordered` in batches of at most `size`, each with whether it counts.

    Every process gets equally many: one that runs short repeats an item that does not count,
    because a sharded model's forward pass is every process's.
    """
    accelerator = run.accelerator
    mine = ordered[accelerator.process_index :: accelerator.num_processes]
    batches = [(piece, True) for piece in split(mine, size)]
    most = math.ceil(math.ceil(len(ordered) / accelerator.num_processes) / size)
    return batches + [(ordered[:1], False)] * (most - len(batches))


def summed(accelerator: Any, value: float) -> float:
    """The sum of one number over all processes."""
    if accelerator.num_processes == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, "sum").item()


def optimizer_step(
    run: Run, step: int, batches: Sequence[Item], loss_of: Callable[[Item], torch.Tensor]
) -> dict[str, float]:
    """One optimizer step on the summed loss of `batches`: {"loss", "grad_norm", "learning_rate"}.

    `loss_of` divides by the count of the whole batch over the number of processes: gradients are
    then averaged over processes and add up to the whole batch's.

    Raises:
        TrainingDiverged: the loss or the gradient's norm is not finite; nothing was changed then.
    """
    accelerator = run.accelerator
    run.step = step
    run.phase("updating")
    rate = set_learning_rate(run, step)
    run.optimizer.zero_grad()
    losses = []
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.model):
            loss = loss_of(batch)
            accelerator.backward(loss)
        losses.append(loss.detach())
    loss = accelerator.reduce(torch.stack(losses).sum(), "mean").item()
    grad_norm = clip_gradients(run)
    require_finite(run, step, {"loss": loss, "grad_norm": grad_norm})
    run.optimizer.step()
    return {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}


def set_learning_rate(run: Run, step: int) -> float:
    """Give the optimizer the rate that its schedule has for `step`; returns it."""
    config = run.config
    rate = config.learning_rate * learning_rate_scale(config, step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(run: Run) -> float:
    """Scale the gradients down to the norm max_grad_norm; returns the norm that they had."""
    limit = run.config.max_grad_norm or math.inf
    if isinstance(run.policy, FSDPModule):
        # accelerate looks for the model by comparing its parameters, which fails beside another's
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
        return float(norm.full_tensor())
    return float(run.accelerator.clip_grad_norm_(run.model.parameters(), limit))


def save_if_due(run: Run, step: int, unit: int = 1) -> None:
    """A checkpoint where `step` ends a unit of steps in which a multiple of save_steps lies.

    Raises:
        TrainingStopped: a signal has asked one of the processes to stop; the checkpoint is there.
        TrainingDiverged: there is something in it that is not finite; nothing was written then.
    """
    if step % unit:
        return
    every, keep = _saving(run)
    signal_number = 0 if step == run.total_steps else _asked_to_stop(run)
    if not signal_number and (not every or step // every == (step - unit) // every):
        return
    check_sound(run, step)
    directory = checkpoint.save_checkpoint(
        run.accelerator,
        run.config.output_dir,
        step,
        tokenizer=run.tokenizer,
        state={
            "num_tokens": run.num_tokens,
            "reward_moments": dataclasses.asdict(run.reward_moments),
            "coefficients": run.coefficients,
            "best": dataclasses.asdict(run.best),
        },
        keep=keep,
    )
    run.tell("on_save", step, directory)
    if signal_number:
        raise _stopped(run, signal_number, step, directory)


def _saving(run: Run) -> tuple[int, int | None]:
    """(steps between checkpoints, how many stay): those asked for all, of the others two."""
    every, keep = run.config.save_steps, run.config.save_total_limit
    if every is None:
        return math.ceil(run.total_steps / 10), 2 if keep is None else keep
    return every, keep


def _asked_to_stop(run: Run) -> int:
    """The signal that has asked any of the processes to stop, 0 where none has."""
    if run.accelerator.num_processes == 1:
        return run.stop.signal
    signals = torch.tensor([run.stop.signal], device=run.accelerator.device)
    return int(run.accelerator.gather(signals).max())


def _stopped(run: Run, number: int, step: int, directory: Path | None = None) -> TrainingStopped:
    return TrainingStopped(signal.Signals(number).name, step, run.config.output_dir, directory)


def whole_weights(run: Run) -> dict[str, torch.Tensor] | None:
    """A sharded model's weights brought together on the main process; None where it has them all.

    Every process calls it, and gives its shards.
    """
    return run.accelerator.get_state_dict(run.model) if run.is_sharded else None


def _write_up(run: Run) -> None:
    """The run for its readers: report.html, and README.md, the model's card."""
    directory = Path(run.config.output_dir)
    if not (directory / output_dir.METRICS_FILE).is_file():
        return  # the caller's own tracker keeps them elsewhere
    note_written(directory, [output_dir.PAGE, output_dir.COMPLETIONS_TABLE])
    try:
        if getattr(run.config, "completions_format", None) == "parquet":
            write_table(directory)
        finished = read_run(directory)
        write_card(finished, directory / output_dir.CARD)
        write_page([finished], directory / output_dir.PAGE)
    except UserError as error:
        # the model is there: that is what the run was for
        run.tracker.message(f"no {output_dir.CARD} and {output_dir.PAGE}: {error}")


def _push(run: Run) -> None:
    if run.config.push_to_hub is None:
        return
    run.phase("pushing")
    try:
        run.tracker.message(f"pushed to {push(run.config.output_dir, run.config.push_to_hub)}")
    except UserError as error:
        run.tracker.message(str(error))


def finish_run(run: Run, log: Log, beside: Callable[[Path], None] | None = None) -> Result:
    """Save the model into output_dir and say how the run ended.

    `beside` saves what else the run has trained.

    Raises:
        TrainingDiverged: a weight, or what the model gives, is not finite; nothing is saved then.
    """
    check_sound(run, run.total_steps)
    if beside is not None:
        beside(Path(run.config.output_dir))
    weights = whole_weights(run)
    if run.accelerator.is_main_process:
        with no_progress_bars():
            checkpoint.save_model(run.policy, run.tokenizer, run.config.output_dir, weights)
        _write_up(run)
        _push(run)
    run.tell("on_save", run.total_steps, Path(run.config.output_dir))
    output = Path(run.config.output_dir)
    best = output / output_dir.BEST
    return Result(output, run.total_steps, log.last, run.policy, best if best.is_dir() else None)
