"""Batch normalisation layer on sparse tensors (Flax NNX)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxsparse import ops
from jaxsparse.nn.linear import Initializer, check_input
from jaxsparse.tensor import SparseTensor


class BatchNorm(nnx.Module):
    """Batch normalisation over the real rows (Ioffe and Szegedy, 2015), in the manner of `flax.nnx.BatchNorm`.

    `model.train()` and `model.eval()` switch between batch and running statistics. A batch without rows leaves the
    running statistics as they are.

    Args:
      num_features: channels, C.
      use_running_average: normalise with the running statistics and leave them alone.
      momentum: weight of the old running statistics in an update: 0.9 is PyTorch's default (0.1 there), Flax's is 0.99.
      epsilon: added to the variance.
      dtype: of the result; that of the input by default. Statistics are float32 or wider.
      param_dtype: of scale, bias and running statistics.
      use_bias, use_scale: which parameters there are.
      bias_init, scale_init: initialisers.
      axis_name: mesh or `vmap` axes over which statistics are summed, as sums and counts, so that shards may hold
        unequal numbers of rows.
      rngs: source of the initial parameters.

    Attributes:
      mean, var: running statistics `[C]`, `nnx.BatchStat`.
      scale, bias: parameters `[C]`, or None.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: Hashable | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(num_features, int | np.integer) or num_features < 1:
            raise ValueError(f"BatchNorm: `num_features` (={num_features}) must be an integer, at least 1.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"BatchNorm: `momentum` (={momentum}) must lie between 0 and 1.")
        self.num_features, self.use_running_average = num_features, use_running_average
        self.momentum, self.epsilon, self.dtype, self.axis_name = momentum, epsilon, dtype, axis_name
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype)) if use_scale else None
        self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype)) if use_bias else None

    def __call__(
        self,
        x: SparseTensor,
        *,
        use_running_average: bool | None = None,
        residual: SparseTensor | None = None,
        activation: str | None = None,
    ) -> SparseTensor:
        """Normalises `[N, C]` features; `use_running_average` overrides the attribute.

        residual: tensor on the same sites with `num_features` features, added to the result.
        activation: "relu", "leaky_relu", "gelu" or "silu", applied last.
        """
        check_input(self, x, "num_features")
        scale, bias = self._affine()
        # A cast comes between the norm and a residual; without one, all is one op.
        casts = residual is not None and self.dtype not in (None, x.dtype)
        added, last = (None, None) if casts else (residual, activation)
        after: dict[str, Any] = {"epsilon": self.epsilon, "residual": added, "activation": last}
        if self.use_running_average if use_running_average is None else use_running_average:
            y = ops.batch_norm(x, self.mean[...], self.var[...], scale, bias, **after)
        else:
            y, mean, variance, count = ops.normalize_batch(x, scale, bias, axis_name=self.axis_name, **after)
            for running, batch in ((self.mean, mean), (self.var, variance)):
                old, new = running[...].astype(batch.dtype), jax.lax.stop_gradient(batch)
                updated = jnp.where(count > 0, self.momentum * old + (1 - self.momentum) * new, old)
                running[...] = updated.astype(running.dtype)
        y = y if self.dtype is None else y.astype(self.dtype)
        if residual is None or not casts:
            return y
        return ops.activate(ops.add(y, residual.astype(y.dtype)), activation)

    def running(self) -> ops.ChannelNorm:
        """The normalisation by the running statistics, for a convolution to take in."""
        return ops.ChannelNorm(self.mean[...], self.var[...], *self._affine(), self.epsilon)

    def _affine(self) -> tuple[jax.Array | None, jax.Array | None]:
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return scale, bias
