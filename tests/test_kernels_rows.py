"""The CUDA sums over rows, run on the host, and what every handler refuses."""

import numpy as np
import pytest
from kernel_oracles import BF16, F16, F32, F64, I32, ON_HOST, U8, call, small_integers, wide

from jaxsparse import _workspace

pytestmark = ON_HOST


@pytest.mark.parametrize(("positions", "values"), [(1, 1), (500, 60), (300, 1000), (4097, 8)])
def test_inverted_index_lists_the_positions_of_each_value(positions, values):
    rng = np.random.default_rng(positions)
    index = rng.integers(-2, values + 2, positions).astype(I32)
    results = [((positions,), I32), ((values + 1,), I32), ((_workspace.invert_index(positions),), U8)]
    order, offsets, _ = call("invert_index", results, index)
    lists = [np.flatnonzero(index == v) for v in range(values)]
    listed = np.concatenate(lists)
    np.testing.assert_array_equal(order, np.concatenate([listed, np.full(positions - len(listed), -1)]))
    np.testing.assert_array_equal(offsets, np.cumsum([0, *map(len, lists)]))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("channels", [1, 3, 64])
def test_segment_sum_adds_the_listed_rows(dtype, channels):
    """Groups of every length about those that a thread reads at once, a thread sums, and a warp reads at once."""
    rng = np.random.default_rng(channels)
    lengths = [0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 70, 255, 256, 257, 530, *rng.integers(0, 4, 32)]
    index = rng.permutation(np.concatenate([np.repeat(np.arange(50), lengths), np.full(30, -1)])).astype(I32)
    rows = len(index)
    results = [((rows,), I32), ((51,), I32), ((_workspace.invert_index(rows),), U8)]
    order, offsets, _ = call("invert_index", results, index)
    x = small_integers(rng, (rows, channels), dtype)
    x[index < 0] = np.nan
    with wide(dtype):
        (y,) = call("segment_sum", [((50, channels), dtype)], x, order, offsets)
    expected = np.stack([x[index == v].astype(F64).sum(0) for v in range(50)])
    np.testing.assert_array_equal(y.astype(F64), expected.astype(dtype).astype(F64))


def channel_sums(b, count, *rest):
    channels, sums = b.shape[1], F64 if b.dtype == F64 else F32
    results = [((channels,), sums)] * 2 + [((_workspace.channels(channels, np.dtype(sums).itemsize),), U8)]
    return call("channel_moments", results, b, np.array([count], I32), *rest)[:2]


# Several rows a share and none, one share alone, a tile of 32 channels in part, packs of one number.
SUMS = [(700, 650, 3), (9000, 8900, 24), (9, 5, 8), (40, 0, 16), (1, 1, 40), (3000, 2500, 96), (600, 550, 4256)]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize(("rows", "count", "channels"), SUMS)
def test_channel_sums_are_those_of_the_real_rows(dtype, rows, count, channels):
    rng = np.random.default_rng(rows)
    a, b = (small_integers(rng, (rows, channels), dtype) for _ in range(2))
    center = rng.integers(-3, 3, channels).astype(F64 if dtype == F64 else F32)
    a[count:] = b[count:] = np.nan
    real = slice(count)
    scale, shift = (rng.integers(-2, 3, channels).astype(center.dtype) for _ in range(2))
    is_open = (a.astype(F64) - center) * scale + shift > 0
    with wide(dtype):
        total, product = channel_sums(b, count, a, center)
        gated, gated_product = channel_sums(b, count, a, center, scale, shift)
        mean, squares = channel_sums(a + dtype(100), count)
    np.testing.assert_array_equal(total, b[real].astype(F64).sum(0))
    np.testing.assert_array_equal(product, ((a[real].astype(F64) - center) * b[real].astype(F64)).sum(0))
    let_in = np.where(is_open, b.astype(F64), 0)[real]
    np.testing.assert_array_equal(gated, let_in.sum(0))
    np.testing.assert_array_equal(gated_product, ((a[real].astype(F64) - center) * let_in).sum(0))
    shifted = (a + dtype(100))[real].astype(F64)
    expected = shifted.mean(0) if count else np.zeros(channels)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(squares, ((shifted - expected) ** 2).sum(0), rtol=2e-6, atol=1e-9)


def test_statistics_do_not_cancel_where_the_mean_is_large():
    rng = np.random.default_rng(0)
    means = np.array([0, 1e2, 1e4, -1e4, 1e5, 0, 0, 0])
    x = (rng.normal(size=(20000, 8)) + means).astype(F32)
    x[0, 5] = 1e4  # one row far from all others: the first of a share, and not
    x[777, 6] = 1e4
    x[:, 7] = 3e4
    mean, squares = channel_sums(x, 20000)
    wide_x = x.astype(F64)
    assert (np.abs(mean - wide_x.mean(0)) <= 1e-6 * (np.abs(wide_x.mean(0)) + wide_x.std(0))).all()
    np.testing.assert_allclose(squares, ((wide_x - wide_x.mean(0)) ** 2).sum(0), rtol=1e-4)
    assert squares[7] == 0


def test_statistics_hide_nothing_that_is_not_finite():
    x = np.ones((300, 8), F32)
    x[7, 0], x[7, 1], x[7, 2] = np.nan, np.inf, -np.inf
    x[:, 3] = 3e19  # squares overflow
    x[::2, 3] *= -1
    mean, squares = channel_sums(x, 300)
    assert not np.isfinite(mean[:3]).any()
    assert not np.isfinite(squares[:4]).any()
    np.testing.assert_array_equal((mean[4:], squares[4:]), ([1] * 4, [0] * 4))


@pytest.mark.parametrize("channels", [5, 64])
def test_channel_sums_have_equal_bits_at_every_capacity(channels):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(9000, channels)).astype(F16) for _ in range(2))
    center = rng.normal(size=channels).astype(F32)
    for of in (lambda n: channel_sums(b[:n], 5001, a[:n], center), lambda n: channel_sums(a[:n], 5001)):
        for small, large in zip(of(5001), of(9000), strict=True):
            np.testing.assert_array_equal(small, large)


def batch_norm(x, count, scale, shift, *residual, relu=False, epsilon=1e-3):
    channels, sums = x.shape[1], F64 if x.dtype == F64 else F32
    results = [(x.shape, x.dtype), *[((channels,), sums)] * 5]
    results.append(((_workspace.channels(channels, np.dtype(sums).itemsize),), U8))
    options = {"epsilon": epsilon, "relu": int(relu)}
    return call("batch_norm", results, x, np.array([count], I32), scale, shift, *residual, **options)[:6]


def batch_norm_grad(ct, x, mean, inverse, factor, shift, count, relu, vectors=None):
    channels, sums = x.shape[1], F64 if x.dtype == F64 else F32
    results = [(x.shape, x.dtype), *[((channels,), vectors or sums)] * 2]
    results.append(((_workspace.channels(channels, np.dtype(sums).itemsize),), U8))
    operands = ct, x, mean, inverse, factor, shift, np.array([count], I32)
    return call("batch_norm_grad", results, *operands, relu=int(relu))[:3]


def norm_operands(rows, count, channels, dtype, vectors=None):
    """Two arrays with NaN on padding rows; scale and bias in the dtype `vectors`; mean and 1 / deviation."""
    rng = np.random.default_rng(rows)
    with wide(dtype):
        arrays = [np.array(rng.normal(size=(rows, channels)) + 2, dtype) for _ in range(2)]
    for a in arrays:
        a[count:] = np.nan
    sums = F64 if dtype == F64 else F32
    scale, shift, *numbers = [rng.uniform(0.5, 1.5, channels).astype(sums) for _ in range(4)]
    return arrays, [scale.astype(vectors or sums), -shift.astype(vectors or sums), *numbers]


def relative_error(got, want, scale):
    return 0 if got.size == 0 else np.max(np.abs(got.astype(F64) - want) / scale)


# Half a unit in the last place of the result, and that of sums in float32 (float64) on numbers near 4.
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, F64: 2.0**-53}


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize(("rows", "count", "channels"), SUMS)
@pytest.mark.parametrize(("relu", "adds"), [(False, False), (True, False), (True, True)])
def test_batch_norm_is_that_of_the_real_rows(dtype, rows, count, channels, relu, adds):
    vectors = BF16 if adds else None
    (x, residual), (scale, shift, *_) = norm_operands(rows, count, channels, dtype, vectors)
    with wide(dtype):
        y, mean, variance, inverse, factor, again = batch_norm(x, count, scale, shift, *[residual] * adds, relu=relu)
    real = x[:count].astype(F64)
    exact = 1e-13 if dtype == F64 else 1e-5
    wanted = (real.mean(0), real.var(0)) if count else (np.zeros(channels),) * 2
    np.testing.assert_allclose(mean, wanted[0], rtol=exact)
    np.testing.assert_allclose(variance, wanted[1], rtol=exact, atol=exact)
    np.testing.assert_allclose(inverse, 1 / np.sqrt(variance.astype(F64) + 1e-3), rtol=exact)
    np.testing.assert_allclose(factor, inverse * scale.astype(F64), rtol=exact)
    np.testing.assert_array_equal(again, shift.astype(inverse.dtype))
    want = (real - wanted[0]) / np.sqrt(wanted[1] + 1e-3) * scale.astype(F64) + shift.astype(F64)
    size = 1 + np.abs(want)
    if adds:
        want, size = want + residual[:count].astype(F64), size + np.abs(residual[:count].astype(F64))
    want = np.maximum(want, 0) if relu else want
    assert relative_error(y[:count], want, np.abs(want) + exact / ROUNDING[dtype] * size) <= ROUNDING[dtype]
    assert (y[count:] == 0).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize(("rows", "count", "channels"), SUMS)
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_grad_is_that_of_the_formula(dtype, rows, count, channels, relu):
    vectors = F16 if relu else None
    (x, ct), (factor, shift, mean, inverse) = norm_operands(rows, count, channels, dtype)
    with wide(dtype):
        x_ct, scale_ct, shift_ct = batch_norm_grad(ct, x, mean, inverse, factor, shift, count, relu, vectors)
    z = (x[:count].astype(F64) - mean) * inverse
    let_in = ct[:count].astype(F64)
    if relu:
        let_in = np.where((x[:count].astype(F64) - mean) * factor + shift <= 0, 0, let_in)
    exact, n = 1e-12 if dtype == F64 else 1e-4, max(count, 1)
    of_shift, of_scale = let_in.sum(0), (z * let_in).sum(0)
    for got, sums in ((shift_ct, of_shift), (scale_ct, of_scale)):
        np.testing.assert_allclose(got.astype(F64), sums, rtol=exact + ROUNDING[vectors or F64], atol=exact * n)
    want = factor.astype(F64) * (let_in - of_shift / n - z * of_scale / n)
    size = 1 + np.abs(want) + np.abs(z)
    assert relative_error(x_ct[:count], want, np.abs(want) + exact / ROUNDING[dtype] * size) <= ROUNDING[dtype]
    assert (x_ct[count:] == 0).all()


@pytest.mark.parametrize("channels", [5, 64])
def test_batch_norm_has_equal_bits_at_every_capacity(channels):
    (x, ct), (scale, shift, mean, inverse) = norm_operands(9000, 5001, channels, F16)
    forward = [batch_norm(x[:n], 5001, scale, shift, relu=True) for n in (5001, 9000)]
    backward = [batch_norm_grad(ct[:n], x[:n], mean, inverse, scale, shift, 5001, True) for n in (5001, 9000)]
    for small, large in zip(*forward, strict=True):
        np.testing.assert_array_equal(small, large[: len(small)])
    for small, large in zip(*backward, strict=True):
        np.testing.assert_array_equal(small, large[: len(small)])


def test_batch_norm_of_more_rows_than_shared_memory_holds():
    rows, channels = 1700, 4256  # so many channels that a block has all rows of its own
    (x, ct), (scale, shift, mean, inverse) = norm_operands(rows, rows, channels, F16)
    y, found, variance, *_ = batch_norm(x, rows, scale, shift)
    added, *_ = batch_norm(x, rows, scale, shift, ct)
    x_ct, scale_ct, shift_ct = batch_norm_grad(ct, x, mean, inverse, scale, shift, rows, False)
    x, ct = x.astype(F64), ct.astype(F64)
    np.testing.assert_allclose(found, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-5)
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) * scale + shift
    np.testing.assert_allclose(y, want, rtol=2.0**-10, atol=1e-4)
    np.testing.assert_allclose(added, want + ct, rtol=2.0**-10, atol=1e-4)
    z = (x - mean) * inverse
    np.testing.assert_allclose(shift_ct, ct.sum(0), rtol=1e-4)
    np.testing.assert_allclose(scale_ct, (z * ct).sum(0), rtol=1e-4, atol=0.1)
    np.testing.assert_allclose(x_ct, scale * (ct - ct.mean(0) - z * (z * ct).mean(0)), rtol=2.0**-10, atol=1e-3)


def test_batch_norm_hides_nothing_that_is_not_finite():
    x = np.random.default_rng(0).normal(size=(300, 8)).astype(F32)
    x[7, 0], x[7, 1] = np.nan, np.inf
    y, mean, *_ = batch_norm(x, 300, np.ones(8, F32), np.zeros(8, F32), relu=True)
    assert np.isnan(y[:, :2]).any(0).all()
    assert not np.isfinite(mean[:2]).any()
    assert np.isfinite(y[:, 2:]).all()
