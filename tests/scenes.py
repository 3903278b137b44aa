"""Random scenes and plain oracles that several test files share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxsparse as js
from jaxsparse.geometry import Geometry


def random_coords(rng, rows, dims=3, low=-4, high=5, batches=2):
    """Distinct int32 sites [N, 1 + D] in random order, N at most `rows`."""
    coords = np.concatenate([rng.integers(0, batches, (rows, 1)), rng.integers(low, high, (rows, dims))], 1)
    coords = np.unique(coords, axis=0).astype(np.int32)
    rng.shuffle(coords)
    return coords


def quick_rngs() -> nnx.Rngs:
    """Parameters from a generator that compiles in a third of the default's time."""
    return nnx.Rngs(jax.random.key(0, impl="rbg"))


def pad_rows(array, rows, fill):
    """The array with rows of `fill` after it, up to `rows`."""
    array = np.asarray(array)
    out = np.full((rows, *array.shape[1:]), fill, array.dtype)
    out[: len(array)] = array
    return out


def random_tensor(seed=0, rows=60, features=3, capacity=None, dtype=jnp.float32, fill=0.0, **kwargs):
    """A SparseTensor on random sites; padding rows hold `fill` on the way in."""
    rng = np.random.default_rng(seed)
    coords = random_coords(rng, rows, **kwargs)
    feats = rng.normal(size=(len(coords), features))
    capacity = capacity or len(coords)
    padded = jnp.asarray(pad_rows(feats, capacity, fill), dtype)
    return js.SparseTensor(pad_rows(coords, capacity, 7), padded, count=len(coords))


def random_kernel(seed, geometry: Geometry, c_in, c_out, dtype=jnp.float32):
    """A kernel [K, C_in, C_out]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(geometry.volume, c_in, c_out)), dtype)


def on_cpu(f, *args):
    """f(*args) on the CPU whatever the default device: XLA for GPUs has no float64 convolution of every geometry."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.device_get(f(*jax.device_put(args, cpu)))


def dense_conv(x: js.SparseTensor, feats, kernel, geometry: Geometry, out_coords):
    """The convolution by `lax.conv_general_dilated` on the whole grid, read at `out_coords` [M, 1 + D].

    Differentiable in feats and kernel. The grid reaches far enough for every window of the outputs.
    """
    coords, count, dims = np.asarray(x.coords), int(x.count), x.dims
    stride, dilation = np.array(geometry.stride), np.array(geometry.dilation)
    window = dilation * (np.array(geometry.kernel) - 1)
    first = stride * out_coords[:, 1:].min(0) - np.array(geometry.padding)  # the first output's first tap
    low = np.minimum(first, coords[:count, 1:].min(0))
    low -= (low - first) % stride  # outputs begin a whole number of strides into the grid
    high = np.maximum(
        stride * out_coords[:, 1:].max(0) - np.array(geometry.padding) + window, coords[:count, 1:].max(0)
    )
    batches = max(coords[:count, 0].max(), out_coords[:, 0].max()) + 1
    grid = jnp.zeros((batches, *(high - low + 1), feats.shape[1]), feats.dtype)
    at = (coords[:count, 0], *(coords[:count, 1:] - low).T)
    grid = grid.at[at].set(feats[:count])
    letters = "xyzt"[:dims]
    y = lax.conv_general_dilated(
        grid,
        kernel.reshape(*geometry.kernel, *kernel.shape[1:]),
        window_strides=geometry.stride,
        padding="VALID",
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=lax.Precision.HIGHEST,
    )
    place = (stride * out_coords[:, 1:] - np.array(geometry.padding) - low) // stride
    return y[(out_coords[:, 0], *place.T)]


def regular_scenes(line, plane, cube):
    """Sites [N, 4] without anything random, by name: so many on a line, on each side of a plane and of a cube."""
    on_line = np.stack([np.zeros(line), np.arange(line) - line // 2, np.zeros(line), np.zeros(line)], 1)
    in_cube = np.indices((1, cube, cube, cube)).reshape(4, -1).T - [0, *[cube // 2] * 3]
    return {
        "line": on_line,
        "far line": on_line - [0, line // 2 - 2**17, 2**17, 1 - 2**17],
        "plane": np.indices((1, plane, 1, plane)).reshape(4, -1).T - [0, plane // 2, 0, plane // 2],
        "cube": in_cube,
        "checkerboard": in_cube[in_cube.sum(1) % 2 == 0],
        "batches of one voxel": np.stack([np.arange(1000), *np.full((3, 1000), -1)], 1),
    }


def row_error(actual, expected):
    """Largest error of any element over the norm of the largest row."""
    scale = np.linalg.norm(np.asarray(expected, np.float64).reshape(len(expected), -1), axis=1).max(initial=0.0)
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0)
    return error / max(scale, 1e-30)
