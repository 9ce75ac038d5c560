"""The files that a run leaves besides its checkpoint: metrics, loss curve, sample."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .history import History

_REACH = 25  # steps to each side that a point of the smooth curve is the mean of, at most

FILES = ("metrics.json", "loss.png", "sample.txt")


def write(folder: Path, metrics: Mapping[str, Any], history: History, text: str) -> None:
    """Writes the `FILES`."""
    metrics_path, curve_path, sample_path = (folder / name for name in FILES)
    metrics_path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    sample_path.write_text(text + "\n", encoding="utf-8")
    _curve(history).savefig(curve_path)


def _curve(history: History) -> Figure:
    """Plots training and held-out loss over steps."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    train = np.asarray(history.train)
    steps = np.arange(train.size)
    axes.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(train), color="tab:blue", label="training")
    axes.plot(
        *zip(*history.held_out, strict=True), color="tab:orange", marker="o", label="held out"
    )
    axes.set(xlabel="step", ylabel="loss (bits per byte)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours: fewer at the start, where the loss falls steeply."""
    index = np.arange(values.size)
    reach = np.minimum(index, min(_REACH, values.size // 20))
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, end = index - reach, np.minimum(index + reach + 1, values.size)
    return (total[end] - total[first]) / (end - first)
