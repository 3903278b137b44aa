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
    """One precision from what jax accepts; None takes jax's own default, `jax_default_matmul_precision`.

    Of jax's algorithms for products, those of float32 or wider are "highest", those of several terms "high".
    """
    chosen: Any = jax.config.values["jax_default_matmul_precision"] if precision is None else precision
    try:
        if isinstance(chosen, tuple):  # one for each operand: the higher serves both
            return max(map(_precision_of, chosen), key=list(lax.Precision).index)
        return _precision_of(chosen)
    except ValueError:
        name = "precision" if precision is not None else "jax_default_matmul_precision"
        raise ValueError(
            f"`{name}` (={chosen!r}) must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset or one of None, "
            "default, high, highest, bfloat16, tensorfloat32, float32."
        ) from None


def _precision_of(chosen: Any) -> lax.Precision:
    name = chosen.name if isinstance(chosen, lax.DotAlgorithmPreset) else chosen
    if name in lax.DotAlgorithmPreset.__members__:
        if name in ("F32_F32_F32", "F64_F64_F64"):
            return lax.Precision.HIGHEST
        return lax.Precision.HIGH if name.endswith(("_X3", "_X6", "_X9")) else lax.Precision.DEFAULT
    return lax.Precision.DEFAULT if chosen is None else lax.Precision(chosen)
