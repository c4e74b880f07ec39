"""SIGTERM, SIGHUP and Ctrl-C ask a run to stop: its step is finished and a checkpoint written."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
# launchers pass on the Ctrl-C that the terminal has sent to every process already
_ONE_CTRL_C = 1.0  # seconds
_STOPPING = "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


@dataclass
class StopRequest:
    """The signal that has asked this process to stop, 0 where none has."""

    signal: int = 0
    _interrupted: float | None = field(default=None, repr=False)  # when Ctrl-C came first

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler: note the signal; a second Ctrl-C is a KeyboardInterrupt."""
        if number == signal.SIGHUP:
            _leave_terminal()
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                os.write(2, _STOPPING.encode())
            elif now - self._interrupted > _ONE_CTRL_C:
                raise KeyboardInterrupt
        self.signal = self.signal or number


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Have the signals ask, and not end the process, for a while; not those with a handler.

    A thread but the main one cannot change what signals do: there nothing asks.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = {number: old for number, old in before.items() if old in _DEFAULTS}
    for number in ours:
        signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Have what is still written to a terminal that has gone go nowhere, instead of raising."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            # a terminal that has gone no longer says that it is one
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
