"""The networks as data, and in float64: the benchmarks check timed programs against it.

It shares no code with the library: kernel maps come from a binary search over sorted keys on the host, layers are a
loop over taps in `jax.numpy`. Weights are a plain list in the order in which the layers run (`layers`), so that the
same list can be poured into any implementation.
"""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5  # of every batch norm
# On a GPU, trying algorithms for hundreds of float64 products took longer than everything else.
COMPILER = {"xla_gpu_autotune_level": 0}


# --- the networks ---


@dataclass(frozen=True)
class Stage:
    """Convolution, norm and ReLU, then residual blocks.

    kind: "submanifold"; "strided", onto every site reached; or "transposed", which undoes the last strided convolution
        that is not undone yet and appends the features that went into that: a U-Net's skip.
    kernel, strides: of the convolution, one an axis; padding is `(kernel - 1) // 2`: 3 taps are -1 to 1, 2 are 0 to 1.
    features: output channels of the convolution.
    blocks: output channels of each residual block of 3^3 submanifold convolutions.
    """

    kind: str
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    features: int
    blocks: tuple[int, ...] = ()


THREE, TWO, ONE = (3, 3, 3), (2, 2, 2), (1, 1, 1)


def seg_stages(width):
    """SparseResUNet42: stem, encoder, decoder."""
    stem, *encoder = (int(width * c) for c in (32, 32, 64, 128, 256))
    decoder = [int(width * c) for c in (256, 128, 96, 96)]
    return (
        *2 * [Stage("submanifold", THREE, ONE, stem)],
        *(Stage("strided", TWO, TWO, c_in, (c, c)) for c_in, c in itertools.pairwise([stem, *encoder])),
        *(Stage("transposed", TWO, TWO, c, (c, c)) for c in decoder),
    )


def det_stages(width):
    """SparseResNet21D."""
    first, *others = (int(width * c) for c in (16, 32, 64, 128))
    return (
        Stage("submanifold", THREE, ONE, first, (first, first)),
        *(Stage("strided", THREE, TWO, c, (c, c)) for c in others),
        Stage("strided", (1, 3, 1), (1, 2, 1), others[-1]),
    )


def layers(stages, in_features):
    """("conv", taps, in, out) and ("norm", features) in the order in which they run.

    A block's shortcut, where it has one, runs after the block's second norm.
    """
    found, skips, c_in = [], [], in_features

    def conv_norm(taps, c_in, c_out):
        found.extend([("conv", taps, c_in, c_out), ("norm", c_out)])

    for stage in stages:
        if stage.kind == "strided":
            skips.append(c_in)
        conv_norm(math.prod(stage.kernel), c_in, stage.features)
        c_in = stage.features + (skips.pop() if stage.kind == "transposed" else 0)
        for c in stage.blocks:
            conv_norm(27, c_in, c)
            conv_norm(27, c, c)
            if c_in != c:
                conv_norm(1, c_in, c)
            c_in = c
    return found


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


def with_statistics(weights, statistics):
    """The weights with each norm's stored statistics replaced: activations then have the scale that training gives."""
    left = iter(statistics)

    def replace(entry):
        if not isinstance(entry, tuple):
            return entry
        return (*entry[:2], *(np.asarray(s, np.float32) for s in next(left)))

    return [replace(entry) for entry in weights]


# --- sites and tables, on the host ---


def keys(sites):
    """One int64 a site, distinct for coordinates in -1 .. 65533."""
    b, x, y, z = (sites.astype(np.int64) + np.array([0, 1, 1, 1])).T
    return ((b << 16 | x) << 16 | y) << 16 | z


def reachable(fine, kernel, strides):
    """Every site whose window holds a site of `fine`, sorted."""
    padding, found = (np.array(kernel) - 1) // 2, []
    for tap in np.ndindex(*kernel):
        scaled = fine[:, 1:] + padding - tap  # strides * coarse
        whole = (scaled % strides == 0).all(axis=1)
        found.append(np.column_stack([fine[whole, 0], scaled[whole] // strides]))
    return np.unique(np.concatenate(found), axis=0)


def table(fine, coarse, kernel, strides):
    """Rows of `fine` at `strides * coarse - padding + tap`, int32 [taps, coarse sites], -1 where there is no site."""
    fine_keys, padding = keys(fine), (np.array(kernel) - 1) // 2
    order = np.argsort(fine_keys)
    rows = []
    for tap in np.ndindex(*kernel):
        wanted = keys(np.column_stack([coarse[:, 0], coarse[:, 1:] * strides - padding + tap]))
        at = order[np.searchsorted(fine_keys, wanted, sorter=order).clip(max=len(fine) - 1)]
        rows.append(np.where(fine_keys[at] == wanted, at, -1).astype(np.int32))
    return np.stack(rows)


def transpose(rows, n_fine):
    """The table of the transposed layer: table[k, f] = coarse site that reads fine site f through tap k."""
    flipped = np.full((len(rows), n_fine), -1, np.int32)
    for k, row in enumerate(rows):
        real = np.flatnonzero(row >= 0)
        flipped[k, row[real]] = real
    return flipped


def tables(stages, coords):
    """Sites of the output for one batch of voxels, and for each stage the tables of its convolution and its blocks."""
    sites, around, strided, found = [coords], [None], [], []  # of each level, `around` being the table of its blocks
    for stage in stages:
        if stage.kind == "strided":
            sites.append(reachable(sites[-1], stage.kernel, stage.strides))
            around.append(None)
            rows = table(*sites[-2:], stage.kernel, stage.strides)
            strided.append(rows)
        elif stage.kind == "transposed":
            sites.pop(), around.pop()
            rows = transpose(strided.pop(), len(sites[-1]))
        else:
            rows = table(sites[-1], sites[-1], stage.kernel, stage.strides)
        if stage.blocks and around[-1] is None:
            around[-1] = table(sites[-1], sites[-1], THREE, ONE)
        found.append((rows, around[-1]))
    return sites[-1], found


# --- the computation ---


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


def forward(stages, weights, tables, feats, training):
    """Features of the last layer, and the mean and variance of each norm's input in running order.

    Args:
        stages: The network.
        weights: As `random_weights` makes them.
        tables: For each stage those of its convolution and of its blocks.
        feats: [N, in_features].
        training: Normalise by the batch's statistics rather than the stored ones; may be traced, to compile once.
    """
    left = iter(weights)
    statistics = []

    def norm(x):
        scale, bias, mean, var = next(left)
        batch_mean, batch_var = x.mean(0), x.var(0)
        statistics.append((batch_mean, batch_var))
        mean, var = jnp.where(training, batch_mean, mean), jnp.where(training, batch_var, var)
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias

    def conv_norm(x, rows):
        return norm(conv(x, next(left), rows))

    def block(x, rows, c_out):
        y = jax.nn.relu(conv_norm(x, rows))
        y = conv_norm(y, rows)
        shortcut = x if x.shape[1] == c_out else norm(x @ next(left)[0])
        return jax.nn.relu(y + shortcut)

    x, skips = feats, []
    for stage, (rows, around) in zip(stages, tables, strict=True):
        if stage.kind == "strided":
            skips.append(x)
        x = jax.nn.relu(conv_norm(x, rows))
        if stage.kind == "transposed":
            x = jnp.concatenate([x, skips.pop()], axis=1)
        for c in stage.blocks:
            x = block(x, around, c)
    assert next(left, None) is None
    return x, statistics


def in_float64(tree):
    """The arrays of a tree as float64."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def conv_output(feats, kernel, rows):
    """One layer in float64, as a numpy array."""
    with jax.enable_x64(True):
        return np.asarray(
            jax.jit(conv, compiler_options=COMPILER)(
                np.asarray(feats, np.float64), np.asarray(kernel, np.float64), rows
            )
        )


def output(stages, weights, voxels, training=False):
    """Sites of the output, its features and the norms' statistics, in float64, as numpy arrays."""
    sites, rows = tables(stages, voxels.coords)
    with jax.enable_x64(True):
        out = jax.jit(forward, static_argnums=0, compiler_options=COMPILER)(
            stages, in_float64(weights), rows, np.asarray(voxels.feats, np.float64), training
        )
        return sites, *jax.tree.map(np.asarray, out)


def gradients(stages, weights, voxels):
    """Gradients of the mean squared output (batch statistics) for all weights, float64, as numpy arrays."""
    _, rows = tables(stages, voxels.coords)

    def loss(weights, rows, feats):
        return jnp.mean(forward(stages, weights, rows, feats, True)[0] ** 2)

    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss), compiler_options=COMPILER)(
            in_float64(weights), rows, np.asarray(voxels.feats, np.float64)
        )
        return jax.tree.map(np.asarray, grads)
