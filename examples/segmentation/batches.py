"""Static shapes for scans of any size: buckets, the batches drawn from them, and the voxels that each bucket may need.

Scans of similar size share a bucket, which is as large as its largest scan. A batch takes scans of one bucket, one
after the other, and pads the end: every batch of a bucket has the same shapes, so a bucket costs one compilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from .labels import IGNORED
from .scans import Scan, ScanSet


class Batch(NamedTuple):
    """Points of up to B scans. Rows past `count` are padding."""

    xyz: np.ndarray  # float32 [B * bucket, 3]
    intensity: np.ndarray  # float32 [B * bucket]
    label: np.ndarray  # int32 [B * bucket]
    scan: np.ndarray  # int32 [B * bucket]: which scan of the batch
    count: np.ndarray  # int32 []


def bucket_sizes(points: Sequence[int], least_filled: float = 0.6) -> list[int]:
    """The bucket of each scan with so many points: the largest that it fills to `least_filled`, in whole 1024s."""
    sizes, size = [0] * len(points), 0
    for i in sorted(range(len(points)), key=lambda i: -points[i]):
        if points[i] < least_filled * size or size == 0:
            size = max(1, -(-points[i] // 1024)) * 1024
        sizes[i] = size
    return sizes


def pack(scans: list[Scan], bucket: int, batch: int) -> Batch:
    """At most `batch` scans of at most `bucket` points each, one after the other, padded to `batch * bucket` rows."""
    lengths = [len(scan.xyz) for scan in scans]
    if len(scans) > batch or max(lengths) > bucket:
        raise ValueError(f"{len(scans)} scans of up to {max(lengths)} points do not fit {batch} x {bucket}")
    rows, count = batch * bucket, sum(lengths)
    out = Batch(
        np.zeros((rows, 3), np.float32),
        np.zeros(rows, np.float32),
        np.full(rows, IGNORED, np.int32),
        np.zeros(rows, np.int32),
        np.asarray(count, np.int32),
    )
    out.xyz[:count] = np.concatenate([scan.xyz for scan in scans])
    out.intensity[:count] = np.concatenate([scan.intensity for scan in scans])
    out.label[:count] = np.concatenate([scan.label for scan in scans])
    out.scan[:count] = np.repeat(np.arange(len(scans)), lengths)
    return out


@dataclass(frozen=True)
class Draw:
    """Which scans make up one batch."""

    bucket: int
    scans: tuple[int, ...]


class Sampler:
    """Draws every scan once an epoch. The order depends on seed and step alone: a resumed run goes on with it."""

    def __init__(self, scans: ScanSet, batch: int, seed: int):
        self.batch, self.seed = batch, seed
        self.buckets: dict[int, list[int]] = {}
        for i, size in enumerate(bucket_sizes(scans.points)):
            self.buckets.setdefault(size, []).append(i)
        self.steps_per_epoch = sum(-(-len(members) // batch) for members in self.buckets.values())
        self._epoch: tuple[int, list[Draw]] = (-1, [])

    def in_order(self) -> list[Draw]:
        """Draws that cover all scans once, in their own order."""
        return [
            Draw(bucket, tuple(members[i : i + self.batch]))
            for bucket, members in self.buckets.items()
            for i in range(0, len(members), self.batch)
        ]

    def at(self, step: int) -> Draw:
        """What training step `step` sees."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            draws = []
            for bucket, members in self.buckets.items():
                shuffled = rng.permutation(members).tolist()
                chunks = [shuffled[i : i + self.batch] for i in range(0, len(shuffled), self.batch)]
                draws += [Draw(bucket, tuple(chunk)) for chunk in chunks]
            self._epoch = (epoch, [draws[i] for i in rng.permutation(len(draws))])
        return self._epoch[1][place]


def load_ahead(scans: ScanSet, draws: Iterator[Draw], batch: int) -> Iterator[tuple[Draw, Batch]]:
    """The batches of `draws` on the device; a thread reads, packs and sends each while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as reader:

        def read(draw: Draw) -> tuple[Draw, Batch]:
            return draw, jax.device_put(pack([scans.load(i) for i in draw.scans], draw.bucket, batch))

        ahead = None
        for draw in draws:
            previous, ahead = ahead, reader.submit(read, draw)
            if previous is not None:
                yield previous.result()
        if ahead is not None:
            yield ahead.result()


def voxels(xyz: np.ndarray, voxel_size: float) -> int:
    """How many voxels hold a point."""
    cells = np.floor(xyz / voxel_size).astype(np.int64)
    cells -= cells.min(axis=0)
    sides = cells.max(axis=0) + 1
    return len(np.unique((cells[:, 0] * sides[1] + cells[:, 1]) * sides[2] + cells[:, 2]))


def voxel_capacity(scans: list[Scan], batch: int, voxel_size: float, slack: float) -> int:
    """Rows for the `batch` fullest of `scans` at once, times `slack` (augmentation moves points), in whole 1024s."""
    fullest = sorted((voxels(scan.xyz, voxel_size) for scan in scans), reverse=True)[:batch]
    return -(-int(slack * sum(fullest)) // 1024) * 1024
