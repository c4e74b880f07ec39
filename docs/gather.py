"""Gather the site's pages: the repository's Markdown as it lies, and pages made from the code.

    python docs/gather.py build/docs build/source

Made from the code are the functions (from their docstrings), each trainer's options (from its
dataclass) and the index of papers (from what docstrings and comments cite).
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
PAPER = re.compile(r"\b(?:arXiv:)?(\d{4}\.\d{5})\b")
DEFINITION = re.compile(r"^(?:class|def) (\w+)|^([A-Z][A-Z_]+)\b[^=]* = ")


def sources() -> list[Path]:
    """The Markdown files that users read."""
    folders = ("", "docs/", "benchmarks/", "recipes/")
    return sorted(path for folder in folders for path in ROOT.glob(f"{folder}*.md"))


def links(page: Path) -> list[tuple[str, str]]:
    """(path, #anchor or "") of every link of a page to another file."""
    return LINK.findall(FENCE.sub("", page.read_text("utf-8")))


def trainers() -> str:
    """The options of every `rlcore train` command."""
    from rlcore.commands.table import COMMANDS
    from rlcore.runs.options import options

    parts = ["# Options of the trainers\n\nMade from the config classes, as `--help` is.\n"]
    for name, command in COMMANDS.items():
        if not name.startswith("train "):
            continue
        parts.append(f"\n## rlcore {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n")
        group = None
        for option in options(getattr(importlib.import_module(command.module), command.config)):
            if option.group != group:
                group = option.group
                head = "| option | type | default | meaning |\n|---|---|---|---|"
                parts.append(f"\n**{group}**\n\n{head}")
            default = "must be given" if option.default is None else f"`{option.default}`"
            meaning = option.help.replace("|", "\\|")
            parts.append(f"| `{option.name}` | `{option.type}` | {default} | {meaning} |")
    return "\n".join(parts) + "\n"


def functions() -> str:
    """The public functions and classes, for mkdocstrings."""
    import rlcore

    parts = ["# The functional API\n\n`import rlcore as rl`; each name is `rl.NAME`.\n"]
    for name in sorted(rlcore._HOMES, key=lambda name: (name[0].isupper(), name)):
        parts.append(f"::: rlcore.{rlcore._HOMES[name]}.{name}\n")
    return "\n".join(parts)


def papers() -> str:
    """Every paper that the code cites, with the definitions that cite it."""
    found: dict[str, list[str]] = {}
    for half in ("kernels", "rlcore"):
        for path in sorted((ROOT / half).rglob("*.py")):
            if path.is_relative_to(ROOT / "rlcore" / "kernels"):
                continue
            place = shown = path.relative_to(ROOT).as_posix()
            for line in path.read_text("utf-8").splitlines():
                if defined := DEFINITION.match(line):
                    shown = f"{place}`: `{defined[1] or defined[2]}"
                for number in PAPER.findall(line):
                    found.setdefault(number, [])
                    found[number] += [f"`{shown}`"] if f"`{shown}`" not in found[number] else []
    rows = [
        f"| [{number}](https://arxiv.org/abs/{number}) | {'<br>'.join(found[number])} |"
        for number in sorted(found)
    ]
    return "# Papers\n\n| arXiv | cited by |\n|---|---|\n" + "\n".join(rows) + "\n"


def gather(target: Path) -> None:
    """Write all pages below `target`, with the files that they link to."""
    shutil.rmtree(target, ignore_errors=True)
    for page in sources():
        linked = [(page.parent / path).resolve() for path, _ in links(page)]
        for path in [page, *linked]:
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    reference = target / "reference"
    reference.mkdir()
    for made in (trainers, functions, papers):
        (reference / f"{made.__name__}.md").write_text(made(), "utf-8")


def copy_source(target: Path) -> None:
    """The library as it installs, for mkdocstrings.

    Where it lies rlcore/kernels is a link without an __init__, which is not followed, and another
    package may be installed as `kernels`.
    """
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rlcore", target / "rlcore", ignore=ignored)
    (target / "rlcore" / "kernels" / "__init__.py").touch()


if __name__ == "__main__":
    gather(Path(sys.argv[1]).resolve())
    copy_source(Path(sys.argv[2]).resolve())
