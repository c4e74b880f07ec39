"""Training curves as a PNG, drawn from the metrics.jsonl files of runs (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics

Point = tuple[float, float]
_FEW_POINTS = 12
_FEW_LINES = 4
# colour-blind safe, and told apart in grey print by the line style
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A6D00")
_DASHES = ("-", "--", "-.", ":")
_LABELS = {
    "reward": "mean reward of a batch",
    "eval/accuracy": "held-out accuracy",
    "eval/reward": "held-out mean reward",
    "loss": "loss",
    "kl": "KL to the reference (nats)",
    "entropy": "entropy (nats per token)",
    "tokens_per_second": "tokens per second",
    "completions/mean_length": "completion length (tokens)",
}


def plot_curves(
    runs: Mapping[str, str | Path],
    out_png: str | Path,
    *,
    metrics: Sequence[str] = ("reward",),
    title: str = "",
    labels: Mapping[str, str] | None = None,
    extra: Mapping[str, Mapping[str, Sequence[Point]]] | None = None,
) -> Path:
    """Draw each of `metrics` against the step in a panel of its own, one line a run.

    Args:
        runs: {legend label: path of a metrics.jsonl}, drawn in this order.
        labels: {metric: what its axis says}, where that should not be the usual.
        extra: {metric: {legend label: [(step, value), ...]}}, measurements made beside the log
            (before the first step, say), joined to the logged ones.

    Raises:
        UserError: matplotlib is missing, a file cannot be read, or no run logged a metric asked.
    """
    require_matplotlib()
    rows = {label: read_metrics(path) for label, path in runs.items()}
    lines = {
        metric: {
            label: sorted([*_points(run, metric), *(extra or {}).get(metric, {}).get(label, ())])
            for label, run in rows.items()
        }
        for metric in metrics
    }
    for metric in metrics:
        if not any(lines[metric].values()):
            raise UserError(f"no run logged {metric!r}: {', '.join(map(str, runs.values()))}")
    axis_labels = _LABELS | dict(labels or {})
    panels = {
        ("optimizer step", axis_labels.get(name, name)): by_label
        for name, by_label in lines.items()
    }
    return plot_lines(panels, out_png, title=title)


def plot_lines(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[Point]]],
    out_png: str | Path,
    *,
    title: str = "",
) -> Path:
    """Draw panels side by side: {(x axis, y axis): {legend label: [(x, y), ...]}}.

    Raises:
        UserError: matplotlib is missing.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, ((x_label, y_label), by_label) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, by_label)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
    if len(axes[0][0].lines) <= _FEW_LINES:
        axes[0][0].legend(frameon=False, loc="best")
    else:
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=12)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160)
    pyplot.close(figure)
    return out_png


def require_matplotlib() -> None:
    """UserError where the extra `report` is not installed; to be asked before a long run."""
    load_pyplot()


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a curve needs matplotlib: pip install 'rlcore[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _points(run: list[dict[str, Any]], metric: str) -> list[Point]:
    return [(row["step"], row[metric]) for row in run if row.get(metric) is not None]


def _panel(axis: Any, by_label: Mapping[str, Sequence[Point]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (label, points) in enumerate(by_label.items()):
        color, style = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
        # few points are measurements: show where they were made
        marker = "o" if len(points) <= _FEW_POINTS else None
        places, values = [place for place, _ in points], [value for _, value in points]
        axis.plot(places, values, color=color, linestyle=style, marker=marker, ms=4, label=label)
        if points and len(by_label) <= _FEW_LINES:
            axis.annotate(
                f"{values[-1]:.3g}",
                points[-1],
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=color,
            )
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10]))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.08, y=0.12)
