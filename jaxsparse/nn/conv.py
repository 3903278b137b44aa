"""Sparse convolution layers (Flax NNX)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxsparse import ops
from jaxsparse._dtypes import canonical_precision
from jaxsparse.geometry import AxisInts, Geometry
from jaxsparse.kernel_map import KernelMap
from jaxsparse.nn.linear import Initializer, check_features, check_input, compute_dtype
from jaxsparse.nn.norm import BatchNorm
from jaxsparse.ops import ConvConfig
from jaxsparse.ops.elementwise import check_activation
from jaxsparse.sites import Sites, check_capacity
from jaxsparse.tensor import SparseTensor


class ConvOptions(TypedDict, total=False):
    """Keyword arguments that all convolution layers take, in the manner of `flax.nnx.Conv`.

    strides, padding, dilation: integers, or one an axis; 1, `dilation * ((kernel_size - 1) // 2)` and 1 by default.
    dims: number of spatial axes, needed where all sizes are integers and it is not 3.
    use_bias: whether to add a bias; True by default.
    dtype: of inputs and products; by default the promotion of input and parameters. Sums are float32 or wider.
    param_dtype: of the parameters; float32 by default.
    precision: of float32 products, as jax spells it.
    kernel_init, bias_init: initialisers; LeCun normal (fan-in `K * C_in`) and zeros by default.
    config: choice of kernel, `jaxsparse.ops.ConvConfig`.
    rngs: source of the initial parameters.
    """

    strides: AxisInts
    padding: AxisInts | None
    dilation: AxisInts
    dims: int | None
    use_bias: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: lax.PrecisionLike
    kernel_init: Initializer
    bias_init: Initializer
    config: ConvConfig | None
    rngs: Required[nnx.Rngs]


class After(TypedDict, total=False):
    """What follows in a call of a layer: `activation(norm(conv(x)) + residual)`; see `jaxsparse.ops.conv`.

    In eval mode, where the norm's statistics are known, all of it is one kernel on GPUs for 16-bit features.

    norm: a `BatchNorm` of `out_features`.
    residual: tensor on the output sites with `out_features` features.
    activation: "relu", "leaky_relu", "gelu" or "silu".
    """

    norm: BatchNorm | None
    residual: SparseTensor | None
    activation: str | None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Conv(nnx.Module):
    """The parameters and options of all convolution layers."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: AxisInts,
        *,
        strides: AxisInts = 1,
        padding: AxisInts | None = None,
        dilation: AxisInts = 1,
        dims: int | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = jax.nn.initializers.zeros,
        config: ConvConfig | None = None,
        rngs: nnx.Rngs,
    ):
        check_features(in_features, out_features)
        if dims is None:
            shapes = [np.shape(s) for s in (kernel_size, strides, padding, dilation) if s is not None]
            dims = next((shape[0] for shape in shapes if shape), 3)
        geometry = Geometry.create(dims, kernel_size, strides, padding, dilation)
        canonical_precision(precision)  # refuses what is none, and so does the next
        ConvConfig.of(config)
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size, self.strides = geometry.kernel, geometry.stride
        self.padding, self.dilation = geometry.padding, geometry.dilation
        self.dtype, self.precision, self.config = dtype, precision, config
        shape = (geometry.volume, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None

    def _run(
        self,
        op: Callable[..., SparseTensor],
        x: SparseTensor,
        options: dict,
        *,
        norm: BatchNorm | None = None,
        residual: SparseTensor | None = None,
        activation: str | None = None,
    ) -> SparseTensor:
        """The convolution `op` and what follows; a norm with running statistics goes into the same op."""
        check_input(self, x, "in_features")
        name, dims = type(self).__name__, len(self.kernel_size)
        if x.dims != dims:
            raise ValueError(f"{name}: made for {dims} spatial axes, but x has {x.dims}; set dims={x.dims}.")
        if norm is not None and not isinstance(norm, BatchNorm):
            raise TypeError(f"{name}: `norm` must be a jaxsparse.nn.BatchNorm, got {_full_name(type(norm))}.")
        check_activation(name, activation)
        kernel = self.kernel[...]
        options |= {
            "bias": None if self.bias is None else self.bias[...],
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation": self.dilation,
            "precision": self.precision,
            "config": self.config,
        }
        x = x.astype(compute_dtype(self.dtype, x, kernel))
        if norm is None or (norm.use_running_average and norm.dtype in (None, x.dtype)):
            known = None if norm is None else norm.running()
            return op(x, kernel, norm=known, residual=residual, activation=activation, **options)
        return norm(op(x, kernel, **options), residual=residual, activation=activation)


class SubMConv(_Conv):
    """Submanifold convolution: the output has the sites of the input (Graham et al., CVPR 2018, section 3).

        conv = SubMConv(4, 32, 3, use_bias=False, rngs=nnx.Rngs(0))
        y = conv(x)  # features [N, 4] to [N, 32]

    Args:
      in_features, out_features: channels, C_in and C_out.
      kernel_size: an integer, or one an axis.
      **options: see `ConvOptions`; strides must be 1.

    Attributes:
      kernel: parameter `[K, C_in, C_out]`, taps row-major over the axes, last axis fastest.
      bias: parameter `[C_out]`, or None.
    """

    def __init__(self, in_features: int, out_features: int, kernel_size: AxisInts, **options: Unpack[ConvOptions]):
        super().__init__(in_features, out_features, kernel_size, **options)
        if set(self.strides) != {1}:
            raise ValueError(f"SubMConv: `strides` (={self.strides}) must be 1; use SparseConv to change the grid.")

    def __call__(self, x: SparseTensor, *, kernel_map: KernelMap | None = None, **after: Unpack[After]) -> SparseTensor:
        """Features `[N, C_in]` to `[N, C_out]` on the same sites; `kernel_map` as in `jaxsparse.ops.conv`.

        **after: norm, residual and activation that follow, see `After`.
        """
        return self._run(ops.conv, x, {"sites": "submanifold", "kernel_map": kernel_map}, **after)


class SparseConv(_Conv):
    """Sparse convolution onto new sites, usually of a coarser grid.

        down = SparseConv(32, 64, 3, strides=2, rngs=nnx.Rngs(0))
        y = down(x)

    Args:
      in_features, out_features: channels, C_in and C_out.
      kernel_size: an integer, or one an axis.
      sites: "reachable" for every site whose window holds an input site (spconv, TorchSparse), "floor" for
        `floor(fine / strides)` (MinkowskiEngine).
      capacity: rows of the output; by default the `capacities` of the input's sites decide, else as many as the input
        has, or twice that where an input site can reach more than one output site.
      **options: see `ConvOptions`.

    Attributes:
      kernel: parameter `[K, C_in, C_out]`, taps row-major over the axes, last axis fastest.
      bias: parameter `[C_out]`, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: AxisInts,
        *,
        sites: str = "reachable",
        capacity: int | None = None,
        **options: Unpack[ConvOptions],
    ):
        super().__init__(in_features, out_features, kernel_size, **options)
        if sites not in ("reachable", "floor"):
            raise ValueError(f'SparseConv: `sites` (={sites!r}) must be "reachable" or "floor".')
        if capacity is not None:
            check_capacity(capacity)
        self.sites, self.capacity = sites, capacity

    def __call__(
        self,
        x: SparseTensor,
        *,
        like: SparseTensor | Sites | None = None,
        kernel_map: KernelMap | None = None,
        **after: Unpack[After],
    ) -> SparseTensor:
        """Features `[N, C_in]` to `[N_out, C_out]`.

        Args:
          x: the input.
          like: tensor or sites to compute, in place of those that `sites` makes; for a layer without `capacity`.
          kernel_map: the map to use, with `like`; see `jaxsparse.ops.conv`.
          **after: norm, residual and activation that follow, see `After`.
        """
        sites = self.sites if like is None else like.sites if isinstance(like, SparseTensor) else like
        options = {"sites": sites, "capacity": self.capacity, "kernel_map": kernel_map}
        return self._run(ops.conv, x, options, **after)


class SparseConvTranspose(_Conv):
    """Transposed sparse convolution onto the sites of a given tensor: `out[fine] += x[coarse] @ kernel[tap]`.

        up = SparseConvTranspose(64, 32, 3, strides=2, rngs=nnx.Rngs(0))
        y = up(down(x), like=x)

    Args:
      in_features, out_features: channels, C_in and C_out.
      kernel_size: an integer, or one an axis.
      **options: see `ConvOptions`; strides, padding and dilation are those of the convolution that is transposed.

    Attributes:
      kernel: parameter `[K, C_in, C_out]`, taps row-major over the axes, last axis fastest, not flipped.
      bias: parameter `[C_out]`, or None.
    """

    def __init__(self, in_features: int, out_features: int, kernel_size: AxisInts, **options: Unpack[ConvOptions]):
        super().__init__(in_features, out_features, kernel_size, **options)

    def __call__(
        self,
        x: SparseTensor,
        like: SparseTensor | Sites | None = None,
        *,
        kernel_map: KernelMap | None = None,
        **after: Unpack[After],
    ) -> SparseTensor:
        """Features `[N_coarse, C_in]` to `[N_fine, C_out]` on the sites of `like`.

        **after: norm, residual and activation that follow, see `After`.

        Raises:
          ValueError: without `like`, or where its grid is not finer than that of `x` by `strides`.
        """
        if like is None:
            raise ValueError(
                f"{type(self).__name__}: `like` is missing; pass the tensor whose sites to compute, usually the input "
                "of the strided layer: up(x, like=skip)."
            )
        return self._run(ops.conv_transpose, x, {"like": like, "kernel_map": kernel_map}, **after)


class SparseInverseConv(SparseConvTranspose):
    """`SparseConvTranspose` under spconv's name: undoes the change of sites of a strided convolution."""
