"""What a GPU has to show: equal bits under load, slices read where they lie, and arrays of more than 2^31 elements.

Small twins run anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import site
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import random_tensor

import jaxsparse as js

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
DTYPES = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda d: d.dtype.name)


# --- repeatability ---


def cuda_runtime():
    """The CUDA runtime library, which JAX has loaded already or brings along."""
    folders = [*site.getsitepackages(), "/usr/local/cuda/lib64"]
    found = [path for folder in folders for path in glob.glob(f"{folder}/**/libcudart.so*", recursive=True)]
    for name in ("libcudart.so.13", "libcudart.so.12", *found):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    pytest.skip("no libcudart to open a second stream with")


@contextlib.contextmanager
def load_on_a_second_stream():
    """Copies of 256 MB follow each other on another stream of the same process."""
    cuda, size = cuda_runtime(), 2**28
    stream, buffers = ctypes.c_void_p(), [ctypes.c_void_p(), ctypes.c_void_p()]

    def check(code):
        assert code == 0, f"CUDA error {code}"

    check(cuda.cudaStreamCreateWithFlags(ctypes.byref(stream), 1))  # 1: does not wait for the default stream
    for buffer in buffers:
        check(cuda.cudaMalloc(ctypes.byref(buffer), ctypes.c_size_t(size)))
    stop, copies = threading.Event(), []

    def copy():
        while not stop.is_set():
            for _ in range(8):
                check(cuda.cudaMemcpyAsync(*buffers, ctypes.c_size_t(size), 3, stream))  # 3: device to device
            check(cuda.cudaStreamSynchronize(stream))
            copies.append(8)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield copies
    finally:
        stop.set()
        thread.join()
        for buffer in buffers:
            check(cuda.cudaFree(buffer))
        check(cuda.cudaStreamDestroy(stream))


def check_repeats(dtype, points, capacity, runs, options=None):
    """Runs a small network, forward and backward through every custom call, and compares all bits.

    The first run is compiled without options, those after it with them.
    """
    rng = np.random.default_rng(0)
    # Crowded and empty regions: rows of every kind, taps with many pairs and with few.
    points = jnp.asarray(rng.normal(size=(points, 3)) * [12, 12, 2], jnp.float32)
    shapes = [(27, 4, 32), (8, 32, 64), (27, 64, 64), (8, 64, 32)]
    kernels = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0] * s[1]), jnp.float32) for s in shapes]

    def run(points, kernels):
        def loss(points, kernels):
            feats = jnp.concatenate([points, jnp.ones_like(points[:, :1])], 1).astype(dtype)
            x, voxel = js.voxelize(jax.lax.stop_gradient(points), feats, 0.4, capacity=capacity)
            a = js.ops.conv(x, kernels[0], kernel_size=3)
            b = js.ops.conv(a, kernels[1], kernel_size=2, strides=2, sites="reachable")
            b = js.ops.conv(b, kernels[2], kernel_size=3)
            c = js.ops.conv_transpose(b, kernels[3], like=a, kernel_size=2, strides=2)
            out = js.devoxelize(c.feats, voxel).astype(jnp.float32)
            return jnp.mean(out**2), (c.status, c.coords, out)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(points, kernels)

    first = jax.tree.map(np.asarray, jax.jit(run)(points, kernels))
    js.status.check(first[0][1][0])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(first[1]))
    repeat = jax.jit(run, compiler_options=options)
    for i in range(runs):
        again = jax.tree.map(np.asarray, repeat(points, kernels))
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
            assert a.tobytes() == b.tobytes(), f"run {i} differs"


@DTYPES
def test_runs_give_the_same_bits(dtype):
    check_repeats(dtype, points=3000, capacity=4096, runs=3)


@on_gpu
@DTYPES
def test_a_hundred_runs_under_load_give_the_same_bits(dtype):
    with load_on_a_second_stream() as copies:
        check_repeats(dtype, points=120_000, capacity=98304, runs=100)
        assert copies, "nothing ran on the second stream"


@DTYPES
def test_kernels_that_run_side_by_side_give_the_same_bits(dtype):
    many = {"points": 120_000, "capacity": 98304, "runs": 100}
    few = {"points": 3000, "capacity": 4096, "runs": 1}
    check_repeats(dtype, **(many if jax.default_backend() == "gpu" else few), options=js.COMPILER_OPTIONS)


# --- slices ---


def test_a_slice_as_weights_is_read_where_it_lies_or_refused():
    x = random_tensor(0, rows=300, features=16, dtype=jnp.float16)
    kernel = jax.random.normal(jax.random.key(0), (27, 16, 32), jnp.float16)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def layer(begin, is_copied, buffer, x):
        piece = buffer[begin : begin + kernel.size]
        piece = jax.lax.optimization_barrier(piece) if is_copied else piece
        return js.ops.conv(x, piece.reshape(kernel.shape), kernel_size=3, sites="submanifold").feats

    def run(begin, is_copied=False):
        return layer(begin, is_copied, jnp.pad(kernel.ravel(), (begin, 3)), x)

    want = js.ops.conv(x, kernel, kernel_size=3, sites="submanifold").feats
    for begin, is_copied in ((8, False), (128, False), (5, True)):
        np.testing.assert_array_equal(run(begin, is_copied), want)
    refused = ""
    try:
        np.testing.assert_array_equal(run(5), want)  # 10 bytes from the beginning
    except jax.errors.JaxRuntimeError as error:
        refused = str(error)
    assert not refused or "w must begin at a multiple of 16 bytes" in refused


# --- more than 2^31 elements ---

BIG = ((205, 205, 203), 256)  # 8,531,075 sites: 2.18e9 features of 16 bits, 4.4 GB


def digits(rows, columns, seed):
    """Numbers in eighths from -6/8 to 6/8, from position alone: int64 rows [R, 1] and columns [1, C]."""
    mixed = (rows * 7919 + columns * 104729 + seed * 1299709) % 1000003
    return (mixed * mixed % 13 - 6) / 8


def features(sites, channels, seed):
    """The array [sites, channels] on the device, float16."""
    with jax.enable_x64(True):
        return jax.jit(
            lambda: digits(jnp.arange(sites)[:, None], jnp.arange(channels)[None], seed).astype(jnp.float16)
        )()


def neighbours(rows, tap, cube):
    """The row at each row's place plus a tap, -1 outside the cube."""
    place = np.stack(np.unravel_index(rows, cube), 1) + tap
    inside = ((place >= 0) & (place < cube)).all(1)
    return np.where(inside, np.ravel_multi_index(tuple(np.where(inside[:, None], place, 0).T), cube), -1)


def check_layer_is_exact(cube, channels):
    """A 3^3 layer on a full cube, forward and backward in float16: sampled rows and weights, bit for bit.

    Products are multiples of 1/64 below 1 and sums stay below 2^18: float32 holds them exactly, in every order. For the
    weights' gradients, sums over all sites, all but every 64th cotangent is 0.
    """
    sites = int(np.prod(cube))
    coords = jnp.asarray(np.concatenate([np.zeros((sites, 1)), np.indices(cube).reshape(3, -1).T], 1), jnp.int32)
    taps = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    columns = np.arange(channels)[None]
    w = digits(np.arange(27 * channels)[:, None], columns, 2).reshape(27, channels, channels)
    boundary = min(2**31 // channels, sites - 2)
    rng = np.random.default_rng(0)
    sample = np.unique([0, 1, boundary - 1, boundary, boundary + 1, sites - 1, *rng.integers(0, sites, 250)])

    def expected(seed, weights, sign):
        """Sampled rows of the product in float64; dgrad walks the taps backwards with transposed weights."""
        total = np.zeros((len(sample), channels))
        for tap, of_tap in zip(taps, weights, strict=True):
            rows = neighbours(sample, sign * tap, cube)
            total += np.where(rows[:, None] >= 0, digits(rows[:, None], columns, seed), 0) @ of_tap
        return np.float16(total)

    def sampled(array):
        return np.asarray(array[jnp.asarray(sample, jnp.int32)])

    def layer(x, w):
        return js.ops.conv(x, w, kernel_size=3).feats

    x = js.SparseTensor(coords, features(sites, channels, 0)).check()
    np.testing.assert_array_equal(sampled(x.feats), digits(sample[:, None], columns, 0))
    kernel = jnp.asarray(w, jnp.float16)
    y = jax.jit(layer)(x, kernel)
    np.testing.assert_array_equal(sampled(y), expected(0, w, 1))
    del y

    g = features(sites, channels, 1)
    dx = jax.jit(lambda x, w, g: jax.vjp(lambda x: layer(x, w), x)[1](g)[0].feats)(x, kernel, g)
    np.testing.assert_array_equal(sampled(dx), expected(1, w.swapaxes(1, 2), -1))
    del dx

    # Gradients of float32 weights are not rounded to float16.
    rows, last = np.arange(sites), channels - 1
    g = jnp.where(jnp.arange(sites)[:, None] % 64 == 0, g, 0)
    dw = jax.jit(lambda x, w, g: jax.vjp(lambda w: layer(x, w), w)[1](g)[0])(x, kernel.astype(jnp.float32), g)
    for k, i, j in [(13, 0, 0), (0, last, 3), (26, 5, last), (5, 4, 7)]:
        under = neighbours(rows, taps[k], cube)
        products = np.where((under >= 0) & (rows % 64 == 0), digits(under, i, 0) * digits(rows, j, 1), 0)
        assert float(dw[k, i, j]) == products.sum()


def test_a_layer_on_a_full_cube_is_exact():
    check_layer_is_exact((9, 8, 11), 16)


def has_memory(gigabytes):
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) >= gigabytes * 1e9


@pytest.mark.skipif(jax.default_backend() != "gpu" or not has_memory(36), reason="needs a GPU with more than 40 GB")
def test_a_layer_of_more_than_two_to_the_31_features_is_exact():
    assert np.prod(BIG[0]) * BIG[1] > 2**31
    check_layer_is_exact(*BIG)
