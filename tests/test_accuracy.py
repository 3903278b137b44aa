"""Every element of the three products against float64, on values chosen to hurt.

The bound: |found - true| <= 1 ulp of the result + n / 2 * 2^-23 * sum |a| |b| over its n products: n roundings in
float32, in any order, each of at most half an ulp of the largest partial sum, and the last one to the result's dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import random_coords

import jaxsparse as js

SITES = 400


@functools.cache
def scene():
    """Sites, and for each tap the rows under it, by brute force."""
    coords = random_coords(np.random.default_rng(0), SITES, low=0, high=7, batches=1)
    rows = {tuple(c): i for i, c in enumerate(coords.tolist())}
    taps = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    table = np.array([[rows.get((b, x + i, y + j, z + k), -1) for b, x, y, z in coords.tolist()] for i, j, k in taps])
    return js.SparseTensor(coords, jnp.zeros((len(coords), 1))).sites, table


def cancelling(rng, shape):
    """Rows whose second half takes back the large numbers of the first, all but a little."""
    large, half = rng.choice([-8.0, 8.0], shape), shape[-1] // 2
    large[..., half : 2 * half] = -large[..., :half]
    return large + rng.normal(size=shape) / 16


def halves_alike(w):
    """The kernel with its second half of both kinds of channels equal to the first."""
    w, (a, b) = w.copy(), (n // 2 for n in w.shape[1:])
    w[:, a : 2 * a] = w[:, :a]
    w[:, :, b : 2 * b] = w[:, :, :b]
    return w


VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "positive": lambda rng, shape: rng.uniform(0.5, 1, shape),  # partial sums only grow
    "cancelling": cancelling,
    "large": lambda rng, shape: rng.choice([-1.0, 1.0], shape) * rng.uniform(5e3, 2e4, shape),
    "denormal": lambda rng, shape: rng.integers(-1023, 1024, shape) * 2.0**-24,  # in float16
}


def exactly(values, dtype):
    """The values rounded to the dtype; those of float32 to TF32 too, which holds them as they are."""
    values = jnp.asarray(values, dtype)
    return jax.lax.reduce_precision(values, 8, 10) if dtype == jnp.float32 else values


def products(a, b, table, pairs_of):
    """Result, sum of magnitudes and number of products in float64, from `pairs_of(a, b, table)`."""
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return (
        pairs_of(a, b, table),
        pairs_of(np.abs(a), np.abs(b), table),
        pairs_of(np.ones_like(a), np.ones_like(b), table),
    )


def forward(x, w, table):
    return sum(np.where((rows >= 0)[:, None], x[rows], 0) @ w[k] for k, rows in enumerate(table))


def dgrad(g, w, table):
    dx = np.zeros((table.shape[1], w.shape[1]))
    for k, rows in enumerate(table):
        np.add.at(dx, rows[rows >= 0], g[rows >= 0] @ w[k].T)
    return dx


def wgrad(x, g, table):
    return np.stack([x[rows[rows >= 0]].T @ g[rows >= 0] for rows in table])


def ulp(values, dtype):
    """Distance between neighbours of the dtype at each value; at 0, between the smallest."""
    info = jnp.finfo(dtype)
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, int(info.minexp))
    return np.ldexp(1.0, exponent - info.nmant)


@pytest.mark.parametrize("channels", [(16, 32), (64, 64), (5, 7)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda d: d.dtype.name)
@pytest.mark.parametrize("name", VALUES)
def test_every_element_lies_within_the_bound(name, dtype, channels):
    if name == "denormal" and dtype != jnp.float16:
        pytest.skip("the values are float16's denormals")
    sites, table = scene()
    rng = np.random.default_rng(1)
    c_in, c_out = channels
    x, g = (exactly(VALUES[name](rng, (len(sites.coords), c)), dtype) for c in channels)
    # Weights that take outputs of the large values to the end of float16's range, and of the others nowhere near.
    w = rng.normal(size=(27, c_in, c_out)) / np.sqrt(27 * c_in) * (0.25 if name == "large" else 1)
    w = exactly(halves_alike(w) if name == "cancelling" else w, dtype)
    small = exactly(np.asarray(g, np.float64) * (2.0**-20 if name == "large" else 1), dtype)

    def layer(x, w):
        return js.ops.conv(js.SparseTensor(sites, x), w, kernel_size=3).feats

    y, back = jax.vjp(layer, x, w)
    dx, _ = back(g)
    _, dw = jax.vjp(layer, x, w)[1](small)
    for found, a, b, of in ((y, x, w, forward), (dx, g, w, dgrad), (dw, x, small, wgrad)):
        true, magnitude, number = products(a, b, table, of)
        assert np.abs(true).max() < float(jnp.finfo(dtype).max), "the case overflows"
        bound = ulp(true, dtype) + number / 2 * 2.0**-23 * magnitude
        excess = np.abs(np.asarray(found, np.float64) - true) / bound
        assert excess.max() <= 1, f"{of.__name__}: {excess.max():.2f} times the bound at {np.argmax(excess)}"
