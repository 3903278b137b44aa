"""Linear layer on sparse tensors, and what layers with a kernel share (Flax NNX)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxsparse import ops
from jaxsparse._dtypes import canonical_precision
from jaxsparse.tensor import SparseTensor, check_tensor

Initializer = jax.nn.initializers.Initializer


def check_features(in_features: int, out_features: int) -> None:
    """Refuses widths that are no integers from 1."""
    if not all(isinstance(n, int | np.integer) and n >= 1 for n in (in_features, out_features)):
        raise ValueError(
            f"`in_features` (={in_features}) and `out_features` (={out_features}) must be integers, at least 1."
        )


def check_input(layer: nnx.Module, x: SparseTensor, argument: str) -> None:
    """Refuses an input that is no SparseTensor, or whose width is not the layer's attribute of that name."""
    name, width = type(layer).__name__, getattr(layer, argument)
    check_tensor(name, x)
    if x.num_features != width:
        raise ValueError(
            f"{name}: `{argument}` (={width}) must be {x.num_features}, the features of x (shape {x.feats.shape})."
        )


def compute_dtype(dtype: DTypeLike | None, x: SparseTensor, kernel: jax.Array) -> jnp.dtype:
    """The layer's dtype, or the promotion of input and parameters."""
    if dtype is not None:
        return jnp.dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):  # it is documented, so not what "strict" guards against
        return jnp.promote_types(x.dtype, kernel.dtype)


class Linear(nnx.Module):
    """`feats @ kernel + bias` on every site: a convolution with one tap.

    Args:
      in_features, out_features: channels, C_in and C_out.
      use_bias: whether to add a bias.
      dtype: of inputs and products; by default the promotion of input and parameters. Sums are float32 or wider.
      param_dtype: of the parameters.
      precision: of float32 products, as jax spells it.
      kernel_init, bias_init: initialisers.
      rngs: source of the initial parameters.

    Attributes:
      kernel: parameter `[C_in, C_out]`.
      bias: parameter `[C_out]`, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        check_features(in_features, out_features)
        canonical_precision(precision)  # refuses what is none
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.precision = dtype, precision
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: SparseTensor) -> SparseTensor:
        """Features `[N, C_in]` to `[N, C_out]` on the same sites."""
        check_input(self, x, "in_features")
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        return ops.linear(x.astype(compute_dtype(self.dtype, x, kernel)), kernel, bias, precision=self.precision)
