"""The statistics of a pyramid as one picture, a column for each level. Needs matplotlib, of the extra `examples`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxsparse.inspect.report import edges, offsets
from jaxsparse.inspect.scan import Level
from jaxsparse.inspect.statistics import FILL_TILES, READ_TILES, Statistics

_TEXT, _QUIET, _FAINT = "#1f2933", "#616e7c", "#d5dbe1"
_BAR, _SECOND_BAR = "#4c72b0", "#dd8452"
# Row orders in the order of `Statistics`: from the scan's to the one sorted over everything.
_ORDERS = {
    "scan order": ("#8b6bb1", "s"),
    "Morton order": ("#1b6ca8", "o"),
    "sorted in windows of 256": ("#2a9d8f", "^"),
    "sorted in windows of 4,096": ("#e0a126", "v"),
    "sorted over everything": ("#c8553d", "D"),
}
_MOST_NUMBERED = 27  # taps of the largest kernel whose cells have room for a number
# In inches: a level's column, and what is left free around the columns.
_COLUMN, _LEFT, _RIGHT, _HEIGHT = 3.2, 0.9, 0.3, 13.6


def draw(path: Path, levels: Sequence[Level], title: str) -> None:
    """Writes the picture.

    Rows of panels: sizes of all levels; then for each level how often each tap is present, the fill cost, and the
    distinct input rows of a tile.
    """
    columns = max(len(levels), 3)
    width = _COLUMN * columns + _LEFT + _RIGHT
    figure = Figure(figsize=(width, _HEIGHT), facecolor="white")
    size = min(17.0, 72 * width / (0.68 * len(title)))  # letters are about 0.65 as wide as high
    figure.text(0.25 / width, 1 - 0.25 / _HEIGHT, title, va="top", fontsize=size, fontweight="bold", color=_TEXT)

    _draw_sizes(_row(figure, 3, 3, 1.15, 2.3), levels)

    _heading(figure, 4.25, "Taps present, % of sites: slices of the kernel, x to the right, y upwards, z in voxels")
    _draw_taps(_row(figure, len(levels), columns, 4.85, 0.95), levels)

    _heading(figure, 6.3, "Fill cost: executed / useful products when a tap is skipped for a whole tile of rows")
    panels = _row(figure, len(levels), columns, 6.9, 2.2)
    _draw_orders(panels, levels, FILL_TILES, lambda statistics: statistics.fill_cost)
    panels[0].set_ylabel("executed / useful")
    _share_height(panels, least=1)

    _heading(figure, 9.85, "Distinct input rows that a tile of output rows reads")
    panels = _row(figure, len(levels), columns, 10.45, 2.0)
    _draw_orders(panels, levels, READ_TILES, lambda statistics: statistics.distinct_rows)
    for panel, level in zip(panels, levels, strict=True):
        pairs = [level.statistics.neighbours * min(tile, level.statistics.sites) for tile in READ_TILES]
        panel.plot(READ_TILES, pairs, color=_QUIET, linestyle=(0, (2, 2)), linewidth=1.3, label="a row for each pair")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0].set_ylabel("distinct input rows")
    _share_height(panels)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0), frameon=False,
        ncols=6 if columns > 3 else 3, fontsize=11, labelcolor=_TEXT,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def _row(figure: Figure, panels: int, columns: int, top: float, height: float) -> np.ndarray:
    """Panels in the first of `columns` side by side; `top`, from the figure's upper edge, and `height` in inches."""
    width, whole = figure.get_size_inches()
    sides = {"left": _LEFT / width, "right": 1 - _RIGHT / width}
    places = figure.add_gridspec(
        1, columns, **sides, top=1 - top / whole, bottom=1 - (top + height) / whole, wspace=0.16
    )
    return np.array([figure.add_subplot(places[0, i]) for i in range(panels)])


def _heading(figure: Figure, top: float, words: str) -> None:
    width, whole = figure.get_size_inches()
    figure.text(0.25 / width, 1 - top / whole, words, va="top", fontsize=13, fontweight="bold", color=_TEXT)


def _share_height(panels: np.ndarray, least: float | None = None) -> None:
    """One vertical scale for all panels, its numbers at the first."""
    limits = np.array([panel.get_ylim() for panel in panels])
    for panel in panels:
        panel.set_ylim(limits[:, 0].min() if least is None else least, limits[:, 1].max())
        panel.tick_params(labelleft=panel is panels[0])


def _tidy(panel: Axes) -> None:
    """Quiet axes: no box, small grey ticks."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_FAINT)
    panel.tick_params(colors=_QUIET, labelsize=10.5, length=3)
    panel.xaxis.label.set(color=_QUIET, fontsize=11)
    panel.yaxis.label.set(color=_QUIET, fontsize=11)


def _name(number: int, level: Level) -> str:
    return f"level {number} (voxel {edges(level)})"


def _draw_sizes(panels: np.ndarray, levels: Sequence[Level]) -> None:
    """Bars by level: sites, neighbours, bytes."""
    places = np.arange(len(levels))
    each = [level.statistics for level in levels]
    megabytes = np.array([(s.table_bytes, s.mask_bytes) for s in each]) / 1e6
    for panel, heading, heights, write in (
        (panels[0], "Sites", np.array([s.sites for s in each]), "{:,}"),
        (panels[1], "Neighbours a site", np.array([s.neighbours for s in each]), "{:.1f}"),
        (panels[2], "Kernel map, MB", megabytes.sum(1), "{:.3g}"),
    ):
        panel.set_title(heading, loc="left", pad=12, fontsize=13, fontweight="bold", color=_TEXT)
        panel.bar(places, heights, width=0.62, color=_BAR, label="table")
        for place, height in zip(places, heights, strict=True):
            panel.annotate(
                write.format(height), (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=10.5,
                color=_TEXT,
            )  # fmt: skip
        panel.set_xticks(places, [str(place) for place in places])
        panel.set_xlabel("level")
        panel.set_xlim(-0.6, max(len(levels), 3) - 0.4)
        panel.margins(y=0.14)
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
        _tidy(panel)
    panels[1].set_ylabel("own site included")
    panels[2].bar(places, megabytes[:, 1], bottom=megabytes[:, 0], width=0.62, color=_SECOND_BAR, label="tap masks")
    panels[2].legend(loc="upper right", frameon=False, fontsize=11, labelcolor=_TEXT)


def _draw_taps(panels: np.ndarray, levels: Sequence[Level]) -> None:
    """Slices of each level's kernel side by side, all levels on one colour scale."""
    shares = [100 * level.statistics.tap_share for level in levels]
    kernel = shares[0].shape
    # Every site has itself: that tap would leave no colours for the others.
    highest = max(share[share < 100].max(initial=1) for share in shares)
    if shares[0].size > _MOST_NUMBERED:
        panels[0].set_ylabel(f"white 0\nblue {highest:.0f}", rotation=0, ha="right", va="center")
    for number, (panel, level, share) in enumerate(zip(panels, levels, shares, strict=True)):
        gap = np.full((1, kernel[1]), np.nan)
        strip = np.concatenate([part for z in range(kernel[2]) for part in (gap, share[:, :, z])][1:])  # [columns, ky]
        panel.imshow(strip.T, origin="lower", cmap="Blues", vmin=0, vmax=highest * 1.15, aspect="equal")
        if share.size <= _MOST_NUMBERED:
            for (x, y), value in np.ndenumerate(strip):
                if not np.isnan(value):
                    colour = "white" if value > 0.6 * highest else _TEXT
                    panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
        centres = [(kernel[0] + 1) * z + (kernel[0] - 1) / 2 for z in range(kernel[2])]
        panel.set_xticks(centres, [f"z = {z}".replace("-", "\u2212") for z in offsets(kernel[2])])
        panel.set_yticks([])
        panel.set_title(_name(number, level), fontsize=11.5, color=_TEXT, pad=8)
        _tidy(panel)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)


def _draw_orders(
    panels: np.ndarray,
    levels: Sequence[Level],
    tiles: Sequence[int],
    values_of: Callable[[Statistics], dict[str, dict[int, float]]],
) -> None:
    """A line for each row order over tile sizes, a panel for each level."""
    for number, (panel, level) in enumerate(zip(panels, levels, strict=True)):
        for order, by_tile in values_of(level.statistics).items():
            colour, marker = _ORDERS[order]
            panel.plot(tiles, [by_tile[t] for t in tiles], color=colour, marker=marker, markersize=5, label=order)
        panel.set_xscale("log", base=2)
        panel.set_xticks(tiles, [str(t) for t in tiles])
        panel.minorticks_off()
        panel.set_xlabel("rows a tile")
        panel.set_title(_name(number, level), fontsize=11.5, color=_TEXT, pad=8)
        panel.grid(axis="y", color=_FAINT, linewidth=0.7)
        _tidy(panel)
