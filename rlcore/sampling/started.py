"""Functions that may be asynchronous, called from code that is not."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any


def started(function: Callable, **arguments: Any) -> Callable[[], Any]:
    """Call the function; what comes back gives its result, and waits for an asynchronous one's.

    Coroutines run side by side in one event loop that lasts as long as the process, so that a
    client may keep its connections from call to call. It has a thread of its own: the caller may
    be in an event loop already, as in a notebook.
    """
    result = function(**arguments)
    if not inspect.isawaitable(result):
        return lambda: result
    future = asyncio.run_coroutine_threadsafe(_outcome(result), _event_loop(os.getpid()))

    def wait() -> Any:
        value, error = future.result()
        if error is not None:
            raise error
        return value

    return wait


async def _outcome(result: Awaitable) -> tuple[Any, BaseException | None]:
    """(value, None), or (None, error): a SystemExit that gets out would end the loop's thread."""
    try:
        return await result, None
    except (Exception, SystemExit) as error:
        return None, error


@functools.lru_cache(maxsize=1)
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """A running event loop; a forked process, which has no such thread, gets one of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="event loop").start()
    return loop
