"""The 64-bit keys of sites: against Python integers, at every limit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_oracles as oracle
from hypothesis import given
from hypothesis import strategies as st

from jaxsparse import _keys

DIMS = [1, 2, 3, 4]


def keys_of(coords):
    """Keys from the library, as Python integers."""
    high, low = jax.jit(_keys.keys_of)(jnp.asarray(coords, jnp.int32))
    assert high.dtype == low.dtype == jnp.uint32
    return [(h << 32) | l for h, l in zip(high.tolist(), low.tolist(), strict=True)]


def random_sites(rng, dims, rows=64):
    limit = oracle.LIMIT[dims]
    near = rng.integers(-3, 3, (rows, dims))
    far = rng.integers(-limit, limit, (rows, dims))
    coords = np.where(rng.random((rows, 1)) < 0.5, near, far)
    return np.concatenate([rng.integers(0, oracle.BATCHES[dims], (rows, 1)), coords], 1)


@pytest.mark.parametrize("dims", DIMS)
@given(seed=st.integers(0, 2**32 - 1))
def test_keys_hold_batch_above_interleaved_coordinates(dims, seed):
    sites = random_sites(np.random.default_rng(seed), dims)
    assert keys_of(sites) == [oracle.key(s) for s in sites]


@pytest.mark.parametrize("dims", DIMS)
def test_keys_tell_all_sites_of_a_cube_apart(dims):
    axes = np.indices((2, *[3] * dims)).reshape(1 + dims, -1).T - [0, *[1] * dims]
    assert len(set(keys_of(axes))) == len(axes)


@pytest.mark.parametrize("dims", DIMS)
def test_one_axis_is_in_numeric_order(dims):
    limit = oracle.LIMIT[dims]
    values = np.unique(np.clip([-limit, -limit + 1, -1025, -2, -1, 0, 1, 2, 1023, limit - 1], -limit, limit - 1))
    for axis in range(dims):
        sites = np.zeros((len(values), 1 + dims), np.int64)
        sites[:, 1 + axis] = values
        keys = keys_of(sites)
        assert keys == sorted(keys)


def test_order_is_batch_then_morton_with_the_first_axis_most_significant():
    ordered = [(0, -1, -1), (0, -1, 0), (0, 0, -1), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (1, -9, -9)]
    keys = keys_of(ordered)
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("dims", DIMS)
def test_the_range_ends_exactly_where_documented(dims):
    limit, batches = oracle.LIMIT[dims], oracle.BATCHES[dims]
    assert (_keys.axis_limit(dims), _keys.batch_limit(dims)) == (limit, batches)
    inside = [[0, *[-limit] * dims], [0, *[limit - 1] * dims], [batches - 1, *[limit - 1] * dims]]
    outside = [[-1, *[0] * dims], [-(2**31), *[0] * dims]]
    if batches < 2**31:
        outside += [[batches, *[0] * dims], [2**31 - 1, *[0] * dims]]
    for axis in range(1, 1 + dims):
        for value in (-limit - 1, limit, -(2**31), 2**31 - 1):
            outside.append([0] * (1 + dims))
            outside[-1][axis] = value
    sites = np.array(inside + outside)
    keys = keys_of(sites)
    assert keys[: len(inside)] == [oracle.key(s) for s in inside]
    assert set(keys[len(inside) :]) == {2**64 - 1}
    np.testing.assert_array_equal(_keys.has_key(jnp.asarray(sites, jnp.int32)), [True] * 3 + [False] * len(outside))


@pytest.mark.parametrize("dims", DIMS)
def test_padding_has_no_key_and_no_site_has_the_key_of_padding(dims):
    padding = [[_keys.PADDING_COORD] * (1 + dims)]
    assert keys_of(padding) == [2**64 - 1]
    greatest = [oracle.BATCHES[dims] - 1, *[oracle.LIMIT[dims] - 1] * dims]
    assert keys_of([greatest])[0] < 2**64 - 1


@pytest.mark.parametrize(
    ("counts", "rows", "expected"),
    [
        ([3], 5, [1, 1, 1, 0, 0]),
        ([0], 3, [0, 0, 0]),
        ([4], 4, [1, 1, 1, 1]),
        ([9], 2, [1, 1]),
        ([-2], 2, [0, 0]),
        ([1, 0, 2], 6, [1, 0, 0, 0, 1, 1]),
    ],
)
def test_real_rows_are_the_first_of_each_segment(counts, rows, expected):
    real = _keys.real_rows(jnp.asarray(counts, jnp.int32), rows)
    np.testing.assert_array_equal(real, np.array(expected, bool))
