"""The command line: `rlcore train ALGORITHM --flags`, `rlcore demo`, `rlcore bench`, ...

A command is a config dataclass and a function that takes it, of the table COMMANDS. Both are looked
up when the command runs, so that `rlcore --help` imports no trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import rlcore
from rlcore.commands.table import COMMANDS, OTHER_NAMES, Command
from rlcore.errors import TrainingDiverged, TrainingStopped, UserError, unknown_name
from rlcore.runs.config import flag_name, load_config
from rlcore.runs.options import Option, options

LOADING = "reading the model and the data"
USAGE_STATUS = 2
DIVERGED_STATUS = 1
INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status. A mistake of the user's is one sentence."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _fail(str(error), USAGE_STATUS)
    except TrainingDiverged as error:
        return _fail(str(error), DIVERGED_STATUS)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED_STATUS)


def _run(arguments: list[str]) -> int:
    if "--version" in arguments[:1]:
        print(f"rlcore {rlcore.__version__}")
        return 0
    name, flags = _find_command(arguments)
    if name is None:
        _print_commands(Console())
        return 0
    # Before torch starts its threads: spinning while they wait, they would take each other's cores
    # on a busy machine, and a small model then runs ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    config_class = getattr(module, command.config)
    if {"-h", "--help"} & set(flags):
        _print_options(Console(), name, command, options(config_class))
        return 0
    yaml_path, flags = _take_config(flags)
    config = load_config(config_class, yaml_path, _name_positionals(command, flags))
    if yaml_path is not None and getattr(config, "overwrite_output_dir", False):
        from rlcore.runs.output_dir import check_apart

        check_apart(config.output_dir, {"config": yaml_path})
    _quiet_libraries()
    from rlcore.runs.display import loading

    try:
        with loading(LOADING) if name.startswith("train ") else contextlib.nullcontext():
            result = getattr(module, command.function)(config)
    except TrainingStopped as stop:
        status = 128 + signal.Signals[stop.signal_name]
        return _fail(f"{stop}{_way_on(config)}", status, label="") if _speaks() else status
    except KeyboardInterrupt:
        return _fail(f"interrupted{_way_on(config)}", INTERRUPTED_STATUS)
    if type(result) is int:  # an exit status
        return result
    if hasattr(result, "output_dir") and _speaks():
        print("\n".join(_end_of_run(name, config, result)))
    return 0


def _end_of_run(name: str, config: Any, result: Any) -> Iterator[str]:
    """Where everything is, and what one may do next."""
    from rlcore.runs.resuming import inputs_of

    yield f"model and metrics.jsonl are in {result.output_dir}"
    best = result.best or result.output_dir
    if result.best is not None:
        yield f"the model that did best on what is held out is in {best}"
    held_out = [place for option, place in inputs_of(config).items() if "eval_dataset" in option]
    if getattr(config, "reward", None) and held_out:
        column = config.prompt_column
        yield (
            f"next: rlcore eval {config.model} {best} --dataset {' '.join(held_out)} "
            f"{'' if column == 'prompt' else f'--prompt-column {column} '}"
            f"--reward {' '.join(config.reward)} "
            f"--max-completion-length {config.max_completion_length}"
        )
    if name != "train reward_model":
        yield f"next: rlcore chat {best}"


def _speaks() -> bool:
    """Of several processes the first speaks."""
    return os.environ.get("RANK", "0") == "0"


def _way_on(config: Any) -> str:
    """How to go on with a run that was stopped, where there is something to go on from."""
    if not hasattr(config, "resume") or not hasattr(config, "output_dir"):
        return ""
    from rlcore.runs.output_dir import last_resumable

    last = last_resumable(config.output_dir)
    if last is None:
        return ""
    instead = " instead of --overwrite-output-dir" if config.overwrite_output_dir else ""
    return f"; the same command with --resume{instead} goes on from {last.name}"


def _quiet_libraries() -> None:
    """transformers' bars for reading and writing files would tear the progress display.

    Downloads show. What every process is told of accelerate's choice of words is no user's to mend.
    """
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()


def _find_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(the command's name, its flags); the name is None where help is asked for."""
    words = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    for count in range(len(words), 0, -1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, arguments[count:]
        _answer_command(name)
    name, flags = " ".join(words), arguments[len(words) :]
    members = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if (not name or members) and (not flags or {"-h", "--help"} & set(flags)):
        return None, flags
    if members:
        raise UserError(f"`rlcore {name}` needs one of its commands: {', '.join(members)}")
    raise unknown_name("command", name or flags[0], COMMANDS)


def _answer_command(name: str) -> None:
    """Raise UserError for a command that other libraries have, with or without `train`."""
    for known in (name, f"train {name}"):
        if known in OTHER_NAMES:
            raise UserError(f"`rlcore {name}` is `rlcore {OTHER_NAMES[known]}` here")


def _name_positionals(command: Command, flags: list[str]) -> list[str]:
    """The flags with the words before the first of them under their fields' names.

    The last field takes all words that are left.
    """
    words = list(itertools.takewhile(lambda flag: not flag.startswith("--"), flags))
    if not words or not command.positional:
        return flags
    named = []
    for position, field in enumerate(command.positional):
        last = position == len(command.positional) - 1
        given = words[position:] if last else words[position : position + 1]
        named += [flag_name(field), *given] if given else []
    return named + flags[len(words) :]


def _take_config(flags: list[str]) -> tuple[str | None, list[str]]:
    """Take --config FILE out of the flags."""
    rest, path = [], None
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        if path is not None:
            raise UserError("--config is given twice")
        path = value if equals else next(words, "")
        if not path or path.startswith("--"):
            raise UserError("--config needs a YAML file")
    return path, rest


def _fail(message: str, status: int, label: str = "error: ") -> int:
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((label, "bold red"), message), soft_wrap=True)
    return status


def _print_commands(console: Console) -> None:
    console.print("usage: rlcore COMMAND [--config FILE.yaml] [--flag value ...]\n")
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  {name}", command.summary)
    console.print(table)
    console.print("\n`rlcore COMMAND --help` lists its flags.", highlight=False)


def _print_options(
    console: Console, name: str, command: Command, all_options: list[Option]
) -> None:
    """Every flag: name and type, what it does, [default]; group by group.

    On a terminal the words wrap beside the names; elsewhere a flag is a line, for grep.
    """
    words = "".join(f" {field.upper()}" for field in command.positional)
    usage = f"usage: rlcore {name}{words} [--config FILE.yaml] [--flag value ...]"
    console.print(usage, markup=False)
    console.print(f"\n{command.summary}. Flags win over the YAML file.", highlight=False)
    width = max(len(_left(option)) for option in all_options)
    for group in dict.fromkeys(option.group for option in all_options):
        console.print(Text(f"\n{group}", style="bold"))
        for option in all_options:
            if option.group == group:
                _print_option(console, option, width)


def _left(option: Option) -> str:
    flag = flag_name(option.name)
    if option.type != "bool":
        return f"  {flag} {option.type.replace(' | None', '')}"
    return f"  {flag.replace('--', '--[no-]', 1)}" if option.default == "True" else f"  {flag}"


def _print_option(console: Console, option: Option, width: int) -> None:
    words = Text(option.help)
    if option.default is None:
        words.append("  required", style="bold")
    elif option.default != "False":
        words.append(f"  [{option.default}]", style="dim")
    if console.is_terminal and console.width > width + 20:
        line = Table.grid(padding=(0, 2))
        line.add_row(Text(f"{_left(option):<{width}}", no_wrap=True), words)
        console.print(line)
    else:
        console.print(Text(f"{_left(option):<{width}}  ") + words, soft_wrap=True)
