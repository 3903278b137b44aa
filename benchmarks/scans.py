"""Reads the real scans that the benchmarks run on, and turns them into voxels.

The scans are not part of the project. A folder of them is given with `--data`; each is an `.npz` with `xyz` float32
`[P, 3]` in metres and, where the sensor has it, `intensity` `[P]`.
"""

import pathlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Voxels:
    """Distinct voxels of one or more scans, in the order in which their first points were measured.

    coords: int32 `[N, 4]`, batch, x, y, z.
    feats: float32 `[N, 4]`, x, y, z in metres and intensity (0 where the sensor has none), of the voxel's first point.
    """

    coords: np.ndarray
    feats: np.ndarray


def missing(folder, names):
    """Why the named scans cannot be read, or None."""
    if folder is None:
        return "no scans: give the folder that holds them with --data"
    absent = [name for name in names if not (pathlib.Path(folder) / f"{name}.npz").is_file()]
    return f"no scans {', '.join(absent)} in {folder}" if absent else None


def read(folder, name, voxel_size, share=1.0):
    """Voxels of one scan, batch 0.

    The voxel of a point is float32 `floor(xyz / voxel_size)` less (the scan's smallest less 1): coordinates start at 1.

    Args:
        folder: Folder of the scans.
        name: The scan's name, without `.npz`.
        voxel_size: Edge in metres, or one an axis.
        share: Keeps this share of the scan, a sector of directions around its middle, for a quick look.
    """
    with np.load(pathlib.Path(folder) / f"{name}.npz") as arrays:
        xyz = arrays["xyz"].astype(np.float32)
        intensity = arrays["intensity"] if "intensity" in arrays.files else np.zeros(len(xyz))
    x, y = (xyz[:, :2] - np.median(xyz[:, :2], axis=0)).T
    keep = np.arctan2(y, x) <= np.pi * (2 * share - 1)
    feats = np.column_stack([xyz, intensity]).astype(np.float32)[keep]
    index = np.floor(xyz[keep] / np.asarray(voxel_size, np.float32)).astype(np.int32)
    index -= index.min(axis=0) - 1
    _, first = np.unique(index, axis=0, return_index=True)
    first.sort()
    return Voxels(np.column_stack([np.zeros(len(first), np.int32), index[first]]), feats[first])


def block(edge):
    """A full cube of `edge` sites a side, without a scan: every site has all its neighbours but those at the faces."""
    coords = np.indices((1, edge, edge, edge), np.int32).reshape(4, -1).T + np.int32([0, 1, 1, 1])
    return Voxels(coords, coords.astype(np.float32))


def batch(scans):
    """One batch of several scans: batch index is the position in the list."""
    coords = [np.column_stack([np.full(len(s.coords), b, np.int32), s.coords[:, 1:]]) for b, s in enumerate(scans)]
    return Voxels(np.concatenate(coords), np.concatenate([s.feats for s in scans]))


def copies(scans, number):
    """So many scans, going round; each round is turned or mirrored in another way."""
    return [_symmetry(scans[i % len(scans)], i // len(scans) % 8) for i in range(number)]


def ring(scans, length=8):
    """`length` batches of the same scans, each turned or mirrored in the x-y plane: as many voxels, at other sites.

    The 8 symmetries of the grid keep the voxels apart; coarser levels change by a fraction of a percent.
    """
    return [batch([_symmetry(s, i % 8) for s in scans]) for i in range(length)]


def in_library_order(voxels):
    """The voxels sorted by (batch, Morton code), the order in which `jaxsparse.voxelize` puts them."""
    batch_index, *axes = voxels.coords.astype(np.uint64).T
    code = np.zeros(len(voxels.coords), np.uint64)
    for bit in range(16):
        for a, axis in enumerate(reversed(axes)):  # the first axis takes the highest bit of three
            code |= (axis >> np.uint64(bit) & np.uint64(1)) << np.uint64(3 * bit + a)
    order = np.lexsort([code, batch_index])
    return Voxels(voxels.coords[order], voxels.feats[order])


def _symmetry(scan, which):
    """The scan after a symmetry of the x-y grid: axes swapped (bit 2), x mirrored (bit 0), y mirrored (bit 1)."""
    coords, feats = scan.coords.copy(), scan.feats.copy()
    if which & 4:
        coords[:, [1, 2]], feats[:, [0, 1]] = coords[:, [2, 1]], feats[:, [1, 0]]
    for axis in (0, 1):
        if which >> axis & 1:
            coords[:, 1 + axis] = coords[:, 1 + axis].max() + 1 - coords[:, 1 + axis]
            feats[:, axis] *= -1
    return Voxels(coords, feats)
