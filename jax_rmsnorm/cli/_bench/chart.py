"""The chart: bandwidth over hidden size, a line for every contender."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .names import KERNEL, ROOF
from .results import Row

_STYLES: dict[str, dict[str, Any]] = {
    KERNEL: {"color": "#d62728", "linewidth": 2.6, "marker": "o", "markersize": 6, "zorder": 5},
    ROOF: {"color": "black", "linewidth": 1.4, "linestyle": "--", "zorder": 4},
}
_MARKERS = "sD^vP<>*Xd"
_COLORS = (
    *("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#393b79"),
)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Writes a panel for each operation and dtypes: operations side by side, dtypes below each other.

    Of several shapes of one hidden size, the one with the most rows is drawn.
    """
    ops = list(dict.fromkeys(row.case.op for row in rows))
    dtypes = list(dict.fromkeys(row.case.dtypes for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    figure = Figure(
        figsize=(5.6 * len(ops) + 1.6, 3.9 * len(dtypes) + 0.5), dpi=130, layout="constrained"
    )
    panels = figure.subplots(len(dtypes), len(ops), squeeze=False, sharey="row")
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, op in zip(line, ops, strict=True):
            chosen = [row for row in rows if (row.case.op, row.case.dtypes) == (op, dtype)]
            _panel(axes, _largest(chosen), names)
            axes.set_title(f"{op}, {dtype}", fontsize=11)
        line[0].set_ylabel("GB/s")
        line[0].set_ylim(bottom=0)  # last, as it would fix the shared upper end too
    for axes in panels[-1]:
        axes.set_xlabel("hidden size (below it: rows)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _largest(rows: Iterable[Row]) -> list[Row]:
    """One row for each hidden size, the one with the most rows, by hidden size."""
    by_hidden = {row.case.hidden: row for row in sorted(rows, key=lambda row: row.case.rows)}
    return [by_hidden[hidden] for hidden in sorted(by_hidden)]


def _panel(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    # Evenly spaced, whatever the sizes are: each one's place is as good as its neighbour's.
    places = range(len(rows))
    others = (name for name in names if name not in _STYLES)
    styles = _STYLES | {
        name: {
            "color": _COLORS[number % len(_COLORS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linewidth": 1.5,
            "markersize": 5,
        }
        for number, name in enumerate(others)
    }
    for name in names:
        speeds = [row.bytes_per_second(name) for row in rows]
        values = [float("nan") if speed is None else speed / 1e9 for speed in speeds]
        axes.plot(places, values, label=name, **styles[name])
    labels = [f"{row.case.hidden:,}\nx {row.case.rows:,}" for row in rows]
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.margins(x=0.06)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
