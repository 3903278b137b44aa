"""Points from a file, and the levels that a network would make of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsparse.geometry import Geometry
from jaxsparse.inspect.statistics import Statistics, measure
from jaxsparse.kernel_map import kernel_map
from jaxsparse.voxel import voxelize

_FORMATS = ".npz, .npy or .bin (KITTI: float32 x, y, z, intensity)"


@dataclass(frozen=True)
class Level:
    """One level: its grid stride, the edges of its voxels in the unit of the points, and what was counted."""

    stride: int
    voxel_size: tuple[float, ...]
    statistics: Statistics


def read_points(path: Path, array: str = "xyz") -> np.ndarray:
    """The points of a file, float32 `[P, 3]`, those that are not finite included.

    Args:
      path: `.npz` with an array `[P, >= 3]`, `.npy` with one such array, or KITTI's `.bin`.
      array: its name in an `.npz`.

    Raises:
      ValueError: names the file, what is wrong with it, and the remedy.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ValueError(f"`scan` (={path}): {what}; name a file that is {_FORMATS}.")
    if path.suffix not in (".npz", ".npy", ".bin"):
        raise ValueError(f"`scan` (={path}): cannot read {path.suffix or 'a file without suffix'}; pass {_FORMATS}.")
    try:
        if path.suffix == ".bin":
            return np.fromfile(path, np.float32).reshape(-1, 4)[:, :3]
        values = np.load(path)
        if isinstance(values, np.lib.npyio.NpzFile):
            with values:
                if array not in values.files:
                    found = ", ".join(values.files) or "none"
                    raise KeyError(f"no array {array!r} among those that it holds ({found}); name one with --array.")
                values = values[array]
    except KeyError as error:
        raise ValueError(f"`scan` (={path}): {error.args[0]}") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"`scan` (={path}): not a sound {path.suffix} file ({error}); pass {_FORMATS}.") from error
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"`scan` (={path}): the array is {values.dtype}{list(values.shape)}, but points are numbers [P, 3] or more "
            "columns, x, y and z first; name another array of an .npz with --array."
        )
    return values[:, :3].astype(np.float32)


def pyramid(points: np.ndarray, voxel_size: Sequence[float], kernel: Sequence[int], levels: int) -> Iterator[Level]:
    """The statistics of each level, finest first.

    Level 0 holds the voxels of the points. Each later one halves the grid: the output sites of a strided convolution
    with kernel 2 and strides 2, for which "floor" and "reachable" sites are the same. The map of a level is that of a
    submanifold convolution. Level 0 is also counted in the order in which its voxels' first points stand in the file.

    Args:
      points: float32 `[P, 3]`, finite, P at least 1.
      voxel_size: an edge for each axis.
      kernel: taps for each axis.
      levels: how many.

    Raises:
      SiteError: where the voxels do not fit the range of site keys.
    """
    no_feats = jnp.zeros((len(points), 1), jnp.float32)
    voxels, point_to_voxel = voxelize(jnp.asarray(points), no_feats, voxel_size, capacity=len(points))
    sites = voxels.sites.check()
    _, first_point = np.unique(np.asarray(point_to_voxel), return_index=True)
    orders = {"scan order": np.argsort(first_point)}

    halving = Geometry.create(3, 2, 2)
    for level in range(levels):
        if level > 0:
            sites = sites.coarse(halving, "floor", capacity=int(sites.count)).check()
        count, m = int(sites.count), kernel_map(sites, sites, kernel)
        table, masks = np.asarray(m.table)[:, :count], np.asarray(m.masks)[:count]
        stride = sites.stride[0]
        yield Level(stride, tuple(stride * v for v in voxel_size), measure(table, masks, kernel, orders))
        orders = {}
