"""Gradients of weights by scheduled CUDA products, and the pairs that they go over, run on the host, against numpy."""

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
    adversarial,
    as_operands,
    assert_within_rounding,
    call,
    random_table,
    real_rows,
    rows_under_taps,
    small_integers,
    symmetric_table,
    tile_attributes,
    truncated,
)

from jaxsparse import _workspace
from jaxsparse.ops.conv import FLOAT_WGRAD_TILES, WGRAD_TILES

pytestmark = ON_HOST


def list_pairs(table, counts, listed=None):
    """Pairs of the listed taps and the number of all, checked; pairs past a tap's number hold anything."""
    volume, rows = table.shape
    listed = listed or volume
    results = [((listed, rows, 2), I32), ((volume,), I32), ((_workspace.conv_pairs(listed, rows),), U8)]
    pairs, tap_pairs, _ = call("conv_pairs", results, *as_operands(table, counts))
    real = np.array(real_rows(rows, counts), int)
    for k in range(volume):
        m = real[table[k, real] >= 0]
        assert tap_pairs[k] == len(m)
        if k < listed:
            np.testing.assert_array_equal(pairs[k, : tap_pairs[k]], np.stack([table[k, m], m], 1))
    return pairs, tap_pairs


@pytest.mark.parametrize(
    ("volume", "rows", "counts"),
    [(27, 3000, [2900]), (45, 2000, [100, 0, 500, 1]), (8, 9000, [0]), (27, 25_000, [24_900]), (2, 140_000, [139_000])],
)
def test_pairs_are_those_of_real_rows_in_order(volume, rows, counts):
    rng = np.random.default_rng(volume)
    list_pairs(random_table(rng, volume, rows, rows, 0.1, centre=True), counts)
    if volume % 2 == 1:
        list_pairs(symmetric_table(rng, volume, rows, counts, 0.1), counts, (volume + 1) // 2)


@pytest.mark.parametrize(("volume", "listed"), [(27, 13), (8, 4), (8, 5)])
def test_pairs_of_other_taps_than_all_or_half_are_refused(volume, listed):
    table = np.full((volume, 64), -1, I32)
    with pytest.raises(Exception, match="conv_pairs_v1: pairs must have a list for each tap"):
        list_pairs(table, [64], listed)


def wgrad_gemm(x, g, table, counts, out_dtype, tile, slots, exact=0, listed=None):
    pairs, tap_pairs = list_pairs(table, counts, listed)
    volume = len(table)
    shape = (volume, x.shape[1], g.shape[1])
    attributes = tile_attributes(tile) | {"exact": exact, "slots": slots}
    results = [(shape, out_dtype), ((_workspace.wgrad_gemm(slots, *shape[1:]),), U8)]
    return call("wgrad_gemm", results, x, g, pairs, tap_pairs, **attributes)[0]


@pytest.mark.parametrize("tile", WGRAD_TILES, ids=str)
def test_every_wgrad_tile_sums_the_outer_products_of_the_map(tile):
    rng = np.random.default_rng(tile.cols)
    cases = [
        (400, 8, 8, 3, [400], 6),
        (700, tile.rows + 8, tile.cols, 2, [690], 5),
        (300, 4, tile.cols + 8, 9, [100, 0, 7], 18),
        (300, 4, min(tile.cols, 48), 3, [300], 7),
        (300, 12, min(tile.cols, 32), 3, [290], 7),
        (300, 28, 8, 2, [300], 5),
    ]
    for case, (out_rows, c_in, c_out, volume, counts, slots) in enumerate(cases):
        dtype, out_dtype = [(F16, F32), (BF16, BF16), (F16, F16)][case % 3]
        x, g = small_integers(rng, (800, c_in), dtype), small_integers(rng, (out_rows, c_out), dtype)
        real = np.array(real_rows(out_rows, counts), int)
        for symmetric in (False, True) if volume % 2 else (False,):
            if symmetric:
                table, listed = symmetric_table(rng, volume, out_rows, counts, 0.3), (volume + 1) // 2
            else:
                table, listed = random_table(rng, volume, 800, out_rows, 0.3, centre=True), volume
            expected = np.zeros((volume, c_in, c_out))
            for k in range(volume):
                m = real[table[k, real] >= 0]
                expected[k] = x[table[k, m]].astype(F64).T @ g[m].astype(F64)
            dw = wgrad_gemm(x, g, table, counts, out_dtype, tile, slots, listed=listed)
            np.testing.assert_array_equal(dw.astype(F64), expected.astype(out_dtype).astype(F64))


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("tile", FLOAT_WGRAD_TILES, ids=str)
def test_every_float_wgrad_tile_is_right_to_the_last_rounding(tile, exact, kind):
    rng = np.random.default_rng(tile.cols)
    for c_in, c_out, rows in [(tile.rows - 4, 8, 63), (tile.rows, tile.cols, 500), (tile.rows + 4, tile.cols + 8, 290)]:
        x, g = adversarial(rng, (300, c_in), kind), adversarial(rng, (rows, c_out), "normal")
        table = random_table(rng, 3, 300, rows, 0.5, centre=True)
        dw = wgrad_gemm(x, g, table, [rows], F32, tile, 6, exact)

        def product(x, g, table=table):
            return np.einsum("kmi,mo->kio", rows_under_taps(x, table), g.astype(F64))

        read = (x, g) if exact else (truncated(x), truncated(g))
        assert_within_rounding(dw, product(*read), product(*map(np.abs, read)), rows)


def test_a_wgrad_tile_that_was_not_built_is_refused():
    x, table = np.zeros((8, 8), F16), np.zeros((3, 8), I32)
    with pytest.raises(Exception, match=r"wgrad_gemm_v1: no kernel was built for .*, stages 4, splits 2 .* anew"):
        wgrad_gemm(x, x, table, [8], F16, (64, 16, 4, 2), 6)
