"""Site keys in plain JAX: the same 64 bits as `cuda/coords/key.h`, as two uint32 words, high word first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

AXIS_BITS = {1: 31, 2: 24, 3: 18, 4: 14}
PADDING_COORD = -(2**31)  # every entry of a padding row
NO_KEY = np.uint32(0xFFFFFFFF)  # both words of the key of a row that is not a site


def axis_limit(dims: int) -> int:
    """Coordinates lie in [-limit, limit)."""
    return 2 ** (AXIS_BITS[dims] - 1)


def batch_limit(dims: int) -> int:
    """Batch indices lie in [0, limit)."""
    return 2**31 if dims == 1 else 2 ** (64 - dims * AXIS_BITS[dims]) - 1


def has_key(coords: jax.Array) -> jax.Array:
    """Whether each site of int32 `[N, 1 + D]` has a key: bool `[N]`."""
    dims = coords.shape[-1] - 1
    limit = axis_limit(dims)
    fits = (coords[..., 0] >= 0) & (coords[..., 0] <= batch_limit(dims) - 1)
    return fits & ((coords[..., 1:] >= -limit) & (coords[..., 1:] < limit)).all(-1)


def keys_of(coords: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of int32 sites `[N, 1 + D]` as words `(high, low)`, uint32 `[N]` each; all ones where there is no key."""
    dims = coords.shape[-1] - 1
    bits = AXIS_BITS[dims]
    batch = coords[..., 0].astype(jnp.uint32)
    offset = coords[..., 1:].astype(jnp.uint32) + jnp.uint32(2 ** (bits - 1))
    position = np.arange(dims * bits)[None]
    axis, bit = dims - 1 - position % dims, np.uint32(position // dims)
    code = (jnp.take_along_axis(offset, axis, -1) >> bit & 1) << np.uint32(position % 32)  # one column a bit
    words = [code[..., :32].sum(-1, dtype=jnp.uint32), code[..., 32:].sum(-1, dtype=jnp.uint32)]  # low, high
    shift = dims * bits  # where the batch begins
    if shift < 32:
        words[0] |= batch << shift
    words[1] |= batch >> (32 - shift) if shift < 32 else batch << (shift - 32)
    valid = has_key(coords)
    return jnp.where(valid, words[1], NO_KEY), jnp.where(valid, words[0], NO_KEY)


def real_rows(counts: jax.Array, rows: int) -> jax.Array:
    """Which rows are real, bool `[rows]`: the first `counts[s]` of each of the S equal segments."""
    local = jnp.arange(rows // counts.shape[0], dtype=jnp.int32)
    return (local[None] < counts[:, None]).reshape(rows)
