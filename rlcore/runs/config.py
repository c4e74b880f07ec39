"""A dataclass filled from a YAML file and from command-line flags; flags win.

The dataclass is the only place where an option is declared: its fields are the flags and the YAML
keys, their types parse the values (by tyro's rules), their comments are the help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from rlcore.errors import UserError
from rlcore.runs.aliases import fold, folded, mixture, our_name, unknown_option
from rlcore.runs.options import default_of, init_fields, is_mapping, type_name

Config = TypeVar("Config")
_HELP = " (--help lists them all)"


def load_config(
    cls: type[Config],
    yaml_path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
    """An instance of the dataclass `cls`: its defaults, then the YAML file, then `overrides`.

    Args:
        yaml_path: a file of `name: value` lines, or None.
        overrides: flags as on a command line (["--beta", "0.1"]; --num-generations and
            --num_generations are the same) or a mapping {"beta": 0.1}.

    Raises:
        UserError: unreadable YAML, an unknown key or flag (the nearest is named), a value that does
            not fit its field, a required field that nobody gave.
    """
    values = {} if yaml_path is None else _read_yaml(cls, Path(yaml_path))
    if isinstance(overrides, Mapping):
        values |= _typed_values(cls, overrides, "overrides")
    else:
        values |= _parse_flags(cls, overrides)
    values = fold(values)
    missing = [
        flag_name(name)
        for name, field in init_fields(cls).items()
        if name not in values and default_of(field) is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"required, but not given: {', '.join(missing)} (see --help)")
    return cls(**values)


def save_config(config: Any, path: str | Path, *, without: Collection[str] = ()) -> None:
    """Write a config dataclass, but for the fields `without`, as YAML that `load_config` reads."""
    values = {name: v for name, v in plain_values(config).items() if name not in without}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def plain_values(config: Any) -> dict[str, Any]:
    """{option: value} as YAML knows values; an object in a name's place is told by its class."""
    values = {name: getattr(config, name) for name in init_fields(type(config))}
    return {name: plain_value(value) for name, value in values.items()}


def plain_value(value: Any) -> Any:
    """The same of one."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(x, int | float) for x in value.values()):
        return dict(value)
    if isinstance(value, list | tuple) and not any(isinstance(each, Mapping) for each in value):
        return [plain_value(each) for each in value]
    return f"<{type(value).__name__}>"


def flag_name(field: str) -> str:
    """The flag of a field: --num-generations of num_generations."""
    return "--" + field.replace("_", "-")


def _parse_flags(cls: type, flags: Sequence[str]) -> dict[str, Any]:
    """{field: value} of --name value ..., --name=value, and --name or --no-name for a bool."""
    known = init_fields(cls)
    hints = typing.get_type_hints(cls) | folded(known)
    values: dict[str, Any] = {}
    for flag, words in _split_flags(flags):
        name = flag[2:].replace("-", "_")
        negated = name.removeprefix("no_")
        if name not in hints and hints.get(negated) is bool and not words:
            name, words = negated, ["False"]
        name = our_name(name, known)
        if name not in known and name not in folded(known):
            answer = unknown_option(name, known, flag_name, _HELP)
            raise UserError(f"unknown flag {flag}{answer}")
        if hints[name] is bool and not words:
            words = ["True"]
        given = words[0] if len(words) == 1 else words
        values[name] = _typed(given, hints[name], flag)
    return values


def _split_flags(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it."""
    groups: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"{word!r} is not a flag: options are given as --name value")
    return groups


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(cls: type, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise UserError(f"config {path} is not readable as YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must hold `name: value` lines, not one {content!r:.60}")
    return _typed_values(cls, content, f"config {path}")


def _typed_values(cls: type, values: Mapping[Any, Any], source: str) -> dict[str, Any]:
    known = init_fields(cls)
    hints = typing.get_type_hints(cls) | folded(known)
    typed: dict[str, Any] = {}
    for key, value in values.items():
        name = our_name(str(key).replace("-", "_"), known)
        if name not in known and name not in folded(known):
            answer = unknown_option(name, known, repr, _HELP)
            raise UserError(f"{source}: unknown key {str(key)!r}{answer}")
        if name in typed:
            raise UserError(f"{source}: key {name!r} is given twice")
        value = mixture(value) if name == "dataset" else value
        typed[name] = _typed(value, hints[name], f"{source}: {name}")
    return typed


def _typed(value: Any, hint: Any, what: str) -> Any:
    """`value` as `hint`. YAML values pass through words too: YAML reads 1e-4 as a string."""
    if hint is bool and value in ("true", "false"):
        value = value.capitalize()
    if is_mapping(hint):
        return _mapping(value, what)
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = tyro.cli(
                holder,
                args=["--value", *_words(value)],
                config=(tyro.conf.FlagConversionOff,),
                console_outputs=False,
            )
    except SystemExit:
        given = repr(value) if value != [] else "nothing"
        raise UserError(f"{what} must be {type_name(hint)}, not {given}") from None
    return parsed.value


def _mapping(value: Any, what: str) -> dict[str, float] | None:
    """Numbers by name, of a mapping in YAML or of a flag's JSON."""
    given = value
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(value) if isinstance(value, str) else value
        if value is None or value == "None":
            return None
        # YAML reads 1e-4 as text
        return {str(name): float(number) for name, number in dict(value).items()}
    raise UserError(
        f"{what} must be numbers by name, '{{\"tau_pos\": 1.0}}' say, not {given!r:.80}"
    )


def _words(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(part) for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value)]
