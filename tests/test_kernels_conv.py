"""The CUDA kernels of convolutions for every dtype and width, run on the host, against numpy."""

import itertools

import cuda_on_host
import numpy as np
import pytest
from kernel_oracles import BF16, F16, F32, F64, I32, U8, call, masks_of, random_table, real_rows, small_integers, wide

from jaxsparse.ops import _workspace

pytestmark = [
    pytest.mark.skipif(cuda_on_host.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("cuda_library"),
]


# dtype of features, of the result, precision
DTYPES = [(F16, F16), (F16, F32), (BF16, BF16), (BF16, F32), (F32, F32), (F64, F64)]
CHANNELS = [(1, 1), (3, 17), (4, 32), (17, 3), (64, 96), (96, 64), (40, 130)]


def forward(x, w, table, counts, out_dtype, tile_rows=64):
    """Where the masks have no tap, the table holds anything."""
    masks, table = masks_of(table), np.where(table >= 0, table, len(x) // 2)
    with wide(x.dtype):
        shape = (table.shape[1], w.shape[2])
        return call(
            "conv_forward", [(shape, out_dtype)], x, w, table, masks, np.array(counts, I32), tile_rows=tile_rows
        )[0]


def wgrad(x, g, table, counts, out_dtype):
    with wide(x.dtype):
        shape = (table.shape[0], x.shape[1], g.shape[1])
        size = _workspace.conv_wgrad(len(table), *shape[1:], table.shape[1], 8 if x.dtype == F64 else 4)
        return call(
            "conv_wgrad", [(shape, out_dtype), ((size,), U8)], x, g, table, masks_of(table), np.array(counts, I32),
            tile_rows=64,
        )[0]  # fmt: skip


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((3, 17), 27, [130]), ((64, 96), 8, [100, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 27, [200]), ((40, 130), 3, [77]),
])  # fmt: skip
def test_forward_sums_the_products_of_the_map(tile_rows, dtype, out_dtype, channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 210, 190
    x = small_integers(rng, (in_rows, channels[0]), dtype)
    w = small_integers(rng, (volume, *channels), dtype)
    table = random_table(rng, volume, in_rows, out_rows, 0.2)
    expected = np.zeros((out_rows, channels[1]))
    for m, k in itertools.product(real_rows(out_rows, counts), range(volume)):
        if table[k, m] >= 0:
            expected[m] += x[table[k, m]].astype(F64) @ w[k].astype(F64)
    y = forward(x, w, table, counts, out_dtype, tile_rows)
    assert y.dtype == out_dtype
    np.testing.assert_array_equal(y.astype(F64), expected.astype(out_dtype).astype(F64))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((1, 1), 1, [300]), ((3, 17), 27, [1210]), ((64, 96), 8, [500, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 3, [2100]),
])  # fmt: skip
def test_wgrad_sums_the_outer_products_of_the_map(dtype, out_dtype, channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 2100, 1900
    x = small_integers(rng, (in_rows, channels[0]), dtype)
    g = small_integers(rng, (out_rows, channels[1]), dtype)
    table = random_table(rng, volume, in_rows, out_rows, 0.2, centre=True)
    expected = np.zeros((volume, *channels))
    real = np.array(real_rows(out_rows, counts), int)
    for k in range(volume):
        m = real[table[k, real] >= 0]
        expected[k] = x[table[k, m]].astype(F64).T @ g[m].astype(F64)
    dw = wgrad(x, g, table, counts, out_dtype)
    assert dw.dtype == out_dtype
    np.testing.assert_array_equal(dw.astype(F64), expected.astype(out_dtype).astype(F64))


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_results_do_not_depend_on_capacity_or_tile_mates(dtype, out_dtype):
    rng = np.random.default_rng(1)
    count, volume, c_in, c_out = 700, 9, 20, 24
    x = rng.normal(size=(count, c_in)).astype(dtype)
    x[rng.random(x.shape) < 0.1] *= -0.0
    w = rng.normal(size=(volume, c_in, c_out)).astype(dtype)
    g = rng.normal(size=(count, c_out)).astype(dtype)
    table = random_table(rng, volume, count, count, 0.3)

    def at_capacity(rows):
        more = rows - count
        full = lambda v: np.concatenate([v, np.full((more, v.shape[1]), np.nan, dtype)])  # noqa: E731
        return full(x), full(g), np.concatenate([table, np.full((volume, more), -1, I32)], 1)

    xs, gs, tables = at_capacity(count)
    y = forward(xs, w, tables, [count], out_dtype)
    dw = wgrad(xs, gs, tables, [count], out_dtype)
    assert np.isfinite(y.astype(F64)).all()
    assert np.isfinite(dw.astype(F64)).all()
    for capacity, tile_rows in [(701, 32), (1500, 128)]:
        xs, gs, tables = at_capacity(capacity)
        y_more = forward(xs, w, tables, [count], out_dtype, tile_rows)
        assert y_more[:count].tobytes() == y.tobytes()
        assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)  # +0, not -0
        assert wgrad(xs, gs, tables, [count], out_dtype).tobytes() == dw.tobytes()

    shuffled = rng.permutation(count)
    assert forward(x, w, table[:, shuffled], [count], out_dtype).tobytes() == y[shuffled].tobytes()


def test_negative_underflow_leaves_no_negative_zero():
    """A row's only product rounds to -0 in float32; whether a tile mate's tap adds +0 to it must not show."""
    x = np.zeros((2, 16), F32)  # 16: one whole step, so that no zero past the last channel hides the sign
    x[:, -1] = 1e-30
    w = np.zeros((2, 16, 1), F32)
    w[:, -1] = -1e-30
    alone = forward(x, w, np.array([[0, -1], [-1, -1]], I32), [2], F32)
    with_mate = forward(x, w, np.array([[0, -1], [-1, 1]], I32), [2], F32)
    assert alone[0].tobytes() == with_mate[0].tobytes() == bytes(4)


def test_errors_name_the_call_and_the_shapes():
    x, w, table = np.zeros((8, 4), F32), np.zeros((3, 5, 2), F32), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match=r"conv_forward_v1: w must have size 4 on axis 1.*w float32 \[3, 5, 2\]"):
        forward(x, w, table, [8], F32)
