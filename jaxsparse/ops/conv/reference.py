"""The three products of the convolution in plain JAX: the tests' oracle, and what runs where no custom call is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulation_dtype(dtype) -> jnp.dtype:
    """Dtype in which sums are kept: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


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


def canonical_precision(precision: lax.PrecisionLike) -> lax.Precision:
    """One precision from what jax accepts; None takes jax's own default, `jax_default_matmul_precision`."""
    chosen: Any = jax.config.values["jax_default_matmul_precision"] if precision is None else precision
    try:
        if isinstance(chosen, tuple):  # one for each operand: the higher serves both
            chosen = max((lax.Precision(p) for p in chosen), key=list(lax.Precision).index)
        return lax.Precision.DEFAULT if chosen is None else lax.Precision(chosen)
    except ValueError:
        names = "None, default, high, highest, bfloat16, tensorfloat32, float32"
        raise ValueError(f"`precision` (={precision!r}) must be a jax.lax.Precision or one of {names}.") from None
