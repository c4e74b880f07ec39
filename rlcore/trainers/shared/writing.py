"""What a run writes: its directory while it is the run's, checkpoints, the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rlcore.errors import TrainingStopped, UserError
from rlcore.models.pretrained import no_progress_bars
from rlcore.runs import checkpoint, output_dir
from rlcore.runs.atomic import remove_leftovers
from rlcore.runs.config import plain_values, save_config
from rlcore.runs.facts import in_words
from rlcore.runs.hub import push
from rlcore.runs.reading import read_run
from rlcore.runs.report.card import write_card
from rlcore.runs.report.page import write_page
from rlcore.runs.resuming import (
    START_OPTIONS,
)
from rlcore.runs.run_record import note_facts, note_start, note_written, read_record
from rlcore.runs.samples import write_table
from rlcore.runs.tracking import Tracker
from rlcore.trainers.shared.divergence import check_sound
from rlcore.trainers.shared.given import Given, callbacks_of
from rlcore.trainers.shared.metrics import Log
from rlcore.trainers.shared.run import Result, Run, on_main
from rlcore.trainers.shared.stopping import stop_request
from rlcore.trainers.shared.weights import whole_weights


@contextlib.contextmanager
def tracking(run: Run, given: Given, description: str, columns: Iterable[str]) -> Iterator[Any]:
    """The caller's open tracker or one of our own, while the output directory is the run's.

    Signals ask the run to stop meanwhile. Writing begins here: until now all processes could look
    at the directory as it was.
    """
    with contextlib.ExitStack() as held:
        run.stop = held.enter_context(stop_request())
        if run.sampler is not None:
            held.callback(run.sampler.close)
        # until every process has looked at the directory as it was
        run.accelerator.wait_for_everyone()
        on_main(run.accelerator, lambda: _claim(run, held))
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
