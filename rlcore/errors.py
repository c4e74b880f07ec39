"""The errors a user can act on, and the suggestion that goes with a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller's that one sentence explains; the CLI prints it and exits with 2."""


class TrainingDiverged(RuntimeError):
    """A quantity of the run became NaN or infinite; it ends there, and nothing of it is saved.

    Args:
        step: the step in which it was found, counted from 1. Found in loss or gradient, the
            optimizer has not taken it.
        quantity: what went wrong: "loss", "grad_norm", "weight lm_head.weight", ...
        value: its value (nan, inf or -inf).
        last_checkpoint: the newest complete checkpoint, None where none was saved.
    """

    def __init__(self, step: int, quantity: str, value: float, last_checkpoint: object = None):
        self.step = step
        self.quantity = quantity
        self.value = value
        self.last_checkpoint = last_checkpoint
        where = (
            f"the last good checkpoint is {last_checkpoint}"
            if last_checkpoint is not None
            else "no checkpoint was saved before it"
        )
        super().__init__(f"step {step}: {quantity} is {value}; training stopped, {where}")


class TrainingStopped(KeyboardInterrupt):
    """A signal asked the run to stop, and it did at the end of a step.

    Args:
        signal_name: "SIGINT", "SIGTERM" or "SIGHUP".
        step: the last step that was done.
        output_dir: where the run is.
        checkpoint: what holds all of it; None where the run had ended and its model is whole.
    """

    def __init__(self, signal_name: str, step: int, output_dir: object, checkpoint: object = None):
        self.signal_name = signal_name
        self.step = step
        self.checkpoint = checkpoint
        where = (
            f"{checkpoint} holds the run so far"
            if checkpoint is not None
            else f"that was the last one, and the model in {output_dir} is whole"
        )
        super().__init__(f"stopped by {signal_name} after step {step}; {where}")


def reason_of(error: BaseException) -> str:
    """All that an error of another library says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def reasons_of(error: BaseException) -> str:
    """`reason_of` an error and of those that it was raised from, each once."""
    said: list[str] = []
    while error is not None:
        if not any(reason_of(error) in earlier for earlier in said):
            said.append(reason_of(error))
        error = error.__cause__
    return ": ".join(said)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which `name` is a word, else the one most like it; None without one."""
    known = list(known)
    found = [each for each in known if name in each.split()]
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for `name`, with the nearest known name and the list of them all.

    Raise what comes back: `raise unknown_name("reward", "exakt", REWARDS)`.
    """
    known = sorted(known)
    guess = nearest(name, known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")
