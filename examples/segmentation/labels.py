"""Class tables: names and colours of what is learnt, and how raw label ids become class indices.

`IGNORED` marks points without a class; they take no part in the loss or in the score. SemanticKITTI's raw ids map to
its 19 learning classes by the published table (semantic-kitti.yaml, `learning_map`, with its class 0 as `IGNORED`).
Ids of any other data set are relabelled densely: the ids present, in ascending order, with 0 ignored.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

IGNORED = -1


@dataclass(frozen=True)
class ClassTable:
    """Names and colours (`#rrggbb`) of the classes, and the raw ids that each one takes."""

    names: tuple[str, ...]
    colours: tuple[str, ...]
    raw_ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The class of this name."""
        return self.names.index(name)

    def from_raw(self, raw: np.ndarray) -> np.ndarray:
        """Class index int32 of each raw id; `IGNORED` where the id belongs to no class."""
        raw = np.asarray(raw)
        largest = max(int(raw.max(initial=0)), max(map(max, self.raw_ids)))
        table = np.full(largest + 1, IGNORED, np.int32)
        for index, ids in enumerate(self.raw_ids):
            table[list(ids)] = index
        return table[raw]


# Name, colour on a dark background, raw ids (static and moving objects share a class).
_SEMANTIC_KITTI = (
    ("car", "#4ea1ff", (10, 252)),
    ("bicycle", "#35d6e6", (11,)),
    ("motorcycle", "#3f7fe0", (15,)),
    ("truck", "#8f7bff", (18, 258)),
    ("other-vehicle", "#5a5cf0", (13, 16, 20, 256, 257, 259)),
    ("person", "#ff4d5e", (30, 254)),
    ("bicyclist", "#ff6fc1", (31, 253)),
    ("motorcyclist", "#d1499b", (32, 255)),
    ("road", "#66708a", (40, 60)),
    ("parking", "#8d86a8", (44,)),
    ("sidewalk", "#b79ad6", (48,)),
    ("other-ground", "#8a5a78", (49,)),
    ("building", "#e8b04a", (50,)),
    ("fence", "#f0763a", (51,)),
    ("vegetation", "#2fae60", (70,)),
    ("trunk", "#a8693d", (71,)),
    ("terrain", "#a5cc58", (72,)),
    ("pole", "#fff1a8", (80,)),
    ("traffic-sign", "#ff3df0", (81,)),
)
SEMANTIC_KITTI = ClassTable(*zip(*_SEMANTIC_KITTI, strict=True))


def dense_table(raw_labels: list[np.ndarray]) -> ClassTable:
    """One class for each id that occurs in `raw_labels`, 0 excepted, in ascending order."""
    ids = sorted(set().union(*(np.unique(raw).tolist() for raw in raw_labels)) - {0})
    # The golden ratio spreads hues so that neighbours in the list differ; two lightnesses tell wrapped hues apart.
    hues = [(0.58 + 0.618034 * i) % 1.0 for i in range(len(ids))]
    rgb = [colorsys.hls_to_rgb(hue, 0.62 if i % 2 else 0.72, 0.75) for i, hue in enumerate(hues)]
    colours = ["#" + "".join(f"{round(255 * channel):02x}" for channel in colour) for colour in rgb]
    return ClassTable(tuple(f"id {i}" for i in ids), tuple(colours), tuple((i,) for i in ids))
