"""What keys, sites and maps must be, in plain Python integers and dictionaries, straight from the definitions."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from jaxsparse.geometry import Geometry

BITS = {1: 31, 2: 24, 3: 18, 4: 14}
LIMIT = {dims: 2 ** (bits - 1) for dims, bits in BITS.items()}
BATCHES = {1: 2**31, 2: 65_535, 3: 1_023, 4: 255}  # the last index is one less
PADDING = -(2**31)


def has_key(site):
    limit = LIMIT[len(site) - 1]
    return 0 <= site[0] < BATCHES[len(site) - 1] and all(-limit <= c < limit for c in site[1:])


def key(site):
    """Batch above the interleaved bits of the coordinates, the first axis the most significant of each group."""
    batch, *coords = (int(v) for v in site)
    dims = len(coords)
    code = 0
    for bit in range(BITS[dims]):
        for axis, coord in enumerate(coords):
            code |= ((coord + LIMIT[dims]) >> bit & 1) << (bit * dims + dims - 1 - axis)
    return batch << (dims * BITS[dims]) | code


def sites_of(coords, count):
    """The real rows that are sites, as tuples."""
    return [s for s in map(tuple, np.asarray(coords)[:count].tolist()) if has_key(s)]


def unique_sites(coords, count, capacity):
    """(rows kept, number found, row of each input)."""
    found = sorted(set(sites_of(coords, count)), key=key)
    row = {site: r for r, site in enumerate(found[:capacity])}
    rows = [tuple(c) for c in np.asarray(coords).tolist()]
    row_of = [row.get(site, -1) if p < count else -1 for p, site in enumerate(rows)]
    return padded(found[:capacity], capacity, np.shape(coords)[1]), len(found), np.array(row_of)


def grouped(row_of, capacity):
    """(inputs by row, where each row's begin), from the row of each input."""
    order = [p for row in range(capacity) for p in np.flatnonzero(row_of == row)]
    offsets = [int(np.sum((row_of >= 0) & (row_of < row))) for row in range(capacity + 1)]
    return np.array(order + [-1] * (len(row_of) - len(order)), np.int32), np.array(offsets, np.int32)


def coarse_sites(coords, count, g: Geometry, capacity, bounds=None):
    """(rows kept, number found, candidates without a key), trying every tap of every site."""
    found, outside = set(), 0
    for batch, *fine in sites_of(coords, count):
        for tap in itertools.product(*map(range, g.kernel)):
            scaled = [f + p - d * t for f, p, d, t in zip(fine, g.padding, g.dilation, tap, strict=True)]
            if any(v % s for v, s in zip(scaled, g.stride, strict=True)):
                continue
            coarse = [v // s for v, s in zip(scaled, g.stride, strict=True)]
            if bounds is not None and not all(0 <= c < b for c, b in zip(coarse, bounds, strict=True)):
                continue
            site = (batch, *coarse)
            if has_key(site):
                found.add(site)
            else:
                outside += 1
    rows = sorted(found, key=key)
    return padded(rows[:capacity], capacity, np.shape(coords)[1]), len(rows), outside


def kernel_table(in_coords, in_count, out_coords, out_count, g: Geometry):
    """The table [K, N_out] by looking every tap of every output up in a dictionary; the first of equal inputs wins."""
    row_of = {}
    for row, site in enumerate(map(tuple, np.asarray(in_coords)[:in_count].tolist())):
        if has_key(site):
            row_of.setdefault(site, row)
    table = np.full((g.volume, len(out_coords)), -1)
    for m, (batch, *coarse) in enumerate(np.asarray(out_coords)[:out_count].tolist()):
        for k, tap in enumerate(itertools.product(*map(range, g.kernel))):
            fine = [
                s * c - p + d * t for s, c, p, d, t in zip(g.stride, coarse, g.padding, g.dilation, tap, strict=True)
            ]
            table[k, m] = row_of.get((batch, *fine), -1)
    return table


def mask_words(table):
    """The bits of a table, uint32 [N, ceil(K / 32)], one Python integer a row."""
    words = -(-len(table) // 32)
    rows = [sum(1 << k for k in np.flatnonzero(column >= 0).tolist()) for column in np.asarray(table).T]
    return np.array([[row >> (32 * w) & 0xFFFFFFFF for w in range(words)] for row in rows], np.uint32)


def padded(rows, capacity, columns):
    """int32 [capacity, columns], padding sites after the rows."""
    out = np.full((capacity, columns), PADDING, np.int32)
    if rows:
        out[: len(rows)] = rows
    return out


@st.composite
def geometries(draw, dims=None, strides=(1, 2, 3)):
    """Kernels 1 to 5, strides, dilations 1 to 3 and paddings of either sign, an axis each."""
    dims = dims or draw(st.integers(1, 4))
    most = {1: 5, 2: 5, 3: 4, 4: 3}[dims]

    def axes(values):
        return draw(st.lists(values, min_size=dims, max_size=dims))

    padding = draw(st.one_of(st.none(), st.just(0))) if draw(st.booleans()) else axes(st.integers(-3, 4))
    kernel = axes(st.integers(1, most))
    return Geometry.create(dims, kernel, axes(st.sampled_from(strides)), padding, axes(st.integers(1, 3)))


@st.composite
def clouds(draw, dims, rows=40):
    """(coords [rows, 1 + D], count): small or extreme coordinates, duplicates, rows that are no site, any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["small", "small", "spread", "edges"]))
    span, limit = 12 if dims == 1 else 3, LIMIT[dims]
    coords = rng.integers(-span, span, (rows, dims))
    batch = rng.integers(0, 2, rows)
    if kind == "spread":
        coords = rng.integers(-limit, limit, (rows, dims))
    elif kind == "edges":
        coords = np.where(rng.random((rows, dims)) < 0.5, limit, -limit) + rng.integers(-2, 3, (rows, dims))
        batch = np.where(rng.random(rows) < 0.5, 0, BATCHES[dims] - 2) + rng.integers(-1, 3, rows)
        batch = np.minimum(batch, 2**31 - 1)
    coords = np.concatenate([batch[:, None], coords], 1).astype(np.int32)
    coords[rng.random(rows) < 0.1] = coords[0]
    count = draw(st.sampled_from([rows, rows, 0, 1, rows // 2]))
    return coords, count
