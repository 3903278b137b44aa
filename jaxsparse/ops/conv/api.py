"""Sparse convolutions as functions; each layer of `jaxsparse.nn` is a thin wrapper of one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import status
from jaxsparse._dtypes import accumulation_dtype, canonical_precision
from jaxsparse._primitive import check_implementation
from jaxsparse.geometry import AxisInts, Geometry
from jaxsparse.kernel_map import KernelMap, map_between
from jaxsparse.ops.channel_norm import ChannelNorm, per_channel
from jaxsparse.ops.conv import fused, primitives
from jaxsparse.ops.conv.config import ConvConfig
from jaxsparse.ops.elementwise import check_activation
from jaxsparse.ops.join import common_sites
from jaxsparse.ops.linear import check_weights, linear
from jaxsparse.sites import Sites, check_single
from jaxsparse.status import Problem
from jaxsparse.tensor import SparseTensor, check_tensor, on_sites


def conv(
    x: SparseTensor,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    kernel_size: AxisInts,
    sites: str | Sites = "submanifold",
    strides: AxisInts = 1,
    padding: AxisInts | None = None,
    dilation: AxisInts = 1,
    capacity: int | None = None,
    kernel_map: KernelMap | None = None,
    norm: ChannelNorm | None = None,
    residual: SparseTensor | None = None,
    activation: str | None = None,
    precision: lax.PrecisionLike = None,
    config: ConvConfig | None = None,
    implementation: str = "auto",
) -> SparseTensor:
    """Sparse convolution: `y[m] = sum_k x[strides * m - padding + dilation * k] @ kernel[k]` over the sites that exist.

    Equal to a dense cross-correlation with zeros where there is no site, read at the output sites. The result is
    `activation(norm(y + bias) + residual)` where these are given, computed in float32 or wider and rounded once: on
    GPUs, for 16-bit features, in the convolution's kernel. Where derivatives are taken these are steps of their own.

    Args:
      x: features `[N, C_in]`; products are taken in its dtype, sums in float32 or wider.
      kernel: `[K, C_in, C_out]`, taps row-major over the axes, last axis fastest.
      bias: `[C_out]` or None; added on every output site.
      kernel_size: an integer or one an axis, with product K.
      sites: output sites: "submanifold" for those of `x`, "reachable" for every site whose window holds an input site
        (spconv, TorchSparse), "floor" for `floor(fine / strides)` (MinkowskiEngine), or the `Sites` to compute.
      strides, padding, dilation: integers or one an axis; padding is `dilation * ((kernel_size - 1) // 2)` by default.
      capacity: rows of the output where sites are made; see `Sites.coarse` for the default.
      kernel_map: the map to use, for bodies of `jax.checkpoint`, `lax.scan` and `lax.cond`, where maps are not shared
        by themselves; `sites` must then be "submanifold" or a `Sites`.
      norm: a normalisation of channels, or any scale and shift of them.
      residual: tensor on the output sites with C_out features, cast to the dtype of `x`. Sites that differ are reported
        in `status`.
      activation: "relu", "leaky_relu" (slope 0.01), "gelu" (tanh's form), "silu" or None.
      precision: of float32 products, as jax spells it. The default is TF32 on GPUs (products are within 2^-9 of the
        exact ones); "high" and "highest" are exact, and so are CPUs.
      config: choice of kernel.
      implementation: "auto" for the platform's custom call, "xla" for plain JAX.

    Returns:
      Features `[N_out, C_out]` in the dtype of `x`, zero on padding rows.

    Raises:
      ValueError: where arguments do not fit each other.
    """
    check_implementation(implementation)
    check_tensor("conv", x)
    geometry = Geometry.create(x.dims, kernel_size, strides, padding, dilation)
    kernel, bias = _parameters("conv", x, kernel, bias, geometry)
    if not isinstance(sites, str | Sites):
        raise TypeError(
            f"conv: `sites` must be a Sites or the name of a rule, got {type(sites).__name__}; pass y.sites."
        )
    if capacity is not None and sites not in ("reachable", "floor"):
        raise ValueError(f"conv: `capacity` (={capacity}) is for sites that are made; the given ones have theirs.")
    if isinstance(sites, Sites):
        check_single("conv: `sites`", sites.coords)
        out_sites = sites
    elif sites == "submanifold":
        if set(geometry.stride) != {1}:
            raise ValueError(f'`strides` (={strides}) must be 1 for sites="submanifold"; use "reachable" or "floor".')
        out_sites = x.sites
        if geometry.is_pointwise and kernel_map is None:
            out_sites, end = _ending("conv", x, kernel, out_sites, bias, norm, residual, activation)
            if end[0].is_empty:
                return linear(x, kernel[0], precision=precision)
            return _bind_linear(x, out_sites, kernel[0], end, precision, config, implementation)
    elif kernel_map is not None:
        raise ValueError(f'`kernel_map` was given with sites={sites!r}; pass the output `Sites`, or "submanifold".')
    else:
        out_sites = x.sites.coarse(geometry, sites, capacity, implementation)
    kernel_map, problems = _checked_map("conv", kernel_map, geometry, x.sites, out_sites, implementation)
    if out_sites is not x.sites and isinstance(sites, Sites):
        problems = [x.sites.status, *problems]
    if problems:
        out_sites = out_sites.with_status(*problems)
    out_sites, end = _ending("conv", x, kernel, out_sites, bias, norm, residual, activation)
    options = (precision, config, implementation)
    return _bind("forward", x, out_sites, kernel, kernel_map, x.capacity, end, *options)


def conv_transpose(
    x: SparseTensor,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    like: SparseTensor | Sites,
    kernel_size: AxisInts,
    strides: AxisInts = 1,
    padding: AxisInts | None = None,
    dilation: AxisInts = 1,
    kernel_map: KernelMap | None = None,
    norm: ChannelNorm | None = None,
    residual: SparseTensor | None = None,
    activation: str | None = None,
    precision: lax.PrecisionLike = None,
    config: ConvConfig | None = None,
    implementation: str = "auto",
) -> SparseTensor:
    """Transposed sparse convolution onto given sites: `y[strides * m - padding + dilation * k] += x[m] @ kernel[k]`.

    The transpose of `conv` from the sites of `like` to those of `x`, and it uses that convolution's map; taps are not
    flipped. spconv calls it inverse convolution.

    Args:
      x: features `[N_coarse, C_in]` on the coarse grid.
      kernel: `[K, C_in, C_out]`.
      bias: `[C_out]` or None.
      like: tensor or sites of the fine grid to compute.
      kernel_size, strides, padding, dilation: those of the convolution that is transposed.
      kernel_map: its map, from fine to coarse sites; see `conv`.
      norm, residual, activation: what follows, see `conv`.
      precision, config, implementation: see `conv`.

    Returns:
      Features `[N_fine, C_out]` on the sites of `like`.

    Raises:
      ValueError: where arguments do not fit each other, the grids included.
    """
    check_implementation(implementation)
    check_tensor("conv_transpose", x)
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    fine = like.sites if isinstance(like, SparseTensor) else like
    if not isinstance(fine, Sites):
        raise ValueError(
            "conv_transpose: `like` must be the SparseTensor or Sites whose sites to compute, usually the input of the "
            f"strided layer, got {type(like).__name__}."
        )
    check_single("conv_transpose: `like`", fine.coords)
    geometry = Geometry.create(x.dims, kernel_size, strides, padding, dilation)
    kernel, bias = _parameters("conv_transpose", x, kernel, bias, geometry)
    kernel_map, problems = _checked_map("conv_transpose", kernel_map, geometry, fine, x.sites, implementation)
    out_sites = fine.with_status(x.sites.status, *problems)
    out_sites, end = _ending("conv_transpose", x, kernel, out_sites, bias, norm, residual, activation)
    swapped = jnp.swapaxes(kernel, 1, 2)
    options = (precision, config, implementation)
    return _bind("dgrad", x, out_sites, swapped, kernel_map, fine.capacity, end, *options)


def _bind(product, x, out_sites, kernel, kernel_map, in_rows, end, precision, config, implementation):
    m = kernel_map
    spec = primitives.Spec(
        x.dtype,
        canonical_precision(precision),
        in_rows,
        ConvConfig.of(config),
        m.is_symmetric,
        m.geometry.tap_groups,
        m.grid,
        m.geometry.stride,
    )
    arrays = (m.table, m.masks, m.in_counts, m.out_counts)
    params = {"spec": spec, "out_dtype": x.dtype, "implementation": implementation}
    ending, operands = end
    if ending.is_empty:
        return on_sites(out_sites, primitives.PRODUCTS[product](x.unmasked, kernel, *arrays, **params)[0])
    params |= {"product": product, "ending": ending}
    return _fused(x, out_sites, params, kernel, arrays, operands)


def _bind_linear(x, out_sites, kernel, end, precision, config, implementation):
    ending, operands = end
    options = {"dtype": x.dtype, "out_dtype": x.dtype, "precision": canonical_precision(precision)}
    params = options | {
        "product": "linear",
        "tile": ConvConfig.of(config).forward,
        "ending": ending,
        "implementation": implementation,
    }
    return _fused(x, out_sites, params, kernel, (x.sites.counts,), operands)


def _fused(x, out_sites, params, kernel, rows, operands):
    """Product and ending as one op. What its kernel leaves on padding rows is masked where somebody reads `feats`."""
    y = fused.fused(tuple(params.items()), fused.inputs(x), kernel, rows, operands)
    return on_sites(out_sites, jnp.where(out_sites.is_real[:, None], y, 0), (y,))


def _ending(op, x, kernel, sites, bias, norm, residual, activation) -> tuple[Sites, fused.Ended]:
    """The sites of the result, and what follows the product."""
    width = kernel.shape[2]
    check_activation(op, activation)
    if not isinstance(norm, ChannelNorm | None):
        raise TypeError(f"{op}: `norm` must be a ChannelNorm, got {type(norm).__name__}; a BatchNorm goes to a layer.")
    if norm is None:
        norm = ChannelNorm(bias=bias)
    else:
        names = fused.Ending.NAMES[:4]
        vectors = {f"norm.{name}": getattr(norm, name) for name in names}
        arrays = per_channel(op, width, "the output features", vectors)
        norm = dataclasses.replace(norm, **dict(zip(names, arrays, strict=True)))
        if bias is not None:
            wide = accumulation_dtype(x.dtype)
            mean = 0 if norm.mean is None else norm.mean.astype(wide)
            norm = dataclasses.replace(norm, mean=mean - bias.astype(wide))
    if residual is None:
        return sites, fused.Ending.of(norm, None, activation)
    sites = common_sites(op, (sites, residual))
    if residual.num_features != width:
        raise ValueError(f"{op}: `residual` has {residual.num_features} features, but the result has {width}.")
    return sites, fused.Ending.of(norm, residual.unmasked.astype(x.dtype), activation)


def _parameters(op: str, x: SparseTensor, kernel, bias, geometry: Geometry) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias as arrays that fit the input and the geometry."""
    kernel = jnp.asarray(kernel)
    check_weights(op, kernel)
    if kernel.ndim != 3 or kernel.shape[0] != geometry.volume:
        raise ValueError(
            f"{op}: `kernel` of shape {kernel.shape} must be [K, C_in, C_out] with K = {geometry.volume}, the taps of "
            f"kernel_size {geometry.kernel}."
        )
    if kernel.shape[1] != x.num_features:
        raise ValueError(
            f"{op}: `kernel` of shape {kernel.shape} has {kernel.shape[1]} input features, but x has {x.num_features} "
            f"(shape {x.feats.shape})."
        )
    return kernel, *per_channel(op, kernel.shape[2], "the output features", {"bias": bias})


def _checked_map(
    op: str, kernel_map: KernelMap | None, geometry: Geometry, fine: Sites, coarse: Sites, implementation: str
) -> tuple[KernelMap, list[jax.Array]]:
    """The map, built where none is given, and the statuses that report a given one with other numbers of real rows.

    Refuses one that cannot be of these sites.
    """
    if kernel_map is None:
        return map_between(fine, coarse, geometry, implementation), []
    if not isinstance(kernel_map, KernelMap):
        raise TypeError(f"{op}: `kernel_map` must be a KernelMap, got {type(kernel_map).__name__}.")
    m = kernel_map
    if (m.geometry, m.grid) != (geometry, fine.stride):
        raise ValueError(
            f"{op}: `kernel_map` is that of {m.geometry} on a grid with stride {m.grid}, but this convolution has "
            f"{geometry} on a grid with stride {fine.stride}."
        )
    found, expected = (m.in_rows, m.table.shape), (fine.capacity, (geometry.volume, coarse.capacity))
    if found != expected:
        raise ValueError(
            f"{op}: `kernel_map` leads from {m.in_rows} rows by a table of shape {m.table.shape}, but kernel_size "
            f"{geometry.kernel} from {fine.capacity} rows onto {coarse.capacity} needs {expected[1]}; build it from "
            "the sites of these tensors."
        )
    wrong = [(counts != sites.counts)[0] for counts, sites in ((m.in_counts, fine), (m.out_counts, coarse))]
    value = jnp.where(wrong[0], m.in_counts[0], m.out_counts[0])
    limit = jnp.where(wrong[0], fine.counts[0], coarse.counts[0])
    return kernel_map, [status.report(Problem.KERNEL_MAP, wrong[0] | wrong[1], value, limit)]
