"""SparseResUNet42 in float64, written from its description alone: the benchmarks check timed programs against it.

It shares no code with the library: kernel maps come from a binary search over sorted keys on the host, layers are a
loop over taps in `jax.numpy`. Weights are a plain list in the order in which the layers run (`seg_layers`), so that
the same list can be poured into any implementation.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5  # of every batch norm
LEVELS = 5


def keys(sites):
    """One int64 a site, distinct for coordinates in -1 .. 65533."""
    b, x, y, z = (sites.astype(np.int64) + np.array([0, 1, 1, 1])).T
    return ((b << 16 | x) << 16 | y) << 16 | z


def table(fine, coarse, kernel, stride):
    """Rows of `fine` at `stride * coarse - padding + tap`, int32 [taps, coarse sites], -1 where there is no such site.

    Padding is `(kernel - 1) // 2`: taps of kernel 3 reach -1, 0, 1, taps of kernel 2 reach 0, 1.
    """
    fine_keys = keys(fine)
    order = np.argsort(fine_keys)
    rows = []
    for tap in np.ndindex(kernel, kernel, kernel):
        wanted = coarse.copy()
        wanted[:, 1:] = stride * coarse[:, 1:] - (kernel - 1) // 2 + np.array(tap)
        wanted = keys(wanted)
        at = order[np.searchsorted(fine_keys, wanted, sorter=order).clip(max=len(fine) - 1)]
        rows.append(np.where(fine_keys[at] == wanted, at, -1).astype(np.int32))
    return np.stack(rows)


@dataclass(frozen=True)
class Pyramid:
    """Sites of the five levels, the submanifold table of each and the 2^3 stride 2 table between neighbours."""

    sites: list
    subm: list
    down: list


def pyramid(coords):
    """The sites and tables of one batch of voxels, int32 [N, 4]."""
    sites = [np.asarray(coords)]
    for _ in range(LEVELS - 1):
        sites.append(np.unique(np.column_stack([sites[-1][:, 0], sites[-1][:, 1:] // 2]), axis=0))
    subm = [table(s, s, 3, 1) for s in sites]
    down = [table(f, c, 2, 2) for f, c in itertools.pairwise(sites)]
    return Pyramid(sites, subm, down)


@jax.custom_vjp
def conv(x, w, rows):
    """y[m] = sum over taps k of x[rows[k, m]] @ w[k]."""

    def tap(y, one):
        index, weight = one
        return y + jnp.where(index[:, None] >= 0, x[index], 0) @ weight, None

    return jax.lax.scan(tap, jnp.zeros((rows.shape[1], w.shape[2]), x.dtype), (rows, w))[0]


def _conv_backward(saved, g):
    x, w, rows = saved

    def tap(dx, one):
        index, weight = one
        real = index[:, None] >= 0
        dx = dx.at[jnp.where(index >= 0, index, len(x))].add(g @ weight.T, mode="drop")
        return dx, jnp.where(real, x[index], 0).T @ g

    dx, dw = jax.lax.scan(tap, jnp.zeros_like(x), (rows, w))
    return dx, dw, None


conv.defvjp(lambda x, w, rows: (conv(x, w, rows), (x, w, rows)), _conv_backward)


def transpose(rows, n_fine):
    """The table of the transposed layer: table[k, f] = coarse site that reads fine site f through tap k."""
    flipped = np.full((len(rows), n_fine), -1, np.int32)
    for k, row in enumerate(rows):
        real = np.flatnonzero(row >= 0)
        flipped[k, row[real]] = real
    return flipped


def seg_layers(in_features, width):
    """("conv", taps, in, out) and ("norm", features) of SparseResUNet42 in the order in which they run.

    A block's shortcut, where it has one, runs after the block's second norm.
    """

    def conv_norm(taps, c_in, c_out):
        return [("conv", taps, c_in, c_out), ("norm", c_out)]

    def blocks(c_in, c_out):
        first = conv_norm(27, c_in, c_out) + conv_norm(27, c_out, c_out)
        return first + (conv_norm(1, c_in, c_out) if c_in != c_out else []) + 2 * conv_norm(27, c_out, c_out)

    stem, encoder, decoder = seg_widths(width)
    layers = conv_norm(27, in_features, stem) + conv_norm(27, stem, stem)
    channels = [stem]
    for c in encoder:
        layers += conv_norm(8, channels[-1], channels[-1]) + blocks(channels[-1], c)
        channels.append(c)
    c_in = channels.pop()
    for c in decoder:
        layers += conv_norm(8, c_in, c) + blocks(c + channels.pop(), c)
        c_in = c
    return layers


def seg_widths(width):
    """Channels of the stem, the encoder's stages and the decoder's stages."""
    scaled = [int(width * c) for c in (32, 32, 64, 128, 256, 256, 128, 96, 96)]
    return scaled[0], scaled[1:5], scaled[5:]


def random_weights(layers, seed=0):
    """Kernels [taps, in, out] and norms (scale, bias, mean, var), float32, one entry a layer."""
    rng = np.random.default_rng(seed)
    weights = []
    for kind, *shape in layers:
        if kind == "conv":
            taps, c_in, _ = shape
            weights.append((rng.standard_normal(shape) / np.sqrt(taps * c_in)).astype(np.float32))
        else:
            scale, bias = rng.uniform(0.5, 1.5, shape), rng.uniform(-0.2, 0.2, shape)
            weights.append(tuple(a.astype(np.float32) for a in (scale, bias, np.zeros(shape), np.ones(shape))))
    return weights


def seg_forward(weights, tables, feats, training):
    """Features of the last layer, and the mean and variance of each norm's input in running order.

    Args:
        weights: As `random_weights` makes them.
        tables: (submanifold tables, strided tables, transposed tables), one a level.
        feats: [N, in_features].
        training: Normalise by the batch's statistics rather than the stored ones.
    """
    subm, down, up = tables
    left = iter(weights)
    statistics = []

    def norm(x):
        scale, bias, mean, var = next(left)
        batch_mean, batch_var = x.mean(0), x.var(0)
        statistics.append((batch_mean, batch_var))
        if training:
            mean, var = batch_mean, batch_var
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias

    def conv_norm(x, rows):
        return norm(conv(x, next(left), rows))

    def block(x, rows, c_out):
        y = jax.nn.relu(conv_norm(x, rows))
        y = conv_norm(y, rows)
        shortcut = x if x.shape[1] == c_out else norm(x @ next(left)[0])
        return jax.nn.relu(y + shortcut)

    convs = [w for w in weights if not isinstance(w, tuple)]
    encoder, decoder = seg_stages(convs)
    x = jax.nn.relu(conv_norm(feats, subm[0]))
    x = jax.nn.relu(conv_norm(x, subm[0]))
    skips = []
    for level, c in enumerate(encoder):
        skips.append(x)
        x = jax.nn.relu(conv_norm(x, down[level]))
        x = block(block(x, subm[level + 1], c), subm[level + 1], c)
    for level, c in zip(reversed(range(LEVELS - 1)), decoder, strict=True):
        x = jax.nn.relu(conv_norm(x, up[level]))
        x = jnp.concatenate([x, skips.pop()], axis=1)
        x = block(block(x, subm[level], c), subm[level], c)
    assert next(left, None) is None
    return x, statistics


def seg_stages(convs):
    """Output channels of the encoder's and the decoder's stages, read off the kernels: a stage starts at 8 taps."""
    starts = [i for i, w in enumerate(convs) if w.shape[0] == 8]
    stages = [convs[i + 1].shape[2] for i in starts]
    return stages[: LEVELS - 1], stages[LEVELS - 1 :]


def seg_tables(coords):
    """The tables that `seg_forward` wants, for one batch of voxels."""
    p = pyramid(coords)
    up = [transpose(rows, len(sites)) for rows, sites in zip(p.down, p.sites, strict=False)]
    return p.subm, p.down, up


def in_float64(tree):
    """The arrays of a tree as float64."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def conv_output(feats, kernel, rows):
    """One layer in float64, as a numpy array."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(conv)(np.asarray(feats, np.float64), np.asarray(kernel, np.float64), rows))


def seg_output(weights, voxels, training=False):
    """Output features and norm statistics in float64, as numpy arrays. Rows are those of `voxels`."""
    with jax.enable_x64(True):
        out = jax.jit(seg_forward, static_argnums=3)(
            in_float64(weights), seg_tables(voxels.coords), np.asarray(voxels.feats, np.float64), training
        )
        return jax.tree.map(np.asarray, out)


def seg_gradients(weights, voxels):
    """Gradients of the mean squared output (batch statistics) for all weights, float64, as numpy arrays."""

    def loss(weights, tables, feats):
        return jnp.mean(seg_forward(weights, tables, feats, True)[0] ** 2)

    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss))(
            in_float64(weights), seg_tables(voxels.coords), np.asarray(voxels.feats, np.float64)
        )
        return jax.tree.map(np.asarray, grads)


def with_statistics(weights, statistics):
    """The weights with each norm's stored statistics replaced: activations then have the scale that training gives."""
    left = iter(statistics)

    def replace(entry):
        if not isinstance(entry, tuple):
            return entry
        return (*entry[:2], *(np.asarray(s, np.float32) for s in next(left)))

    return [replace(entry) for entry in weights]
