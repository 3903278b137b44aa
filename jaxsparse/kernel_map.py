"""Kernel maps: which input row lies under each tap of each output site."""

from __future__ import annotations

import dataclasses

import jax

from jaxsparse import _coords
from jaxsparse._primitive import check_implementation
from jaxsparse.geometry import AxisInts, Geometry
from jaxsparse.sites import Sites, check_single


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KernelMap:
    """The pairs of a sparse convolution, in one canonical form on every platform.

    A pytree of arrays, so that it can be passed into `jax.checkpoint`, `lax.scan` and `lax.cond` bodies, where maps are
    not shared by themselves.

    Attributes:
      table: int32 `[K, N_out]`; `table[k, m]` is the input row under tap k of output m, -1 where there is none. On the
        CPU every entry outside the input rows counts as absent; on GPUs none but -1 may occur, since the tensor-core
        kernels do not check them.
      masks: uint32 `[N_out, ceil(K / 32)]`; bit `k % 32` of word `k // 32` says whether tap k is there.
      in_counts: int32 `[1]`, real input rows.
      out_counts: int32 `[1]`, real output rows. Columns of the table and rows of the masks from there on hold anything.
      in_rows: capacity of the input sites; entries of the table lie below it.
      geometry: of the convolution.
      grid: stride of the fine grid.
      is_symmetric: whether `table[k, m] = n` means `table[K - 1 - k, n] = m`, as in a submanifold convolution of odd
        kernel size: the map is then its own reverse.
    """

    table: jax.Array
    masks: jax.Array
    in_counts: jax.Array
    out_counts: jax.Array
    in_rows: int = dataclasses.field(metadata={"static": True})
    geometry: Geometry = dataclasses.field(metadata={"static": True})
    grid: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_symmetric: bool = dataclasses.field(default=False, metadata={"static": True})


def kernel_map(
    in_sites: Sites,
    out_sites: Sites,
    kernel_size: AxisInts,
    strides: AxisInts = 1,
    padding: AxisInts | None = None,
    dilation: AxisInts = 1,
    *,
    builder: str = "auto",
    implementation: str = "auto",
) -> KernelMap:
    """The map of a convolution from `in_sites` (the fine grid) to `out_sites` (the coarse grid).

    `table[k, m]` is the row of `in_sites` at `strides * out - padding + dilation * tap_k`. The same map serves the
    transposed convolution from `out_sites` to `in_sites`. Maps are kept on `in_sites`: asking twice builds once.

    Args:
      in_sites: sites of the convolution's input.
      out_sites: sites of its output; the same object for a submanifold convolution.
      kernel_size, strides, padding, dilation: integers, or one an axis. Padding is `dilation * ((kernel - 1) // 2)`
        by default.
      builder: how the custom call finds input rows; every builder gives the same map. "hash" looks every tap up in a
        hash map of sites. "blocks" looks up the blocks of 64 sites under each window, whose masks answer for all their
        taps; it needs input sites in Morton order, and at most 27 blocks under a window. "auto" lets
        `jaxsparse.tuning` choose among those that serve.
      implementation: "auto" for the custom call of the platform, "xla" for plain JAX, which has no builders.

    Raises:
      ValueError: where the grids do not fit each other, or the builder not the sites.
    """
    for name, sites in (("in_sites", in_sites), ("out_sites", out_sites)):
        if not isinstance(sites, Sites):
            raise TypeError(f"`{name}` must be a Sites, got {type(sites).__name__}; pass x.sites of a tensor.")
        check_single(f"`{name}`", sites.coords)
    geometry = Geometry.create(in_sites.dims, kernel_size, strides, padding, dilation)
    return map_between(in_sites, out_sites, geometry, implementation, builder)


def map_between(
    fine: Sites, coarse: Sites, geometry: Geometry, implementation: str = "auto", builder: str = "auto"
) -> KernelMap:
    """`kernel_map` for a geometry that has been checked."""
    check_implementation(implementation)
    builder = _chosen_builder(builder, geometry, fine)
    if fine.dims != coarse.dims:
        raise ValueError(f"the fine sites have {fine.dims} spatial axes but the coarse sites have {coarse.dims}.")
    expected = tuple(f * s for f, s in zip(fine.stride, geometry.stride, strict=True))
    if coarse.stride != expected:
        raise ValueError(
            f"`strides` (={geometry.stride}) take the grid with stride {fine.stride} to {expected}, but the coarse "
            f"sites are on the grid with stride {coarse.stride}."
        )

    def make() -> KernelMap:
        table, masks = _coords.kernel_map(
            fine.coords,
            fine.counts,
            coarse.coords,
            coarse.counts,
            *fine.index,
            geometry=geometry,
            builder=builder,
            grid=fine.stride,
            implementation=implementation,
        )
        is_symmetric = fine.same_as(coarse) and geometry.is_symmetric
        return KernelMap(
            table,
            masks,
            fine.counts,
            coarse.counts,
            fine.capacity,
            geometry,
            fine.stride,
            is_symmetric,
        )

    return fine.memo(("map", geometry, implementation, builder), make, partner=coarse)


def _chosen_builder(builder: str, geometry: Geometry, fine: Sites) -> str:
    possible = geometry.builders if fine.order == "morton" else ("hash",)
    if builder == "auto":
        return "auto" if len(possible) > 1 else possible[0]
    if builder not in _coords.BUILDERS:
        raise ValueError(f"`builder` (={builder!r}) must be one of {('auto', *_coords.BUILDERS)}.")
    if builder not in possible:
        raise ValueError(
            f"`builder` (={builder!r}) cannot serve kernel_size {geometry.kernel}, strides {geometry.stride}, padding "
            f"{geometry.padding}, dilation {geometry.dilation} on input sites in order {fine.order!r}; take one of "
            f"{('auto', *possible)}. Sites made by jaxsparse.voxelize are in Morton order."
        )
    return builder
