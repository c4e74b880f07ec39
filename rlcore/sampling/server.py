"""One inference server over HTTP: requests that outlast a connection that fails for a while."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from rlcore.errors import UserError, reason_of

FIRST_WAIT = 0.25  # seconds until a request is sent again; twice as long each time
LONGEST_WAIT = 8.0
# a proxy's, or a server's that starts, has too much to do, or is about to be started again
PASSING = (429, 500, 502, 503, 504)


class ServerGone(UserError):
    """A server did not answer for as long as it was waited for."""


@dataclass(frozen=True)
class Server:
    """A server's URL, and how long to wait for it.

    `stopped` is asked between attempts whether anyone still waits for the answer.
    """

    url: str
    timeout: float  # seconds
    stopped: Callable[[], bool] = field(default=lambda: False, compare=False)

    def get(self, route: str) -> Any:
        """The JSON at `route`; errors as of `post`."""
        return self._asked(route, None, PASSING)

    def post(self, route: str, body: dict[str, Any], passing: Collection[int] = PASSING) -> Any:
        """What the server answers to `body`, from JSON; None where it answers nothing.

        A connection that fails, and an answer with a status of `passing`, are tried again, for
        `timeout` seconds in all.

        Raises:
            ServerGone: no answer in that time. UserError: the server refuses the request.
        """
        return self._asked(route, json.dumps(body).encode(), passing)

    def _asked(self, route: str, body: bytes | None, passing: Collection[int]) -> Any:
        wait, until = FIRST_WAIT, time.monotonic() + self.timeout
        while True:
            try:
                return self._once(route, body, max(until - time.monotonic(), FIRST_WAIT))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {_said(error)}"
                if error.code not in passing:
                    raise UserError(f"{self.url}{route} answers {reason}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = reason_of(getattr(error, "reason", None) or error)
            left = until - time.monotonic()
            if left <= 0 or self.stopped():
                raise ServerGone(
                    f"the sampler at {self.url} has not answered {route} for {self.timeout:g} s "
                    f"({reason}): see whether it runs, start it again with `rlcore serve`, or give "
                    "it longer with --sampler-timeout"
                )
            time.sleep(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT)

    def _once(self, route: str, body: bytes | None, timeout: float) -> Any:
        request = urllib.request.Request(
            self.url + route, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None


def _said(error: urllib.error.HTTPError) -> str:
    """What an error of the server's says, without its JSON, shortened."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", found))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return f"{' '.join(text.split()):.300}"
