"""Scores and pictures: IoU from a confusion matrix, the table of classes, and the view from above."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from rich.table import Table

from .labels import IGNORED, ClassTable
from .scans import Scan

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patheffects import withStroke

_BACKGROUND, _TEXT, _QUIET, _UNLABELLED = "#0d1117", "#e6edf3", "#8b949e", "#30363d"
_HEIGHTS = LinearSegmentedColormap.from_list("heights", ["#21305e", "#2c6fbb", "#35b8c8", "#8fe3a1", "#fff3a3"])


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, NaN for classes without labelled points.

    `confusion[t, p]` counts the labelled points of class t that were predicted as p.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = labelled + predicted - hits
    return np.where(labelled > 0, hits / np.maximum(union, 1), np.nan)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the classes that have labelled points; NaN if none has."""
    present = iou(confusion)
    present = present[~np.isnan(present)]
    return float(present.mean()) if len(present) else float("nan")


def iou_table(confusion: np.ndarray, classes: ClassTable) -> Table:
    """A table with a row for each class present, largest class first."""
    confusion = np.asarray(confusion)
    scores, points = iou(confusion), confusion.sum(axis=1)
    table = Table("class", "points", "IoU", "", title=f"mIoU {mean_iou(confusion):.3f} over the classes present")
    table.columns[1].justify = table.columns[2].justify = "right"
    for c in np.argsort(-points, kind="stable"):
        if points[c]:
            bar = "█" * round(20 * scores[c])
            table.add_row(classes.names[c], f"{int(points[c]):,}", f"{scores[c]:.3f}", f"[{classes.colours[c]}]{bar}")
    return table


def _window(xyz: np.ndarray) -> tuple[float, float, float, float]:
    """A rectangle x0, x1, y0, y1 around the sensor that holds most points, at least 2/3 as short as it is long."""
    reach = np.clip(np.quantile(np.abs(xyz[:, :2]), 0.95, axis=0), 8.0, 40.0)
    half = np.maximum(reach, reach[::-1] * 2 / 3)
    return -half[0], half[0], -half[1], half[1]


def draw_from_above(path: Path, scan: Scan, prediction: np.ndarray, classes: ClassTable, title: str) -> None:
    """Writes a PNG with three views from above: the points by height, by label, and by prediction.

    Args:
        path: where the picture goes.
        scan: the points; those labelled `IGNORED` are drawn faintly in all but the first panel.
        prediction: class index int32 [P].
        classes: names and colours.
        title: the headline.
    """
    x0, x1, y0, y1 = _window(scan.xyz)
    inside = (scan.xyz[:, 0] > x0) & (scan.xyz[:, 0] < x1) & (scan.xyz[:, 1] > y0) & (scan.xyz[:, 1] < y1)
    order = np.flatnonzero(inside)
    order = order[np.argsort(scan.xyz[order, 2])]  # what stands higher is drawn over what lies below
    xyz, label, predicted = scan.xyz[order], scan.label[order], prediction[order]

    low, high = np.quantile(xyz[:, 2], [0.02, 0.98])
    height = _HEIGHTS(np.clip((xyz[:, 2] - low) / max(high - low, 1e-6), 0.0, 1.0))[:, :3]
    palette = np.array([to_rgb(colour) for colour in (*classes.colours, _UNLABELLED)])  # IGNORED, -1, is the last
    predicted = np.where(label == IGNORED, IGNORED, predicted)
    panels = {
        f"Input, coloured by height ({low:.1f} m to {high:.1f} m)".replace("-", "\u2212"): height,
        "Labels": palette[label],
        "Prediction": palette[predicted],
    }

    width = 7.0
    tall = width * (y1 - y0) / (x1 - x0)
    figure, axes = plt.subplots(1, 3, figsize=(3 * width, tall + 1.9), facecolor=_BACKGROUND, dpi=130)
    figure.subplots_adjust(0.005, 0.95 / (tall + 1.9), 0.995, 1 - 0.95 / (tall + 1.9), wspace=0.012)
    size = np.clip(90_000 / max(len(order), 1), 0.8, 8.0)  # points squared, so that any scan is as dense on paper
    for panel, (name, colours) in zip(axes, panels.items(), strict=True):
        panel.scatter(xyz[:, 0], xyz[:, 1], s=size, c=colours, linewidths=0, rasterized=True)
        panel.plot(0, 0, marker="+", color=_TEXT, markersize=9, markeredgewidth=1.2)
        panel.set(xlim=(x0, x1), ylim=(y0, y1), xticks=[], yticks=[], aspect="equal", facecolor="#10151d")
        panel.set_title(name, color=_QUIET, fontsize=14, pad=8)
        for spine in panel.spines.values():
            spine.set_color("#21262d")
    _scale_bar(axes[0], x0, x1, y0, y1)
    figure.suptitle(title, color=_TEXT, fontsize=19, fontweight="bold", y=1 - 0.12 / (tall + 1.9), va="top")
    shown = [c for c in range(len(classes)) if (label == c).any()]
    keys = [plt.Line2D([], [], marker="o", linestyle="", markersize=9, color=classes.colours[c]) for c in shown]
    figure.legend(
        keys, [classes.names[c] for c in shown], loc="lower center", ncols=min(len(shown), 13), frameon=False,
        labelcolor=_TEXT, fontsize=13, handletextpad=0.1, columnspacing=1.4,
    )  # fmt: skip
    figure.savefig(path, facecolor=_BACKGROUND)
    plt.close(figure)


def _scale_bar(panel, x0: float, x1: float, y0: float, y1: float) -> None:
    x, y = x0 + 0.04 * (x1 - x0), y0 + 0.05 * (y1 - y0)
    halo = [withStroke(linewidth=5, foreground=_BACKGROUND)]  # points may lie behind
    panel.plot([x, x + 10], [y, y], color=_TEXT, linewidth=2, solid_capstyle="butt", path_effects=halo)
    label = panel.text(x + 5, y + 0.015 * (y1 - y0), "10 m", color=_TEXT, fontsize=11, ha="center", va="bottom")
    label.set_path_effects(halo)
