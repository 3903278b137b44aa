"""Kernel maps: which input row lies under each tap of each output site."""

from __future__ import annotations

import dataclasses

import jax

from jaxsparse.geometry import AxisInts, Geometry
from jaxsparse.ops import _coords
from jaxsparse.sites import Sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KernelMap:
    """The pairs of a sparse convolution, in one canonical form on every platform.

    A pytree of arrays, so that it can be passed into `jax.checkpoint`, `lax.scan` and `lax.cond` bodies, where maps are
    not shared by themselves.

    Attributes:
      table: int32 `[K, N_out]`; `table[k, m]` is the input row under tap k of output m, -1 where there is none.
      masks: uint32 `[N_out, ceil(K / 32)]`; bit `k % 32` of word `k // 32` says whether tap k is there.
      in_counts: int32 `[1]`, real input rows.
      out_counts: int32 `[1]`, real output rows.
    """

    table: jax.Array
    masks: jax.Array
    in_counts: jax.Array
    out_counts: jax.Array


def kernel_map(
    in_sites: Sites,
    out_sites: Sites,
    kernel_size: AxisInts,
    strides: AxisInts = 1,
    padding: AxisInts | None = None,
    dilation: AxisInts = 1,
    *,
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
      implementation: "auto" for the custom call of the platform, "xla" for plain JAX.
    """
    for name, sites in (("in_sites", in_sites), ("out_sites", out_sites)):
        if not isinstance(sites, Sites):
            raise TypeError(f"`{name}` must be a Sites, got {type(sites).__name__}; pass x.sites of a tensor.")
    geometry = Geometry.create(in_sites.dims, kernel_size, strides, padding, dilation)
    return map_between(in_sites, out_sites, geometry, implementation)


def map_between(fine: Sites, coarse: Sites, geometry: Geometry, implementation: str = "auto") -> KernelMap:
    """`kernel_map` for a geometry that has been checked."""
    check_implementation(implementation)
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
            fine.coords, fine.counts, coarse.coords, coarse.counts, geometry=geometry, implementation=implementation
        )
        return KernelMap(table, masks, fine.counts, coarse.counts)

    return fine.memo(("map", geometry, coarse._memo, implementation), make)


def check_implementation(implementation: str) -> None:
    """Refuses a name that is no implementation."""
    if implementation not in ("auto", "xla"):
        raise ValueError(f'`implementation` (={implementation!r}) must be "auto" or "xla".')
