"""The scheduled CUDA products and what they need, run on the host, against numpy."""

import itertools

import cuda_on_host
import numpy as np
import pytest
from kernel_oracles import (
    BF16,
    F16,
    F32,
    F64,
    HARD,
    I32,
    ON_HOST,
    U8,
    U32,
    adversarial,
    as_operands,
    assert_within_rounding,
    call,
    random_table,
    real_rows,
    rows_under_taps,
    small_integers,
    tile_attributes,
    truncated,
)

from jaxsparse import _workspace
from jaxsparse.geometry import Geometry
from jaxsparse.ops.conv import FLOAT_TILES, FORWARD_TILES, NARROW_TILES

pytestmark = ON_HOST


def schedule(table, counts, groups=()):
    """Order, tile masks and tile table of a schedule by groups of taps."""
    volume, rows = table.shape
    words, tiles = -(-volume // 32), -(-rows // 64)
    attribute = [sum(1 << k % 32 for k in g if k // 32 == word) for g in groups for word in range(words)]
    results = [
        ((rows,), I32),
        ((tiles, words), U32),
        ((tiles, volume, 64), I32),
        ((_workspace.conv_schedule(rows),), U8),
    ]
    return call("conv_schedule", results, *as_operands(table, counts), groups=np.array(attribute, np.int64))[:3]


def sorted_order(table, counts, groups):
    """Real rows by which groups they have any tap of, as places in the Gray sequence, counted down; then the others."""
    rows = table.shape[1]
    real = np.array(real_rows(rows, counts), int)
    bits = np.zeros(len(real), int)
    for group in groups:
        bits = bits << 1 | (table[np.ix_(group, real)] >= 0).any(0)
    for shift in (1, 2, 4, 8):
        bits ^= bits >> shift
    return np.concatenate([real[np.argsort(-bits, kind="stable")], np.setdiff1d(np.arange(rows), real)])


@pytest.mark.parametrize(
    ("volume", "rows", "counts"),
    [
        (27, 320, [300]),
        (8, 320, [0]),
        (45, 320, [100, 0, 60, 1]),
        (9, 3, [1, 0, 1]),
        (3, 320, [320]),
        (27, 5000, [4900]),
        (9, 9001, [9001]),
        (45, 3000, [400, 0, 1500]),
        (45, 18_000, [4000, 0, 5000]),
        (27, 25_000, [24_900]),
        (2, 140_000, [139_000]),
    ],
)
@pytest.mark.parametrize("sort", [False, True])
def test_schedule_has_rows_in_order_and_the_map_in_tiles(volume, rows, counts, sort):
    rng = np.random.default_rng(volume)
    table = random_table(rng, volume, rows + 80, rows, 0.1, centre=True)
    groups = Geometry.create(1, volume, 1).tap_groups if sort else ()
    order, tile_masks, tile_table = schedule(table, counts, groups)
    np.testing.assert_array_equal(order, sorted_order(table, counts, groups) if sort else np.arange(rows))
    in_tiles = np.full((volume, 64 * len(tile_masks)), -1, I32)
    in_tiles[:, :rows] = np.where(np.isin(order, real_rows(rows, counts)), table[:, order], -1)
    in_tiles = in_tiles.reshape(volume, -1, 4, 16).swapaxes(0, 1).swapaxes(2, 3)  # rows 16 apart follow each other
    in_tiles = in_tiles.reshape(-1, volume, 64)
    there = (in_tiles >= 0).any(2)
    k = np.arange(volume)
    np.testing.assert_array_equal(tile_masks[:, k // 32] >> k % 32 & 1, there)
    np.testing.assert_array_equal(tile_table[there], in_tiles[there])


def conv_gemm(x, w, table, counts, out_dtype, tile, groups=(), exact=0):
    shape = (table.shape[1], w.shape[2])
    attributes = tile_attributes(tile) | {"exact": exact}
    w = w.swapaxes(1, 2) if w.dtype == F32 else w
    return call("conv_gemm", [(shape, out_dtype)], x, w, *schedule(table, counts, groups), **attributes)[0]


@pytest.mark.parametrize("tile", FORWARD_TILES + NARROW_TILES, ids=str)
def test_every_forward_tile_sums_the_products_of_the_map(tile):
    """Rows at a tile's size and one more or less; channels with whole and broken steps and tiles."""
    rng = np.random.default_rng(tile.cols)
    narrow = tile in NARROW_TILES and tile not in FORWARD_TILES
    cases = [
        (63, 8, 8, 3, [63]),
        (tile.rows + 1, 40, tile.cols + 8, 8, [tile.rows]),
        (130, 72, tile.cols, 45, [20, 65]),
    ]
    if tile in NARROW_TILES:
        cases = [(130, 4, tile.cols, 27, [129]), (65, 12, 8, 8, [65])] + ([] if narrow else cases)
    for case, (out_rows, c_in, c_out, volume, counts) in enumerate(cases):
        dtype, out_dtype = [(F16, F16), (BF16, BF16), (F16, F32), (BF16, F32), (F16, F16)][case]
        x, w = small_integers(rng, (150, c_in), dtype), small_integers(rng, (volume, c_in, c_out), dtype)
        table = random_table(rng, volume, 150, out_rows, 0.2)
        expected = np.zeros((out_rows, c_out))
        for m, k in itertools.product(real_rows(out_rows, counts), range(volume)):
            if table[k, m] >= 0:
                expected[m] += x[table[k, m]].astype(F64) @ w[k].astype(F64)
        y = conv_gemm(x, w, table, counts, out_dtype, tile, Geometry.create(1, volume, 1).tap_groups)
        np.testing.assert_array_equal(y.astype(F64), expected.astype(out_dtype).astype(F64))


NUMBERS = ("mean", "variance", "scale", "bias")
ACTIVATIONS = [
    lambda z: z,
    lambda z: np.maximum(z, 0),
    lambda z: np.where(z < 0, 0.01 * z, z),
    lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    lambda z: z / (1 + np.exp(-z)),
]


def ended(tile, numbers, activation, epsilon, **arrays):
    """Attributes and operands of what follows, `residual` and `second` among the arrays, None where there is none."""
    names, operands = (*NUMBERS, "residual", "second"), numbers | arrays
    names_given = [name for name in names if operands.get(name) is not None]
    attributes = {"given": sum(1 << names.index(name) for name in names_given)}
    attributes |= {"activation": activation, "epsilon": epsilon}
    attributes |= tile_attributes(tile)
    return attributes, [operands[name] for name in names_given]


def conv_fused(x, w, table, counts, tile, groups, numbers, residual, activation, epsilon, second=None):
    attributes, operands = ended(tile, numbers, activation, epsilon, residual=residual, second=second)
    result = ((table.shape[1], w.shape[2]), x.dtype)
    return call(
        "conv_fused", [result], x, w, *schedule(table, counts, groups), np.array(counts, I32), *operands, **attributes
    )[0]


def linear_fused(x, w, counts, tile, numbers, residual, activation, epsilon, second=None):
    attributes, operands = ended(tile, numbers, activation, epsilon, residual=residual, second=second)
    result = ((len(x), w.shape[1]), x.dtype)
    return call("linear_fused", [result], x, w, np.array(counts, I32), *operands, **attributes)[0]


def channel_numbers(rng, channels, names):
    """Of every dtype that is taken."""
    dtypes = {"mean": F32, "variance": F16, "scale": BF16, "bias": F32}
    return {
        name: rng.uniform(0.5, 1.5, channels).astype(dtypes[name]) * dtypes[name](-1 if name == "bias" else 1)
        for name in names
    }


def assert_fused(x, w, table, counts, tile, groups, numbers, residual, activation):
    """Within 1 ulp of the result, and the roundings of the sums as they come through scale and activation."""
    epsilon = 0.25
    y = conv_fused(x, w, table, counts, tile, groups, numbers, residual, activation, epsilon)
    wide = {name: value.astype(F64) for name, value in numbers.items()}
    factor = wide.get("scale", 1) / np.sqrt(wide["variance"] + epsilon if "variance" in wide else 1)

    def product(x, w):
        return np.einsum("kmi,kio->mo", rows_under_taps(x, table), w.astype(F64))

    z = (product(x, w) - wide.get("mean", 0)) * factor + wide.get("bias", 0)
    spread = product(np.abs(x), np.abs(w)) + np.abs(wide.get("mean", 0)) + 1
    if residual is not None:
        z = z + residual.astype(F64)
    true = ACTIVATIONS[activation](z)
    mantissa = 10 if x.dtype == F16 else 7
    ulp = np.ldexp(1.0, np.maximum(np.frexp(np.abs(true))[1] - 1, -14 if x.dtype == F16 else -126) - mantissa)
    products = (table >= 0).sum(0)[:, None] * x.shape[1]
    bound = ulp + (products / 2 + 4) * 2.0**-23 * np.abs(factor) * spread + 2.0**-20 * (np.abs(z) + 1)
    real = np.zeros(len(z), bool)
    real[real_rows(len(z), counts)] = True
    assert (np.abs(y.astype(F64) - true) <= bound)[real].all()


@pytest.mark.parametrize("tile", FORWARD_TILES + NARROW_TILES, ids=str)
def test_every_forward_tile_with_an_epilogue(tile):
    """Few steps and many, rows of no tap, two words of taps, none in the second, NaN padding, segments of one row."""
    rng = np.random.default_rng(tile.cols)
    cases = [
        (63, 8, 8, 3, [60], NUMBERS, True),
        (tile.rows + 1, 40, tile.cols + 8, 8, [tile.rows], ("mean", "scale"), False),
        (130, 72, tile.cols, 45, [20, 65], ("variance", "bias"), True),
        (200, 136, tile.cols, 27, [150], (), True),
        (3, 8, 8, 3, [1, 0, 1], ("bias",), True),
    ]
    if tile in NARROW_TILES:
        cases = [(130, 4, tile.cols, 27, [129], NUMBERS, True)] + (cases if tile in FORWARD_TILES else [])
    for case, (rows, c_in, c_out, volume, counts, names, has_residual) in enumerate(cases):
        dtype = BF16 if case % 2 else F16
        x = rng.normal(size=(150, c_in)).astype(dtype)
        w = (rng.normal(size=(volume, c_in, c_out)) / np.sqrt(c_in)).astype(dtype)
        table = random_table(rng, volume, 150, rows, 0.2)
        table[32:] = -1
        table[:, 7:9] = -1
        residual = rng.normal(size=(rows, c_out)).astype(dtype) if has_residual else None
        if has_residual:
            residual[np.setdiff1d(np.arange(rows), real_rows(rows, counts))] = np.nan
        numbers, groups = channel_numbers(rng, c_out, names), Geometry.create(1, volume, 1).tap_groups
        activation = (tile.rows // 64 + tile.stages + case) % 5
        assert_fused(x, w, table, counts, tile, groups, numbers, residual, activation)


SPLIT_TILES = [tile for tile in FORWARD_TILES if tile.splits > 1]


@pytest.mark.parametrize("tile", SPLIT_TILES, ids=str)
@pytest.mark.parametrize("c_in", [8, 40, 104])
def test_splits_have_unlike_shares_of_channels_or_none(tile, c_in):
    """A tile of no tap, one of one tap, and the rest; twice as many columns as a tile."""
    rng = np.random.default_rng(c_in)
    rows, c_out = 2 * tile.rows + 3, tile.cols + 8
    x, w = small_integers(rng, (90, c_in), F16), small_integers(rng, (3, c_in, c_out), F16)
    table = random_table(rng, 3, 90, rows, 0.5)
    table[:, : tile.rows] = -1
    table[1:, : 2 * tile.rows] = -1
    expected = np.einsum("kmi,kio->mo", rows_under_taps(x, table), w.astype(F64))
    np.testing.assert_array_equal(conv_gemm(x, w, table, [rows], F32, tile), expected)
    residual, numbers = rng.normal(size=(rows, c_out)).astype(F16), channel_numbers(rng, c_out, NUMBERS)
    assert_fused(x, w, table, [rows - 1], tile, (), numbers, residual, 1)


@pytest.mark.parametrize("activation", range(5))
def test_epilogue_of_hard_values(activation):
    """Sums that overflow float16 before the scale or behind it, NaN, and what activations do to them."""
    x, w = np.full((1, 8), 6e4, F16), np.zeros((1, 8, 16), F16)
    w[0, :, :8] = 2  # 960,000
    scale = np.resize(np.array([1e-3, -1e-3, 1, -1, np.nan, 0, 1e-30, -1e-30], F32), 16)
    table, bias = np.zeros((1, 1), I32), np.linspace(-20, 20, 16).astype(F32)
    numbers = {"scale": scale, "bias": bias}
    y = conv_fused(x, w, table, [1], FORWARD_TILES[0], (), numbers, None, activation, 0.0)[0].astype(F64)
    with np.errstate(all="ignore"):
        z = np.where(np.arange(16) < 8, F32(960_000), F32(0)) * scale.astype(F32) + bias
        expected = ACTIVATIONS[activation](z.astype(F64)).astype(F16).astype(F64)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("padding", [90, 40_000])
def test_rows_with_an_epilogue_do_not_depend_on_tile_mates_or_capacity(padding):
    rng = np.random.default_rng(1)
    count, volume = 150, 9
    x, w = rng.normal(size=(count, 24)).astype(F16), rng.normal(size=(volume, 24, 16)).astype(F16)
    table, numbers = random_table(rng, volume, count, count, 0.3), channel_numbers(rng, 16, NUMBERS)
    residual, groups = rng.normal(size=(count, 16)).astype(F16), Geometry.create(1, volume, 1).tap_groups
    y = conv_fused(x, w, table, [count], (128, 16, 4), (), numbers, residual, 1, 1e-5)
    more = np.concatenate([table, np.full((volume, padding), -1, I32)], 1)
    padded = np.concatenate([residual, np.full((padding, 16), np.nan, F16)])
    for tile in ((128, 32, 3), (64, 16, 4)):
        y_more = conv_fused(x, w, more, [count], tile, groups, numbers, padded, 1, 1e-5)
        assert y_more[:count].tobytes() == y.tobytes()


def halves(x, first):
    """The first columns and the others, as arrays of their own."""
    return np.ascontiguousarray(x[:, :first]), np.ascontiguousarray(x[:, first:])


@pytest.mark.parametrize("tile", FORWARD_TILES, ids=str)
def test_a_second_input_gives_the_bits_of_the_concatenation(tile):
    """Parts that end within a step and with it, either the wider one, and rows that lie far apart in both."""
    rng = np.random.default_rng(tile.cols)
    for case, (rows, first, other, volume) in enumerate([(150, 96, 32, 27), (70, 8, 16, 9), (130, 64, 136, 3)]):
        dtype = BF16 if case % 2 else F16
        x = rng.normal(size=(180, first + other)).astype(dtype)
        w = rng.normal(size=(volume, first + other, tile.cols)).astype(dtype)
        table, groups = random_table(rng, volume, 180, rows, 0.2), Geometry.create(1, volume, 1).tap_groups
        numbers, residual = channel_numbers(rng, tile.cols, NUMBERS), rng.normal(size=(rows, tile.cols)).astype(dtype)
        options = ([rows - 3], tile, groups, numbers, residual, case, 0.25)
        one, other = halves(x, first)
        whole = conv_fused(x, w, table, *options)
        assert conv_fused(one, w, table, *options, second=other).tobytes() == whole.tobytes()
        assert len(np.unique(whole)) > 9


@pytest.mark.parametrize("tile", FORWARD_TILES + NARROW_TILES, ids=str)
def test_every_forward_tile_without_a_map(tile):
    """Each row times the weights: the bits of a map of one tap, under which it lies by itself. Padding holds NaN."""
    rng = np.random.default_rng(tile.cols)
    cases = [(63, 8, 8, [60]), (2 * tile.rows + 1, 40, tile.cols + 8, [tile.rows]), (300, 136, tile.cols, [20, 0, 100])]
    if tile in NARROW_TILES:
        cases = [(130, 4, tile.cols, [129])] + (cases if tile in FORWARD_TILES else [])
    for case, (rows, c_in, c_out, counts) in enumerate(cases):
        dtype = BF16 if case % 2 else F16
        x, w = rng.normal(size=(rows, c_in)).astype(dtype), rng.normal(size=(1, c_in, c_out)).astype(dtype)
        numbers, residual = channel_numbers(rng, c_out, NUMBERS), rng.normal(size=(rows, c_out)).astype(dtype)
        x[np.setdiff1d(np.arange(rows), real_rows(rows, counts))] = np.nan
        table, options = np.arange(rows, dtype=I32)[None], (tile, numbers, residual, case, 0.25)
        y = linear_fused(x, w[0], counts, *options)
        mapped = conv_fused(x, w, table, counts, options[0], (), *options[1:])
        assert y.tobytes() == mapped.tobytes()
        assert np.isfinite(y.astype(F32)).all()
        if c_in > 8 and c_in % 8 == 0:
            one, other = halves(x, 8)
            assert linear_fused(one, w[0], counts, *options, second=other).tobytes() == y.tobytes()


def test_a_second_input_that_does_not_fit_is_refused():
    w, counts, tile = np.zeros((24, 8), F16), [8], FORWARD_TILES[0]
    for first, second, message in [
        (16, np.zeros((8, 16), F16), r"linear_fused_v1: w must have as many input channels.*second float16 \[8, 16\]"),
        (12, np.zeros((8, 12), F16), "must be multiples of 8"),
        (16, np.zeros((9, 8), F16), "second must have size 8 on axis 0"),
        (16, np.zeros((8, 8), F32), "second must be float16"),
        (16, None, "w must have as many input channels"),
    ]:
        with pytest.raises(Exception, match=message):
            linear_fused(np.zeros((8, first), F16), w, counts, tile, {}, None, 0, 0.0, second)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("tile", FLOAT_TILES, ids=str)
def test_every_float_tile_is_right_to_the_last_rounding(tile, exact, kind):
    """Against float64 on the operands as they are read, which in TF32 are 2^-10 smaller at most."""
    rng = np.random.default_rng(tile.cols)
    in_rows, groups = 100, Geometry.create(1, 5, 1).tap_groups
    for rows, c_in, c_out in [(tile.rows - 1, 4, 8), (tile.rows, 32, tile.cols), (tile.rows + 1, 44, tile.cols + 8)]:
        x, w = adversarial(rng, (in_rows, c_in), kind), adversarial(rng, (5, c_in, c_out), "normal")
        table = random_table(rng, 5, in_rows, rows, 0.4)
        y = conv_gemm(x, w, table, [rows], F32, tile, groups, exact)

        def product(x, w, table=table):
            return np.einsum("kmi,kio->mo", rows_under_taps(x, table), w.astype(F64))

        read = (x, w) if exact else (truncated(x), truncated(w))
        assert_within_rounding(y, product(*read), product(*map(np.abs, read)), 5 * c_in)
        magnitude = product(np.abs(x), np.abs(w))
        assert (np.abs(product(*read) - product(x, w)) <= (0 if exact else 2 * 2.0**-10) * magnitude).all()


@pytest.mark.parametrize(
    ("dtype", "tiles", "exact"),
    [
        (F16, [(128, 16, 4), (128, 32, 3), (64, 16, 4)], 0),
        (F16, [(128, 128, 3, 2)] * 3, 0),
        (F32, [(64, 16, 4), (64, 32, 4), (128, 64, 3)], 0),
        (F32, [(64, 16, 4), (64, 48, 4), (128, 64, 3)], 1),
    ],
)
def test_scheduled_rows_do_not_depend_on_tile_mates_or_capacity(dtype, tiles, exact):
    rng = np.random.default_rng(1)
    count, volume = 150, 9
    c_in = 32 if dtype == F16 else 24  # whole instructions: see implicit_gemm.cuh
    x, w = rng.normal(size=(count, c_in)).astype(dtype), rng.normal(size=(volume, c_in, 16)).astype(dtype)
    table = random_table(rng, volume, count, count, 0.3)
    y = conv_gemm(x, w, table, [count], dtype, tiles[0], exact=exact)
    groups = Geometry.create(1, volume, 1).tap_groups
    assert conv_gemm(x, w, table, [count], dtype, tiles[1], groups, exact).tobytes() == y.tobytes()
    more = np.concatenate([table, np.full((volume, 90), -1, I32)], 1)
    padded = np.concatenate([x, np.full((90, c_in), np.nan, dtype)])
    y_more = conv_gemm(padded, w, more, [count], dtype, tiles[2], groups, exact)
    assert y_more[:count].tobytes() == y.tobytes()
    assert y_more[count:].tobytes() == bytes(y_more[count:].nbytes)


def test_a_tile_that_was_not_built_is_refused():
    x, w, table = np.zeros((8, 8), F16), np.zeros((3, 8, 8), F16), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match="conv_gemm_v1: no kernel was built for tile_rows 96, tile_cols 8, stages 2, "):
        conv_gemm(x, w, table, [8], F16, (96, 8, 2))


def test_a_tile_of_several_splits_is_refused_where_there_are_no_clusters():
    x, w, table = np.zeros((8, 8), F16), np.zeros((3, 8, 8), F16), np.zeros((3, 8), I32)
    refused = pytest.raises(Exception, match="conv_gemm_v1: a tile of 2 splits needs a GPU of sm_90")
    with cuda_on_host.no_clusters(), refused:
        conv_gemm(x, w, table, [8], F16, (128, 128, 3, 2))


def test_errors_name_the_call_and_the_shapes():
    x, w, table = np.zeros((8, 8), F16), np.zeros((3, 8, 8), F16), np.zeros((3, 8), I32)
    scale = {"scale": np.zeros(9, F16)}
    with pytest.raises(Exception, match=r"conv_fused_v1: scale must have size 8 on axis 0.*scale float16 \[9\]"):
        conv_fused(x, w, table, [8], FORWARD_TILES[0], (), scale, None, 0, 0.0)


def test_negative_underflow_leaves_no_negative_zero():
    """A row's only product rounds to -0 in float32."""
    x, w = np.zeros((2, 32), F32), np.zeros((2, 32, 8), F32)
    x[:, -1], w[:, -1] = 1e-30, -1e-30
    y = conv_gemm(x, w, np.array([[0, -1], [-1, -1]], I32), [2], F32, (64, 16, 4), exact=1)
    assert y[0].tobytes() == bytes(32)
