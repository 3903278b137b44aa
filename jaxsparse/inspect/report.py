"""The statistics of a pyramid as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxsparse.inspect.scan import Level
from jaxsparse.inspect.statistics import FILL_TILES, READ_TILES

_WIDTH = 110  # characters a line, unless one slice of a kernel is wider


def text(levels: Sequence[Level]) -> str:
    """Three tables: levels, row orders, taps."""
    return "\n".join([*_sizes(levels), "", *_orders(levels), "", *_taps(levels)])


def edges(level: Level) -> str:
    """The edges of a level's voxels, once if all are equal."""
    names = [f"{edge:g}" for edge in level.voxel_size]
    return names[0] if len(set(names)) == 1 else " x ".join(names)


def offsets(taps: int) -> range:
    """Where the taps of one axis lie, in voxels from the output site: a submanifold kernel with default padding."""
    first = -((taps - 1) // 2)
    return range(first, first + taps)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]]).rstrip()
        for row in rows
    ]


def _sizes(levels: Sequence[Level]) -> list[str]:
    rows = [["level", "voxel edge", "sites", "of the finer", "pairs", "neighbours", "table bytes", "mask bytes"]]
    for number, level in enumerate(levels):
        s = level.statistics
        share = f"{s.sites / levels[number - 1].statistics.sites:.0%}" if number else ""
        sizes = (f"{s.table_bytes:,}", f"{s.mask_bytes:,}")
        rows.append([str(number), edges(level), f"{s.sites:,}", share, f"{s.pairs:,}", f"{s.neighbours:.2f}", *sizes])
    return [
        "LEVELS",
        "Pairs are (site, tap) with an input; neighbours are pairs a site, its own included. Bytes are those of a",
        "kernel map with a row for each site.",
        "",
        *_aligned(rows),
    ]


def _orders(levels: Sequence[Level]) -> list[str]:
    rows = [["", *[f"T={t}" for t in FILL_TILES], "   ", *[f"{t} rows" for t in READ_TILES]]]
    for number, level in enumerate(levels):
        s = level.statistics
        rows += [[""] * len(rows[0]), [f"level {number}", *[""] * (len(rows[0]) - 1)]]
        for order, cost in s.fill_cost.items():
            reads = [f"{s.distinct_rows[order][t]:.0f}" for t in READ_TILES]
            rows.append([f"  {order}", *[f"{cost[t]:.2f}" for t in FILL_TILES], "", *reads])
        pairs = [f"{s.neighbours * min(t, s.sites):.0f}" for t in READ_TILES]
        rows.append(["  pairs, for comparison", *[""] * len(FILL_TILES), "", *pairs])
    return [
        "ROW ORDERS",
        "Left, fill cost: executed over useful row-tap products when a tap is skipped for T rows at a time.",
        "Right: distinct input rows that a tile of so many outputs reads. Sorted means by tap mask, from Morton order.",
        "",
        *_aligned(rows),
    ]


def _taps(levels: Sequence[Level]) -> list[str]:
    lines = [
        "TAPS",
        "How often each tap is present, in per cent of the sites. A block is a slice of the kernel, z in voxels from",
        "the site; x grows to the right, y upwards.",
    ]
    for number, level in enumerate(levels):
        share = level.statistics.tap_share  # [kx, ky, kz]
        width = 4 * share.shape[0] + 4
        a_line = max(_WIDTH // width, 1)
        lines += ["", f"level {number}"]
        for first in range(0, share.shape[2], a_line):
            slices = range(share.shape[2])[first : first + a_line]
            names = [f"z = {offsets(share.shape[2])[z]}" for z in slices]
            lines.append("  " + "".join(name.rjust(width - 4).ljust(width) for name in names).rstrip())
            for y in reversed(range(share.shape[1])):
                row = ["".join(f"{100 * v:4.0f}" for v in share[:, y, z]).ljust(width) for z in slices]
                lines.append("  " + "".join(row).rstrip())
    return lines
