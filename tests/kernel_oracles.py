"""What the tests of the CUDA kernels on the host share: the call, dtypes, and brute force in numpy."""

import contextlib
import itertools

import cuda_on_host
import jax
import ml_dtypes
import numpy as np
import pytest

from jaxsparse.ops.conv import Tile

PADDING = np.iinfo(np.int32).min
BITS = {1: 31, 2: 24, 3: 18, 4: 14}
I32, U32, U8 = np.int32, np.uint32, np.uint8
F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64

call = cuda_on_host.call
ON_HOST = [
    pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("cuda_library"),
]


def key(site):
    """The 64-bit key of (batch, coordinates), None where a field does not fit."""
    batch, *coords = (int(v) for v in site)
    dims = len(coords)
    bits = BITS[dims]
    max_batch = 2**31 - 1 if dims == 1 else 2 ** (64 - dims * bits) - 2
    half = 2 ** (bits - 1)
    if not 0 <= batch <= max_batch or not all(-half <= c < half for c in coords):
        return None
    code = 0
    for bit in reversed(range(bits)):
        for c in coords:
            code = code << 1 | (c + half) >> bit & 1
    return batch << (dims * bits) | code


def taps(kernel):
    return list(itertools.product(*(range(k) for k in kernel)))


def fine(site, tap, geometry):
    rest = [s * int(c) - p + d * t for c, t, s, p, d in zip(site[1:], tap, *geometry[1:], strict=True)]
    return (int(site[0]), *(int(v) for v in rest))


def attributes(geometry, **more):
    return dict(zip(("kernel", "stride", "padding", "dilation"), geometry, strict=True), **more)


def sites_array(sites, rows, dims):
    out = np.full((rows, 1 + dims), PADDING, I32)
    out[: min(len(sites), rows)] = np.array(sites[:rows], I32).reshape(-1, 1 + dims)
    return out


def real_rows(rows, counts):
    per = rows // len(counts)
    return [s * per + r for s, count in enumerate(counts) for r in range(min(max(count, 0), per))]


def masks_of(table):
    volume, rows = table.shape
    masks = np.zeros((rows, -(-volume // 32)), U32)
    for k, m in zip(*np.nonzero(table >= 0), strict=True):
        masks[m, k // 32] |= U32(1 << (k % 32))
    return masks


def as_operands(table, counts):
    """Table, masks and counts as the calls take a map: where the masks have no tap, the table holds anything."""
    return np.where(table >= 0, table, 7), masks_of(table), np.array(counts, I32)


def wide(dtype):
    """float64 crosses JAX only in x64 mode."""
    return jax.enable_x64(True) if dtype == F64 else contextlib.nullcontext()


def small_integers(rng, shape, dtype):
    """Values whose products and sums are exact in every accumulator, so that equality is the test."""
    return rng.integers(-3, 4, shape).astype(dtype)


def random_table(rng, volume, in_rows, out_rows, density, centre=False):
    """A kernel map in which each tap takes an input row at most once."""
    table = np.full((volume, out_rows), -1, I32)
    for k in range(volume):
        rows = rng.permutation(in_rows)[:out_rows]
        there = rng.random(len(rows)) < (1 if centre and k == volume // 2 else density)
        table[k, : len(rows)] = np.where(there, rows, -1)
    return table


def symmetric_table(rng, volume, rows, counts, density):
    """The same over the real rows, but as in a submanifold convolution: opposite taps are each other's reverse."""
    real = np.array(real_rows(rows, counts), int)
    table = np.full((volume, rows), -1, I32)
    table[volume // 2, real] = real
    for k in range(volume // 2):
        there = rng.random(len(real)) < density
        to, from_ = real[there], rng.permutation(real)[there]
        table[k, to], table[volume - 1 - k, from_] = from_, to
    return table


def tile_attributes(tile):
    rows, cols, stages, splits = Tile(*tile)
    return {"tile_rows": rows, "tile_cols": cols, "stages": stages, "splits": splits}


HARD = ["normal", "cancelling", "spread"]


def adversarial(rng, shape, kind):
    """Float32 whose sums are hard: large and cancelling, or of every magnitude. (Denormals XLA's CPU threads flush.)"""
    x = rng.normal(size=shape)
    if kind == "cancelling":
        x = np.where(rng.random(shape) < 0.5, 1e4, -1e4) * (1 + 1e-4 * x)
    elif kind == "spread":
        x = x * 10.0 ** rng.integers(-12, 5, shape)
    return x.astype(F32)


def truncated(x):
    """What tensor cores read of a float32."""
    return (x.view(U32) & U32(0xFFFFE000)).view(F32)


def assert_within_rounding(got, truth, magnitude, terms):
    """Each of `terms` fused multiply-adds rounds once, by at most 2^-24 of sum |x| |w|."""
    assert (np.abs(got.astype(F64) - truth) <= 1.001 * terms * 2.0**-24 * magnitude).all()


def rows_under_taps(x, table):
    """Float64 [taps, outputs, channels], 0 where a tap is absent."""
    return np.where(table[:, :, None] >= 0, x.astype(F64)[table], 0)
