"""What --help says of a config dataclass, read from its fields and the comments beside them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any

# metadata of a field that a command line must give; None where Python leaves it to an argument
REQUIRED = {"required": True}
# in the metadata of one for which Python may give the thing itself instead of its name
OBJECT = "object"


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as --help shows it."""

    name: str
    type: str
    default: str | None  # None: required
    help: str
    group: str


def options(cls: type) -> list[Option]:
    """The fields of `cls` in order, each with the comment that explains it.

    The group is the first line of the docstring of the class that declares the field, or the text
    of the last comment above it that stands between blank lines.
    """
    comments: dict[str, tuple[str, str]] = {}
    for base in reversed(inspect.getmro(cls)):
        for name, (text, group) in _comments(base).items() if base is not object else ():
            old_text, old_group = comments.get(name, ("", group))
            comments[name] = (text or old_text, old_group)
    hints = typing.get_type_hints(cls)
    found = [
        Option(name, type_name(hints[name]), _default_text(field), *comments.get(name, ("", "")))
        for name, field in init_fields(cls).items()
    ]
    # the group in which something must be given comes first
    first = {option.group for option in found if option.default is None}
    return sorted(found, key=lambda option: option.group not in first)


def type_name(hint: Any) -> str:
    """A type as a reader of --help knows it: float, list[str], 'group' | 'batch'."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__.replace("NoneType", "None")
    return str(hint).replace("typing.", "").replace("pathlib.", "")


def is_mapping(hint: Any) -> bool:
    """Whether a field's type is numbers by name: dict[str, float], or that or None."""
    return dict in map(typing.get_origin, (hint, *typing.get_args(hint)))


def init_fields(cls: type) -> dict[str, dataclasses.Field]:
    """The fields that a config may set: those that __init__ takes."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value, dataclasses.MISSING where it is required."""
    if field.metadata.get("required"):
        return dataclasses.MISSING
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default_text(field: dataclasses.Field) -> str | None:
    default = default_of(field)
    if default is dataclasses.MISSING:
        return None
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    return str(default) or "none"


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (help, group)} of the fields that `cls` itself declares, read from its source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    body = ast.parse(source).body[0].body
    ends = [node.end_lineno for node in body]
    title = (inspect.getdoc(cls) or cls.__name__).splitlines()[0].rstrip(".")
    comments = {}
    for number, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign):
            continue
        above = lines[ends[number - 1] if number else 1 : node.lineno - 1]
        section, own = _split_comments(above)
        title = section or title
        trailing = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        following = body[number + 1] if number + 1 < len(body) else None
        text = trailing or own or _docstring(following)
        comments[node.target.id] = (" ".join(text.split()), title)
    return comments


def _split_comments(lines: list[str]) -> tuple[str, str]:
    """(section title, help): comments with a blank line below them, and those right above."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip().startswith("#"):
            blocks[-1].append(line.strip(" #"))
        else:
            blocks.append([])
    *sections, own = [" ".join(block) for block in blocks]
    return next((text for text in reversed(sections) if text), ""), own


def _docstring(node: ast.stmt | None) -> str:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return str(node.value.value) if constant else ""
