"""The pages that users read: links lead somewhere, and pages made from the code are whole."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import yaml

import rlcore
from rlcore.commands.table import COMMANDS
from rlcore.runs.aliases import ALIASES

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("gather", ROOT / "docs" / "gather.py")
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)


# options that a page tells of another command
BESIDE = {"peft", "config", "reward_model", "reward_weights"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site both make them."""
    headings = re.findall(r"^#+ (.+)$", pages.FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_every_link_leads_to_a_file_and_a_heading():
    checked, broken = 0, []
    for page in pages.sources():
        for path, anchor in pages.links(page):
            target, checked = (page.parent / path).resolve(), checked + 1
            if not target.is_file() or (anchor and anchor[1:] not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {path}{anchor}")
    assert checked > 30
    assert broken == []


def test_the_site_has_every_page_in_its_navigation(tmp_path):
    pages.gather(tmp_path)
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r"[\w/]+\.md", text.partition("\nnav:")[2]))
    assert named == {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert yaml.safe_load(text)["strict"]


def test_options_and_functions_are_those_of_the_code():
    trainers, functions = pages.trainers(), pages.functions()
    assert all(f"## rlcore {name}\n" in trainers for name in COMMANDS if name.startswith("train "))
    assert "`num_generations`" in trainers
    assert all(f".{name}\n" in functions for name in rlcore._HOMES)
    assert "1707.06347" in pages.papers()


@pytest.mark.parametrize("name", ["sft", "reward_model", "pg", "trpo", "ppo", "grpo", "distill"])
def test_a_trainers_page_names_options_and_metrics_that_there_are(name):
    page = (ROOT / "docs" / f"{dict(distill='distillation').get(name, name)}.md").read_text("utf-8")
    command = COMMANDS[f"train {name}"]
    config = getattr(importlib.import_module(command.module), command.config)
    options = {field.name for field in dataclasses.fields(config)} | ALIASES.keys()
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9_-]+)", page)}
    assert named
    assert {flag for flag in named if flag.removeprefix("no_") not in options} <= BESIDE
    source = "".join(path.read_text("utf-8") for path in (ROOT / "rlcore").rglob("*.py"))
    metrics = set(re.findall(r"`([a-z]+/[a-z_]+)`", page)) - {"rlcore/trainers"}
    parts = {metric for metric in metrics if metric not in source}
    # TRL's objective/... are put together from their last words
    assert {part for part in parts if f'"{part.partition("/")[2]}"' not in source} == set()


def test_the_first_loss_of_the_first_steps_runs():
    section = (ROOT / "docs" / "start.md").read_text("utf-8").partition("## A first loss\n")[2]
    code = re.findall(r"^(?: {4}.*\n|\n)+", section, re.MULTILINE)[0]
    names: dict = {}
    exec(textwrap.dedent(code), names)
    assert names["logits"].grad[names["mask"]].abs().sum() > 0
    assert (names["logits"].grad[~names["mask"]] == 0).all()


def test_the_recipes_page_names_every_recipe():
    text = (ROOT / "recipes" / "README.md").read_text("utf-8")
    files = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(re.findall(r"--config recipes/([\w.]+)", text)) == files


def test_the_site_finds_every_function_in_the_source_that_is_copied_for_it(tmp_path):
    pages.copy_source(tmp_path)
    for line in re.findall(r"^::: (.+)$", pages.functions(), re.MULTILINE):
        module, _, name = line.rpartition(".")
        source = (tmp_path / f"{module.replace('.', '/')}.py").read_text("utf-8")
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), line
    packages = {path.parent for path in tmp_path.rglob("*.py")}
    assert all((package / "__init__.py").is_file() for package in packages)
