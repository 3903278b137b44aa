"""The CUDA kernels of float64 convolutions, run on the host, against numpy."""

import itertools

import numpy as np
import pytest
from kernel_oracles import F32, F64, I32, ON_HOST, U8, call, masks_of, random_table, real_rows, small_integers, wide

from jaxsparse import _workspace

pytestmark = ON_HOST


def forward(x, w, table, counts):
    """Where the masks have no tap, the table holds anything."""
    masks, table = masks_of(table), np.where(table >= 0, table, len(x) // 2)
    with wide(x.dtype):
        result = ((table.shape[1], w.shape[2]), x.dtype)
        return call("conv_forward", [result], x, w, table, masks, np.array(counts, I32), tile_rows=64)[0]


def wgrad(x, g, table, counts):
    with wide(x.dtype):
        shape = (table.shape[0], x.shape[1], g.shape[1])
        results = [(shape, x.dtype), ((_workspace.conv_wgrad(len(table), *shape[1:], table.shape[1]),), U8)]
        return call("conv_wgrad", results, x, g, table, masks_of(table), np.array(counts, I32), tile_rows=64)[0]


@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((3, 17), 27, [130]), ((64, 96), 8, [100, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 27, [200]), ((40, 130), 3, [77]),
])  # fmt: skip
def test_forward_sums_the_products_of_the_map(channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 210, 190
    x = small_integers(rng, (in_rows, channels[0]), F64)
    w = small_integers(rng, (volume, *channels), F64)
    table = random_table(rng, volume, in_rows, out_rows, 0.2)
    expected = np.zeros((out_rows, channels[1]))
    for m, k in itertools.product(real_rows(out_rows, counts), range(volume)):
        if table[k, m] >= 0:
            expected[m] += x[table[k, m]] @ w[k]
    np.testing.assert_array_equal(forward(x, w, table, counts), expected)


@pytest.mark.parametrize(("channels", "volume", "counts"), [
    ((1, 1), 1, [300]), ((3, 17), 27, [1210]), ((64, 96), 8, [500, 0, 70]), ((17, 3), 45, [0]), ((96, 64), 3, [2100]),
])  # fmt: skip
def test_wgrad_sums_the_outer_products_of_the_map(channels, volume, counts):
    rng = np.random.default_rng(volume)
    out_rows, in_rows = 2100, 1900
    x = small_integers(rng, (in_rows, channels[0]), F64)
    g = small_integers(rng, (out_rows, channels[1]), F64)
    table = random_table(rng, volume, in_rows, out_rows, 0.2, centre=True)
    expected = np.zeros((volume, *channels))
    real = np.array(real_rows(out_rows, counts), int)
    for k in range(volume):
        m = real[table[k, real] >= 0]
        expected[k] = x[table[k, m]].T @ g[m]
    np.testing.assert_array_equal(wgrad(x, g, table, counts), expected)


@pytest.mark.parametrize(("c_in", "c_out"), [(20, 24), (7, 5)])
def test_results_do_not_depend_on_capacity_or_tile_mates(c_in, c_out):
    rng = np.random.default_rng(1)
    count, volume = 700, 9
    x = rng.normal(size=(count, c_in))
    x[rng.random(x.shape) < 0.1] *= -0.0
    w = rng.normal(size=(volume, c_in, c_out))
    g = rng.normal(size=(count, c_out))
    table = random_table(rng, volume, count, count, 0.3)

    def at_capacity(rows):
        more = rows - count
        full = lambda v: np.concatenate([v, np.full((more, v.shape[1]), np.nan)])  # noqa: E731
        return full(x), full(g), np.concatenate([table, np.full((volume, more), -1, I32)], 1)

    xs, gs, tables = at_capacity(count)
    y = forward(xs, w, tables, [count])
    dw = wgrad(xs, gs, tables, [count])
    assert np.isfinite(y).all()
    assert np.isfinite(dw).all()
    for capacity in (701, 1500):
        xs, gs, tables = at_capacity(capacity)
        y_more = forward(xs, w, tables, [count])
        assert y_more[:count].tobytes() == y.tobytes()
        assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)  # +0, not -0
        assert wgrad(xs, gs, tables, [count]).tobytes() == dw.tobytes()

    shuffled = rng.permutation(count)
    assert forward(x, w, table[:, shuffled], [count]).tobytes() == y[shuffled].tobytes()


def test_negative_underflow_leaves_no_negative_zero():
    """A row's only product rounds to -0; whether a tile mate's tap adds +0 to it must not show."""
    x = np.zeros((2, 16))  # 16: whole steps, so that no zero past the last channel hides the sign
    x[:, -1] = 1e-200
    w = np.zeros((2, 16, 1))
    w[:, -1] = -1e-200
    alone = forward(x, w, np.array([[0, -1], [-1, -1]], I32), [2])
    with_mate = forward(x, w, np.array([[0, -1], [-1, 1]], I32), [2])
    assert alone[0].tobytes() == with_mate[0].tobytes() == bytes(8)


def test_errors_name_the_call_and_the_shapes():
    x, w, table = np.zeros((8, 4)), np.zeros((3, 5, 2)), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match=r"conv_forward_v1: w must have size 4 on axis 1.*w float64 \[3, 5, 2\]"):
        forward(x, w, table, [8])
    with pytest.raises(Exception, match="conv_forward_v1: on CUDA it computes in float64, got float32"):
        forward(x.astype(F32), np.zeros((3, 4, 2), F32), table, [8])
