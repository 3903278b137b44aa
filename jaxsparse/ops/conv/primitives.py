"""The convolution as three bilinear primitives whose derivatives are each other.

    T(x, w, g) = sum over outputs m and taps k of  g[m] . x[table[k, m]] . w[k]

    forward(x, w)[m]    = sum_k x[table[k, m]] @ w[k]          [N_out, C_out]
    dgrad(g, w)[n]      = sum_k g[m] @ w[k].T, table[k, m] = n  [N_in, C_in]
    wgrad(x, g)[k]      = sum_m outer(x[table[k, m]], g[m])     [K, C_in, C_out]

Each is linear in both float operands and its transposes are the other two, so forward mode, reverse mode and every
order follow from two short rules.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _ffi, _native, _workspace
from jaxsparse._compat import batching
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.conv import choices, reference
from jaxsparse.ops.conv.choices import Problem
from jaxsparse.ops.conv.config import PLAIN_TILE_ROWS, ConvConfig
from jaxsparse.tuning import cost
from jaxsparse.tuning.choice import answer


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the three products of one convolution have in common.

    Attributes:
      dtype: operands are cast to it and multiplied in it. Sums are float32 or wider.
      precision: of float32 products, as jax spells it; see `is_exact`.
      in_rows: rows of the input, N_in.
      config: choice of kernel.
      is_symmetric: whether the map is its own reverse, see `KernelMap`.
      tap_groups: groups of taps by which rows are sorted, `Geometry.tap_groups`; changes speed alone.
      grid, strides: of the map's fine grid, and of the coarse one in its cells; by which kernels are chosen.
    """

    dtype: jnp.dtype
    precision: lax.Precision
    in_rows: int
    config: ConvConfig
    is_symmetric: bool
    tap_groups: tuple[tuple[int, ...], ...] = ()
    grid: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    def attributes(self, tile_rows: int | None = None) -> dict[str, int]:
        """Attributes of the custom calls for CPUs and for float64. Some ignore `tile_rows`, but all take it."""
        return {"tile_rows": tile_rows or self.config.tile_rows or PLAIN_TILE_ROWS[0]}

    def dtype_name(self, platform: str) -> str:
        """Of the products, as the keys of tuning name it."""
        dtype, _ = self.call_dtypes(platform, self.dtype)
        if dtype.itemsize == 2:
            return "float16"
        return "tf32" if platform == "cuda" and dtype == jnp.float32 and not self.is_exact else dtype.name

    def call_dtypes(self, platform: str, out_dtype) -> tuple[jnp.dtype, jnp.dtype]:
        """Dtypes of the custom call's operands and result. The CPU's take float32 or float64 only."""
        accumulation = accumulation_dtype(self.dtype)
        if platform == "cpu":
            return accumulation, accumulation
        return self.dtype, self.dtype if out_dtype == self.dtype else accumulation

    def uses_gemm(self, platform: str) -> bool:
        """Whether the kernels of `cuda/conv/gemm.h` serve."""
        return platform == "cuda" and self.dtype != jnp.float64

    @property
    def is_exact(self) -> bool:
        """Whether float32 operands are multiplied in full: the default precision is TF32 in `cuda/conv/gemm.h`."""
        return self.dtype == jnp.float32 and self.precision != lax.Precision.DEFAULT


# All three primitives take two of (x, w, g), in that order, and then the map: table, masks, in_counts, out_counts.
#
# `ended` is for the kernel that also computes what follows the product. It is what `fused._as_call` makes: attributes,
# operands, and the second input where x is one of two.


def forward_call(platform, x, w, table, masks, in_counts, out_counts, *, spec, out_dtype, ended=None):
    """The custom calls of `forward`."""
    tile = spec.config.forward
    return _rows_call(platform, x, w, table, masks, out_counts, spec, out_dtype, tile, ended, of_reverse=False)


def dgrad_call(platform, g, w, table, masks, in_counts, out_counts, *, spec, out_dtype, ended=None):
    """The custom calls of `dgrad`: forward over the reversed map with transposed weights."""
    tile = spec.config.dgrad
    if spec.is_symmetric:
        w = jnp.swapaxes(w[::-1], 1, 2)
        return _rows_call(platform, g, w, table, masks, in_counts, spec, out_dtype, tile, ended, of_reverse=False)
    taps, rows = table.shape[0], spec.in_rows
    structs = [jax.ShapeDtypeStruct((taps, rows), jnp.int32), jax.ShapeDtypeStruct((rows, masks.shape[1]), jnp.uint32)]
    reverse, reverse_masks = _ffi.call("jaxsparse_reverse_table_v1", structs, table, out_counts)
    w = jnp.swapaxes(w, 1, 2)
    return _rows_call(platform, g, w, reverse, reverse_masks, in_counts, spec, out_dtype, tile, ended, of_reverse=True)


def _rows_call(platform, x, w, table, masks, counts, spec, out_dtype, tile, ended, *, of_reverse):
    """`y[m] = sum_k x[table[k, m]] @ w[k]` on the kernels that serve the dtype."""
    taps, c_in, c_out = w.shape
    rows = table.shape[1]
    operand, result = spec.call_dtypes(platform, out_dtype)
    x, w = (a.astype(spec.dtype).astype(operand) for a in (x, w))
    problem = Problem(spec, x.shape[0], rows, taps, c_in, c_out, of_reverse)
    if not spec.uses_gemm(platform):
        struct = jax.ShapeDtypeStruct((rows, c_out), result)
        own = answer(choices.conv(platform, problem), spec.config.tile_rows).choice if platform == "cpu" else None
        operands = (x, w, table, masks, counts)
        (y,) = _ffi.call("jaxsparse_conv_forward_v1", [struct], *operands, **spec.attributes(own))
        return [y.astype(out_dtype)]
    widths = problem.widths(platform)
    if x.shape[1] == c_in:  # else x is the first of two inputs, which have widths that need no padding
        x = _padded(x, widths[0])
    w = _padded(w, *widths)
    struct = jax.ShapeDtypeStruct((rows, widths[1]), result)
    sort = answer(choices.sort(platform, problem), spec.config.sort).choice
    schedule = _schedule(table, masks, counts, spec.tap_groups if sort else ())
    tile = answer(choices.conv(platform, problem), tile).choice
    if ended is not None:
        attributes, operands, others = ended
        attributes = attributes | tile_attributes(tile)
        operands = [*(_padded(a, widths[1]) for a in operands), *others]
        (y,) = _ffi.call("jaxsparse_conv_fused_v1", [struct], x, w, *schedule, counts, *operands, **attributes)
        return [y[:, :c_out]]
    if spec.dtype == jnp.float32:
        w = jnp.swapaxes(w if spec.is_exact else _to_tf32(w), 1, 2)
    (y,) = _ffi.call(
        "jaxsparse_conv_gemm_v1", [struct], x, w, *schedule, **tile_attributes(tile), exact=int(spec.is_exact)
    )
    return [y[:, :c_out].astype(out_dtype)]


def _padded(a, *channels):
    """With zeros, which change no sum, up to so many channels on the last axes."""
    if a.shape[-len(channels) :] == channels:
        return a
    sizes = (*a.shape[: -len(channels)], *channels)
    return lax.pad(a, jnp.zeros((), a.dtype), [(0, to - n, 0) for n, to in zip(a.shape, sizes, strict=True)])


def _schedule(table, masks, counts, tap_groups):
    """The order of rows and the map in that order: equal calls are one, for all layers that share a map."""
    (taps, rows), words = table.shape, masks.shape[1]
    if words > _native.most_group_words:
        tap_groups = ()
    groups = [sum(1 << k % 32 for k in group if k // 32 == word) for group in tap_groups for word in range(words)]
    tile_rows = _native.schedule_rows
    tiles = -(-rows // tile_rows)
    structs = [
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((tiles, words), jnp.uint32),
        jax.ShapeDtypeStruct((tiles, taps, tile_rows), jnp.int32),
        _workspace.struct("cuda", _workspace.conv_schedule(rows)),
    ]
    return _ffi.call("jaxsparse_conv_schedule_v1", structs, table, masks, counts, groups=groups)[:3]


def _to_tf32(w):
    """Rounds to the nearest TF32 number: tensor cores would cut the last bits off. XLA does it while it transposes."""
    return lax.reduce_precision(w, exponent_bits=8, mantissa_bits=10)


def tile_attributes(tile) -> dict[str, int]:
    """A tile as the custom calls of scheduled kernels take it."""
    return {"tile_rows": tile.rows, "tile_cols": tile.cols, "stages": tile.stages, "splits": tile.splits}


def _wgrad_call(platform, x, g, table, masks, in_counts, out_counts, *, spec, out_dtype):
    operand, result = spec.call_dtypes(platform, out_dtype)
    x, g = (a.astype(spec.dtype).astype(operand) for a in (x, g))
    (taps, rows), c_in, c_out = table.shape, x.shape[1], g.shape[1]
    if spec.uses_gemm(platform):
        problem = Problem(spec, x.shape[0], rows, taps, c_in, c_out)
        tile = answer(choices.wgrad(platform, problem), spec.config.wgrad).choice
        widths = problem.widths(platform)
        x, g = (_padded(a, width) for a, width in zip((x, g), widths, strict=True))
        struct = jax.ShapeDtypeStruct((taps, *widths), result)
        dw = _wgrad_gemm(x, g, table, masks, out_counts, struct, spec, tile)
        return [dw[:, :c_in, :c_out].astype(out_dtype)]
    struct = jax.ShapeDtypeStruct((taps, c_in, c_out), result)
    workspace = _workspace.struct(platform, _workspace.conv_wgrad(taps, c_in, c_out, rows))
    operands = (x, g, table, masks, out_counts)
    dw, _ = _ffi.call("jaxsparse_conv_wgrad_v1", [struct, workspace], *operands, **spec.attributes())
    return [dw.astype(out_dtype)]


def _wgrad_gemm(x, g, table, masks, out_counts, struct, spec, tile):
    taps, c_in, c_out = struct.shape
    rows = table.shape[1]
    listed = (taps + 1) // 2 if spec.is_symmetric else taps  # the pairs of the others are those of their opposites
    structs = [
        jax.ShapeDtypeStruct((listed, rows, 2), jnp.int32),
        jax.ShapeDtypeStruct((taps,), jnp.int32),
        _workspace.struct("cuda", _workspace.conv_pairs(listed, rows)),
    ]
    pairs, tap_pairs, _ = _ffi.call("jaxsparse_conv_pairs_v1", structs, table, masks, out_counts)
    slots = cost.wgrad_slots(taps, c_in, c_out)
    results = [struct, _workspace.struct("cuda", _workspace.wgrad_gemm(slots, c_in, c_out))]
    attributes = tile_attributes(tile) | {"exact": int(spec.is_exact), "slots": slots}
    return _ffi.call("jaxsparse_wgrad_gemm_v1", results, x, g, pairs, tap_pairs, **attributes)[0]


def _real_entries(table, out_counts, in_rows):
    """The table with -1 in the columns that may hold anything, and where an entry is no input row."""
    return jnp.where(real_rows(out_counts, table.shape[1])[None] & (table < in_rows), table, -1)


def forward_reference(x, w, table, masks, in_counts, out_counts, *, spec, out_dtype):
    """`forward` in plain JAX."""
    table = _real_entries(table, out_counts, x.shape[0])
    y = reference.forward(x.astype(spec.dtype), w.astype(spec.dtype), table, precision=spec.precision)
    return [y.astype(out_dtype)]


def dgrad_reference(g, w, table, masks, in_counts, out_counts, *, spec, out_dtype):
    """`dgrad` in plain JAX."""
    reverse = reference.reverse(_real_entries(table, out_counts, spec.in_rows), spec.in_rows)
    w = jnp.swapaxes(w, 1, 2)
    return forward_reference(g, w, reverse, None, out_counts, in_counts, spec=spec, out_dtype=out_dtype)


def _wgrad_reference(x, g, table, masks, in_counts, out_counts, *, spec, out_dtype):
    table = _real_entries(table, out_counts, x.shape[0])
    dw = reference.wgrad(x.astype(spec.dtype), g.astype(spec.dtype), table, precision=spec.precision)
    return [dw.astype(out_dtype)]


forward = Op(
    "sparse_conv_forward",
    lambda x, w, table, *_, spec, out_dtype, implementation: [((table.shape[1], w.shape[2]), out_dtype)],
    forward_call,
    forward_reference,
)
dgrad = Op(
    "sparse_conv_dgrad",
    lambda g, w, *_, spec, out_dtype, implementation: [((spec.in_rows, w.shape[1]), out_dtype)],
    dgrad_call,
    dgrad_reference,
)
wgrad = Op(
    "sparse_conv_wgrad",
    lambda x, g, table, *_, spec, out_dtype, implementation: [((table.shape[0], x.shape[1], g.shape[1]), out_dtype)],
    _wgrad_call,
    _wgrad_reference,
)
PRODUCTS = {"forward": forward, "dgrad": dgrad, "wgrad": wgrad}


# --- derivatives ---


forward.set_bilinear(
    lambda ct, w, *rest, **params: dgrad(ct, w, *rest, **params)[0],
    lambda ct, x, *rest, **params: wgrad(x, ct, *rest, **params)[0],
)
dgrad.set_bilinear(
    lambda ct, w, *rest, **params: forward(ct, w, *rest, **params)[0],
    lambda ct, g, *rest, **params: wgrad(ct, g, *rest, **params)[0],
)
wgrad.set_bilinear(
    lambda ct, g, *rest, **params: dgrad(g, ct, *rest, **params)[0],
    lambda ct, x, *rest, **params: forward(x, ct, *rest, **params)[0],
)


# --- batching ---


def fold_scenes(op: Op):
    """`vmap` over scenes with shared weights: the scenes' rows one after another, in one call.

    Operands after the map have rows, or are numbers of channels, which are shared as weights are.
    """

    def rule(operands, dims, *, spec, **params):
        size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
        shared = [
            i == 1 or (i > 5 and x.ndim - (d is not None) == 1)
            for i, (x, d) in enumerate(zip(operands, dims, strict=True))
        ]
        if any(s and d is not None for s, d in zip(shared, dims, strict=True)):
            return op.loop_over_batch(operands, dims, spec=spec, **params)
        stacked = [
            x if s else batching.bdim_at_front(x, d, size) for x, d, s in zip(operands, dims, shared, strict=True)
        ]
        taps, out_rows = stacked[2].shape[1:]
        if size * max(spec.in_rows, out_rows) > 2**30:  # what handlers take
            return op.loop_over_batch(operands, dims, spec=spec, **params)
        flat = [x if s else x.reshape(-1, *x.shape[2:]) for x, s in zip(stacked, shared, strict=True)]
        offset = spec.in_rows * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        is_row = (stacked[2] >= 0) & (stacked[2] < spec.in_rows)  # others would be rows of the next scene
        table = jnp.where(is_row, stacked[2] + offset, -1)
        flat[2] = table.swapaxes(0, 1).reshape(taps, size * out_rows)
        folded = dataclasses.replace(spec, in_rows=size * spec.in_rows)
        (out,) = op(*flat, spec=folded, **params)
        return [out.reshape(size, -1, out.shape[1])], [0]

    return rule


forward.set_batching(fold_scenes(forward))
dgrad.set_batching(fold_scenes(dgrad))
