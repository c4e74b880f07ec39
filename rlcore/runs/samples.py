"""Samples of a run: some of what was sampled and how it was judged, shown and kept.

completions.jsonl has one JSON object a completion: step, split ("train" or "eval"), prompt,
completion, rewards {name: value}, reward, advantage (null where a completion has none of its own),
truncated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlcore.runs.output_dir import COMPLETIONS_FILE


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


def telling(samples: Sequence[Sample], group: int, count: int) -> list[Sample]:
    """`count` of the samples: those of the prompt whose rewards differ most, best and worst first.

    Args:
        samples: the completions of one prompt next to each other.
        group: completions a prompt.
    """
    groups = [samples[start : start + group] for start in range(0, len(samples), group)]
    groups = [sorted(each, key=_height, reverse=True) for each in groups]
    groups.sort(key=lambda each: _height(each[0]) - _height(each[-1]), reverse=True)
    chosen: list[Sample] = []
    for best, *others in groups:
        chosen += [best, *others[-1:], *others[:-1]]
        if len(chosen) >= count:
            break
    return chosen[:count]


def _height(sample: Sample) -> float:
    return sample.reward if math.isfinite(sample.reward) else 0.0


def append_samples(directory: str | Path, step: int, split: str, samples: Sequence[Sample]) -> None:
    """Append them to the directory's completions.jsonl; a value that is no number becomes null."""
    with (Path(directory) / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
        for sample in samples:
            line = {"step": step, "split": split, **_finite(asdict(sample))}
            del line["row"]
            file.write(json.dumps(line, allow_nan=False, ensure_ascii=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
