"""The model card of a run: README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlcore.runs.atomic import staged_file
from rlcore.runs.figures import short, trend
from rlcore.runs.reading import RunFiles, decisive_metric
from rlcore.runs.report.page import warnings_of
from rlcore.runs.run_record import is_sealed, sealed

# trainers by their options' class: what they did to the model, and their paper
METHODS = {
    "SFTConfig": ("supervised fine-tuning", ""),
    "PGConfig": ("policy gradient", "https://link.springer.com/article/10.1007/BF00992696"),
    "RLOOConfig": ("REINFORCE leave-one-out", "https://arxiv.org/abs/2402.14740"),
    "TRPOConfig": ("trust region policy optimization", "https://arxiv.org/abs/1502.05477"),
    "PPOConfig": ("proximal policy optimization", "https://arxiv.org/abs/1707.06347"),
    "GRPOConfig": ("group relative policy optimization", "https://arxiv.org/abs/2402.03300"),
    "DPOConfig": ("direct preference optimization", "https://arxiv.org/abs/2305.18290"),
    "KTOConfig": ("Kahneman-Tversky optimization", "https://arxiv.org/abs/2402.01306"),
    "DistillConfig": ("generalised knowledge distillation", "https://arxiv.org/abs/2306.13649"),
    "RewardModelConfig": ("reward modelling on preference pairs", ""),
}


def write_card(run: RunFiles, path: str | Path) -> Path:
    """Write the card of a finished run; the file is whole or absent. A user's own stays.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    if not path.exists() or is_sealed(path):
        with staged_file(path) as staging:
            staging.write_text(sealed(card(run)), encoding="utf-8")
    return path


def card(run: RunFiles) -> str:
    """The card as Markdown, with the hub's header."""
    parts = [_header(run), _what(run), _evaluations(run), _course(run), _how(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(run: RunFiles) -> str:
    options = run.options
    tags = ["rlcore", run.trainer.removesuffix("Config").lower()]
    header: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if _is_on_hub(options.get("model")):
        header["base_model"] = options["model"]
    if _is_on_hub(options.get("dataset")):
        header["datasets"] = [options["dataset"]]
    if run.trainer != "RewardModelConfig":
        header["pipeline_tag"] = "text-generation"
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _is_on_hub(name: Any) -> bool:
    """Whether it can only be a name there: of an owner, and of nothing here."""
    return isinstance(name, str) and name.count("/") == 1 and not Path(name).exists()


def _what(run: RunFiles) -> str:
    options, facts = run.options, run.facts
    method, paper = METHODS.get(run.trainer, (run.trainer, ""))
    linked = f"[{method}]({paper})" if paper else method
    lines = [
        f"# {run.directory.resolve().name}",
        "",
        f"`{options.get('model')}` after {linked} with rlcore.",
        "",
        f"- base model: `{options.get('model')}` ({_size(facts)})",
        f"- data: `{options.get('dataset')}`, {facts.get('rows', 'unknown')} rows",
    ]
    if options.get("eval_dataset"):
        lines.append(f"- held out: `{options['eval_dataset']}`")
    if options.get("teacher"):
        lines.append(f"- teacher: `{options['teacher']}`")
    rewards = [*options.get("reward", []), *filter(None, [options.get("reward_model")])]
    if rewards:
        lines.append(f"- reward: {', '.join(f'`{name}`' for name in rewards)}")
    return "\n".join(lines)


def _size(facts: Mapping[str, Any]) -> str:
    counts = f"{facts.get('parameters', 0):,} parameters"
    return (
        f"{facts.get('model', 'unknown')}, {counts}, {facts.get('trained_parameters', 0):,} trained"
    )


def _evaluations(run: RunFiles) -> str:
    names = [name for name in run.names if name.startswith("eval/")]
    if not names:
        return ""
    lines = ["## On held-out data", "", "| metric | start | end | best | at step |"]
    lines.append("|---|---|---|---|---|")
    for name in names:
        course, best = run.course(name), run.best(name)
        if best is not None:
            cells = (course[0][1], course[-1][1], best[1])
            words = " | ".join(short(value) for value in cells)
            lines.append(f"| {name.removeprefix('eval/')} | {words} | {best[0]} |")
    return "\n".join(lines)


def _course(run: RunFiles) -> str:
    metric = decisive_metric([run])
    course = [] if metric is None else run.course(metric)
    if len(course) < 2:
        return ""
    bars = trend([value for _, value in course])
    steps = f"steps {course[0][0]} to {course[-1][0]}"
    lines = [f"```\n{metric}  {short(course[0][1])} {bars} {short(course[-1][1])}   {steps}\n```"]
    lines += [f"> {sentence}" for sentence in warnings_of(run).values()]
    return "\n\n".join(lines)


def _how(run: RunFiles) -> str:
    facts = run.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines = ["## How it was made", ""]
    if facts.get("command"):
        lines += ["```", facts["command"], "```", ""]
    lines.append(f"`training.yaml` holds all options. Versions: {versions or 'unknown'}.")
    return "\n".join(lines)
