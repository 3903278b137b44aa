"""The three products of the convolution in plain JAX: the tests' oracle, and what runs where no custom call is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse._dtypes import accumulation_dtype


def forward(x, w, table, *, precision: lax.Precision) -> jax.Array:
    """`y[m] = sum_k x[table[k, m]] @ w[k]`, in the accumulation dtype: `[N_out, C_out]`."""
    dtype = accumulation_dtype(x.dtype)

    def product(rows, weights):
        taken = jnp.where(rows[:, None] >= 0, x[jnp.maximum(rows, 0)], 0)
        return jnp.dot(taken, weights, precision=precision, preferred_element_type=dtype)

    total = product(table[0], w[0])
    total, _ = lax.scan(lambda acc, tap: (acc + product(*tap), None), total, (table[1:], w[1:]))
    return total


def wgrad(x, g, table, *, precision: lax.Precision) -> jax.Array:
    """`dw[k] = sum_m outer(x[table[k, m]], g[m])`, in the accumulation dtype: `[K, C_in, C_out]`."""
    dtype = accumulation_dtype(x.dtype)

    def product(rows):
        present = rows[:, None] >= 0
        taken = jnp.where(present, x[jnp.maximum(rows, 0)], 0)
        return jnp.dot(taken.T, jnp.where(present, g, 0), precision=precision, preferred_element_type=dtype)

    return lax.map(product, table)


def reverse(table, in_rows: int) -> jax.Array:
    """The table seen from the input: `reverse[k, table[k, m]] = m`, -1 elsewhere, int32 `[K, N_in]`."""
    taps, out_rows = table.shape
    target = jnp.where(table >= 0, table, in_rows)  # past the end: dropped
    output = jnp.broadcast_to(jnp.arange(out_rows, dtype=jnp.int32), table.shape)
    return jnp.full((taps, in_rows), -1, jnp.int32).at[jnp.arange(taps)[:, None], target].set(output, mode="drop")
