"""Figures as people read them in a terminal: short numbers, clocks, courses as bars."""

from __future__ import annotations

import itertools
import math

from rich.console import Console

_LOWER_IS_BETTER = ("loss", "kl", "perplexity", "grad_norm")
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*%#"
_TREND_WIDTH = 24


def short(value: float) -> str:
    """A number in about six characters: 0.5123, 1.2e-05, 5.1k, nan."""
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if size >= 1e9 or size < 0.01:
        return f"{value:.1e}"
    if size >= 1e6:
        return f"{value / 1e6:.1f}M"
    if size >= 1e3:
        return f"{value / 1e3:.1f}k"
    return f"{value:.{3 if size < 100 else 1}f}"


def higher_is_better(metric: str) -> bool:
    """Whether a metric's best value is its largest."""
    return not metric.endswith(_LOWER_IS_BETTER)


def bars_for(console: Console) -> str:
    """Characters for bars, low to high, that the console can show."""
    return _ASCII_BARS if console.options.ascii_only else _BARS


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss; dashes where they are not known."""
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def trend(values: list[float], bars: str = _BARS) -> str:
    """The whole course of `values` as bars, at most `_TREND_WIDTH`, each the mean of a stretch."""
    values = [value for value in values if math.isfinite(value)]
    width = min(len(values), _TREND_WIDTH)
    if width < 2:
        return ""
    cuts = [len(values) * place // width for place in range(width + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)
