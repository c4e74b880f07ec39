"""Samples of a run: some of what was sampled and how it was judged, shown and kept.

completions.jsonl has one JSON object a completion: step, split ("train" or "eval"), prompt,
completion, rewards {name: value}, reward, advantage (null where a completion has none of its own),
truncated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlcore.runs.atomic import staged_file
from rlcore.runs.output_dir import COMPLETIONS_FILE, COMPLETIONS_TABLE


@dataclass
class Sample:
    """One completion and what it got."""

    row: int  # among the process's completions of its batch
    prompt: Any  # text, or messages
    completion: str
    rewards: dict[str, float]
    reward: float
    truncated: bool
    advantage: float | None = None


def telling(groups: Sequence[Sequence[Sample]], count: int) -> list[Sample]:
    """`count` of the samples: those of the prompt whose rewards differ most, best and worst first.

    Args:
        groups: the completions of each prompt.
    """
    ranked = [sorted(group, key=_height, reverse=True) for group in groups]
    ranked.sort(key=lambda group: _height(group[0]) - _height(group[-1]), reverse=True)
    chosen: list[Sample] = []
    for best, *others in ranked:
        chosen += [best, *others[-1:], *others[:-1]]
        if len(chosen) >= count:
            break
    return chosen[:count]


def _height(sample: Sample) -> float:
    return sample.reward if math.isfinite(sample.reward) else 0.0


def append_samples(directory: str | Path, step: int, split: str, samples: Sequence[Sample]) -> None:
    """Append them to the directory's completions.jsonl."""
    with (Path(directory) / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
        for sample in samples:
            line = {"step": step, "split": split, **asdict(sample)}
            del line["row"]
            file.write(as_line(line) + "\n")


def write_table(directory: str | Path) -> None:
    """The directory's completions.jsonl as completions.parquet; prompts of messages as JSON."""
    from datasets import Dataset

    source = Path(directory) / COMPLETIONS_FILE
    if not source.is_file():
        return
    rows = [json.loads(line) for line in source.open(encoding="utf-8")]
    for row in rows:
        row["rewards"] = json.dumps(row["rewards"])
        if not isinstance(row["prompt"], str):
            row["prompt"] = json.dumps(row["prompt"], ensure_ascii=False)
    with staged_file(Path(directory) / COMPLETIONS_TABLE) as staging:
        Dataset.from_list(rows).to_parquet(staging)


def as_line(values: Mapping[str, Any]) -> str:
    """Strict JSON on one line; a value that is no number becomes null."""
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
