"""Which dtype sums are kept in, and which precision products are taken at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulation_dtype(dtype) -> jnp.dtype:
    """Dtype in which sums are kept: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


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
