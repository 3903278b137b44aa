"""Coordinate primitives: distinct sites, coarse sites, kernel maps.

Each has custom calls for CPU and CUDA and a plain JAX reference that gives the same integers by another way: its kernel
maps come from sorted keys where the custom calls hash, so that neither can hide the other's mistakes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse import _ffi, _keys, _workspace
from jaxsparse._primitive import Op
from jaxsparse.geometry import MOST_TAPS, Geometry
from jaxsparse.tuning import choice, cost
from jaxsparse.tuning.choice import Question
from jaxsparse.tuning.key import Key, row_bucket


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _uint32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


# --- distinct sites ---

REASONS = 8  # `kReasons` in cuda/coords/key.h


def _distinct(high, low, coords, capacity):
    """Sorts by key and keeps the first of equal ones.

    Returns sites [capacity, 1 + D], how many of them are real [1], found [1], row of each input [P], and the inputs by
    row as in `unique_sites`.
    """
    rows = high.shape[0]
    high, low, position = lax.sort((high, low, jnp.arange(rows, dtype=jnp.int32)), num_keys=2, is_stable=True)
    valid = (high != _keys.NO_KEY) | (low != _keys.NO_KEY)
    is_new = valid & ((high != jnp.roll(high, 1)) | (low != jnp.roll(low, 1))).at[0].set(True)
    row = jnp.cumsum(is_new.astype(jnp.int32)) - 1
    found = is_new.sum(dtype=jnp.int32)
    target = jnp.where(is_new, row, capacity)
    sites = jnp.full((capacity, coords.shape[1]), _keys.PADDING_COORD, jnp.int32)
    sites = sites.at[target].set(coords[position], mode="drop", unique_indices=False)
    row = jnp.where(valid & (row < capacity), row, -1)
    row_of = jnp.full(rows, -1, jnp.int32).at[position].set(row)
    order = jnp.where(row >= 0, position, -1)
    points_in = jnp.zeros(capacity + 1, jnp.int32).at[row + 1].add((row >= 0).astype(jnp.int32), mode="drop")
    kept = jnp.minimum(found, capacity)
    return sites, kept[None], found[None], row_of, order, jnp.cumsum(points_in).astype(jnp.int32)


def _unique_sites_reference(coords, count, *, capacity):
    real = _keys.real_rows(count, coords.shape[0])
    coords = jnp.where(real[:, None], coords, _keys.PADDING_COORD)
    reasons = -1 - jnp.arange(REASONS, dtype=jnp.int32)
    without = (real & ~_keys.has_key(coords))[:, None] & (coords[:, :1] == reasons[None])
    return *_distinct(*_keys.keys_of(coords), coords, capacity), without.sum(0, dtype=jnp.int32)


def _unique_sites_call(platform, coords, count, *, capacity):
    rows, columns = coords.shape
    results = [
        _int32(capacity, columns),
        _int32(1),
        _int32(1),
        _int32(rows),
        _int32(rows),
        _int32(capacity + 1),
        _int32(REASONS),
        _workspace.struct(platform, _workspace.unique_sites(rows)),
    ]
    return _ffi.call("jaxsparse_unique_sites_v1", results, coords, count)[:7]


unique_sites = Op(
    "unique_sites",
    lambda coords, count, *, capacity, implementation: [
        ((capacity, coords.shape[1]), jnp.int32),
        ((1,), jnp.int32),
        ((1,), jnp.int32),
        ((coords.shape[0],), jnp.int32),
        ((coords.shape[0],), jnp.int32),
        ((capacity + 1,), jnp.int32),
        ((REASONS,), jnp.int32),
    ],
    _unique_sites_call,
    _unique_sites_reference,
)
"""`unique_sites(coords [P, 1 + D], count [1], capacity=M) -> sites [M, 1 + D], kept [1], found [1], row_of [P], ...`.

The distinct sites among the first `count` rows, sorted by (batch, Morton code); the first M are kept, `kept` counts
those and `found` all. `row_of` is the row of each input's site, -1 for rows past `count`, without a key, or not kept.
`order` `[P]` and `offsets` `[M + 1]` say the same by site: the inputs of row r are
`order[offsets[r] : offsets[r + 1]]`, increasing. A row without a key may say why in place of its batch: of the first
`count` rows, the last result, [REASONS], counts those with batch -1, -2 ...
"""


# --- coarse sites ---


def _index(rows):
    return jax.ShapeDtypeStruct((_workspace.site_index(rows),), jnp.uint8)


def _site_index(coords, count, *, of_blocks):
    """What `kernel_map` looks sites up in. Maps from the same sites share it: XLA merges equal calls."""
    (index,) = _ffi.call("jaxsparse_site_index_v1", [_index(coords.shape[0])], coords, count, of_blocks=int(of_blocks))
    return index


def _coarse_sites_reference(coords, count, *, geometry, capacity, bounds, is_sorted):
    real = _keys.real_rows(count, coords.shape[0]) & _keys.has_key(coords)
    fine = jnp.where(real[:, None], coords[:, 1:], 0)[None]  # (1, N, D)
    padding, dilation, stride = (np.int32([[v]]) for v in (geometry.padding, geometry.dilation, geometry.stride))
    if geometry.is_cells:  # one coarse site each, whatever the stride
        coarse, exists = fine // stride, real[None]
    else:
        scaled = fine - (dilation * np.int32(geometry.taps)[:, None] - padding)  # (K, N, D), steps of at most 2^30
        coarse = scaled // stride
        exists = real[None] & (scaled == coarse * stride).all(-1)
    if bounds is not None:
        exists &= ((coarse >= 0) & (coarse < np.int32([[bounds]]))).all(-1)
    batch = jnp.broadcast_to(coords[:, :1], (*coarse.shape[:2], 1))
    coarse, exists = jnp.concatenate([batch, coarse], -1).reshape(-1, coords.shape[1]), exists.reshape(-1)
    outside = (exists & ~_keys.has_key(coarse)).sum(dtype=jnp.int32)
    coarse = jnp.where(exists[:, None], coarse, _keys.PADDING_COORD)
    sites, kept, found, *_ = _distinct(*_keys.keys_of(coarse), coarse, capacity)
    return sites, kept, found, outside[None], jnp.zeros(_workspace.site_index(capacity), jnp.uint8)


def _coarse_cells(platform, coords, count, geometry, capacity, bounds):
    cells = coords[:, 1:] // np.int32([geometry.stride])
    exists = _keys.has_key(coords)
    if bounds is not None:
        exists &= ((cells >= 0) & (cells < np.int32([bounds]))).all(1)
    coarse = jnp.where(exists[:, None], jnp.concatenate([coords[:, :1], cells], 1), _keys.PADDING_COORD)
    sites, kept, found, *_ = _unique_sites_call(platform, coarse, count, capacity=capacity)
    return sites, kept, found, jnp.zeros(1, jnp.int32), _site_index(sites, kept, of_blocks=True)


def _coarse_sites_call(platform, coords, count, *, geometry, capacity, bounds, is_sorted):
    rows, columns = coords.shape
    if geometry.volume > MOST_TAPS:  # of cells: more than the custom call takes
        return _coarse_cells(platform, coords, count, geometry, capacity, bounds)
    size = _workspace.coarse_sites(rows, geometry)
    index = _index(capacity) if platform == "cuda" else jax.ShapeDtypeStruct((1,), jnp.uint8)
    results = [_int32(capacity, columns), *[_int32(1)] * 3, index, _workspace.struct(platform, size)]
    attributes = {**geometry.attributes(), "bounds": bounds or (), "is_sorted": int(is_sorted)}
    sites, kept, *found, index, _ = _ffi.call("jaxsparse_coarse_sites_v1", results, coords, count, **attributes)
    if platform != "cuda":  # in a call of its own, which XLA drops where nobody reads the index
        index = _site_index(sites, kept, of_blocks=True)
    return sites, kept, *found, index


coarse_sites = Op(
    "coarse_sites",
    lambda coords, count, *, geometry, capacity, bounds, is_sorted, implementation: [
        ((capacity, coords.shape[1]), jnp.int32),
        ((1,), jnp.int32),
        ((1,), jnp.int32),
        ((1,), jnp.int32),
        ((_workspace.site_index(capacity),), jnp.uint8),
    ],
    _coarse_sites_call,
    _coarse_sites_reference,
)
"""`coarse_sites(coords [N, 1 + D], count [1], geometry=, capacity=M, bounds=, is_sorted=) -> sites [M, 1 + D], ...`.

And `kept`, `found` and `outside`, each [1], and the index for `kernel_map`. The distinct coarse sites whose window
holds a real fine site, sorted by (batch, Morton code); the first M are kept, `kept` counts those and `found` all. With
`bounds`, only those in [0, bounds). `outside` counts (site, tap) pairs whose coarse site has no key. `is_sorted`
promises that real rows are distinct sites in that order already.
"""


# --- kernel map ---


def tap_masks(table: jax.Array) -> jax.Array:
    """The taps present in each column of a table `[K, N]`, 32 a word: uint32 `[N, ceil(K / 32)]`."""
    taps, rows = table.shape
    words = -(-taps // 32)
    present = jnp.pad(table >= 0, ((0, words * 32 - taps), (0, 0))).reshape(words, 32, rows)
    bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    return jnp.where(present, bits[None, :, None], 0).sum(1, dtype=jnp.uint32).T


def _find(sorted_keys, query):
    """Position of each query key in the sorted keys, and whether it is there: a binary search over two words."""
    high, low = sorted_keys
    size = high.shape[0]

    def step(_, bracket):
        begin, end = bracket
        middle = (begin + end) // 2
        h, l = high[middle], low[middle]
        below = (h < query[0]) | ((h == query[0]) & (l < query[1]))
        searching = begin < end
        return jnp.where(searching & below, middle + 1, begin), jnp.where(searching & ~below, middle, end)

    zeros = jnp.zeros_like(query[0], jnp.int32)
    begin, _ = lax.fori_loop(0, size.bit_length(), step, (zeros, zeros + size))
    at = jnp.minimum(begin, size - 1)
    is_key = (query[0] != _keys.NO_KEY) | (query[1] != _keys.NO_KEY)
    return at, is_key & (begin < size) & (high[at] == query[0]) & (low[at] == query[1])


BUILDERS = ("hash", "blocks")  # numbered for the custom calls


def builder_question(platform: str, sites: int, geometry: Geometry, grid: tuple[int, ...]) -> Question:
    """How to build the maps of so many sorted input sites on a grid: asked alike by all, since they share an index."""
    device, is_here = choice.device_of(platform)
    key = Key("builder", device, "", 0, 0, 0, "table", grid, row_bucket(sites))
    blocks = geometry.blocks_under_window
    return Question(
        key,
        platform,
        geometry.builders,
        lambda builder, _: cost.builder_us(builder, sites, geometry.volume, blocks),
        is_here,
    )


def _kernel_map_reference(in_coords, in_count, out_coords, out_count, *index, geometry, builder, grid=()):
    in_real = _keys.real_rows(in_count, in_coords.shape[0])
    out_real = _keys.real_rows(out_count, out_coords.shape[0])
    high, low = _keys.keys_of(jnp.where(in_real[:, None], in_coords, _keys.PADDING_COORD))
    position = jnp.arange(in_coords.shape[0], dtype=jnp.int32)
    high, low, position = lax.sort((high, low, position), num_keys=2, is_stable=True)

    # Coarse coordinates whose fine ones, stride * c + shift, have a key; the others' arithmetic could leave int32.
    # Steps and key range are at most 2^30, so these bounds do not.
    limit, stride = _keys.axis_limit(out_coords.shape[1] - 1), np.int64(geometry.stride)
    shift = np.int64(geometry.dilation) * np.int64(geometry.taps) - np.int64(geometry.padding)  # (K, D)
    least, most = -((limit + shift) // stride), (limit - 1 - shift) // stride
    stride, shift, least, most = (v.astype(np.int32) for v in (stride, shift, least, most))

    def rows_under(tap):
        shift, least, most = tap
        coarse = out_coords[:, 1:]
        fits = out_real & ((coarse >= least[None]) & (coarse <= most[None])).all(1)
        fine = jnp.where(fits[:, None], coarse, 0) * stride[None] + shift[None]
        site = jnp.where(fits[:, None], jnp.concatenate([out_coords[:, :1], fine], 1), _keys.PADDING_COORD)
        at, found = _find((high, low), _keys.keys_of(site))
        return jnp.where(found, position[at], -1)

    table = lax.map(rows_under, (shift, least, most))
    return table, tap_masks(table)


def _kernel_map_call(platform, in_coords, in_count, out_coords, out_count, *block_index, geometry, builder, grid=()):
    if builder == "auto":
        builder = choice.answer(builder_question(platform, in_coords.shape[0], geometry, grid)).choice
    of_blocks = builder == "blocks"
    index = block_index[0] if block_index and of_blocks else _site_index(in_coords, in_count, of_blocks=of_blocks)
    taps, out_rows = geometry.volume, out_coords.shape[0]
    results = [_int32(taps, out_rows), _uint32(out_rows, -(-taps // 32))]
    attributes = {**geometry.attributes(), "builder": BUILDERS.index(builder)}
    operands = in_coords, in_count, out_coords, out_count, index
    return _ffi.call("jaxsparse_kernel_map_v1", results, *operands, **attributes)


kernel_map = Op(
    "kernel_map",
    lambda in_coords, in_count, out_coords, out_count, *index, geometry, builder, grid=(), implementation: [
        ((geometry.volume, out_coords.shape[0]), jnp.int32),
        ((out_coords.shape[0], -(-geometry.volume // 32)), jnp.uint32),
    ],
    _kernel_map_call,
    _kernel_map_reference,
)
"""`kernel_map(in_coords, in_count [1], out_coords, out_count [1], [index,] geometry=, builder=) -> table, masks`.

`table[k, m]`, int32 `[K, N_out]`, is the input row at `stride * out[m] - padding + dilation * tap_k`, or -1; masks,
uint32 `[N_out, W]`, say where one is. Of equal input sites the first row is taken. Columns from `out_count` on hold
anything. The index is that of `coarse_sites` where that made the input sites; else the op makes its own. The builder,
one of `BUILDERS`, changes nothing but the time it takes, and "auto" is chosen among those of the geometry, by `grid`,
the stride of the input sites, too; "blocks" wants the real input rows to be distinct sites sorted by (batch, Morton
code), and a geometry that `Geometry.builders` lists it for.
"""
