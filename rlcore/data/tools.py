"""The tools that a row's messages may call, as its column "tools" has them: JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from rlcore.errors import UserError

TOOLS = "tools"


class Messages(list):
    """Chat messages, and the tools that a template is told of with them.

    Parts of them, and what they begin, have the same tools.
    """

    def __init__(self, messages: Iterable[dict] = (), tools: list[dict] | None = None):
        super().__init__(messages)
        self.tools = tools

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        found = super().__getitem__(key)
        return Messages(found, self.tools) if isinstance(key, slice) else found

    def __add__(self, other: list) -> Messages:
        return Messages([*self, *other], self.tools)


def tools_of(messages: Any) -> list[dict] | None:
    """The tools that come with messages, None without any; text has none."""
    return getattr(messages, TOOLS, None)


def read_tools(value: Any) -> list[dict] | None:
    """The column's value, be it JSON text, as a list; None where it is empty or null.

    Raises:
        UserError: anything else.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = value
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise UserError(
            f"{TOOLS!r} must be a list of JSON schemas, or the text of one, not {value!r:.80}"
        )
    return tools or None


def told_of_tools(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The row, the messages in those columns with its tools."""
    talks = {name: row[name] for name in names if isinstance(row.get(name), list)}
    tools = read_tools(row.get(TOOLS)) if talks else None
    return row if tools is None else row | {n: Messages(talk, tools) for n, talk in talks.items()}
