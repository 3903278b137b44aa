"""Sums over rows, channel by channel, and their adjoint: what batch normalisation is made of.

    moments(a, b, c) = sum_m b[m], sum_m (a[m] - c) b[m]        two [C], over the real rows m
    affine(x, s, t, c)[m] = (x[m] - c) s + t                    [N, C], 0 for the others

The centre c is a constant: it takes no derivative, and only keeps numbers small. Then each op is linear in each of its
other operands, `affine` in s and t together, and its transposes are the other one. So the sums of every derivative are
`moments`, whose custom call reads its operands once, where XLA's column sums take several times as long.

Either may have a gate, another affine map: b, or the result, is 0 where that one is not positive. The gate takes no
derivative either. An affine map that is its own gate has a ReLU behind it, and all derivatives of that are gated sums
and maps: a backward pass writes no masked cotangents for the sums to read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsparse import _ffi, _workspace
from jaxsparse._compat import ad, zero_tangent
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op


def _real(x, counts):
    """The real rows in the dtype of sums, 0 in place of the others."""
    return jnp.where(real_rows(counts, x.shape[0])[:, None], x, 0).astype(accumulation_dtype(x.dtype))


def _gated(numbers, gate):
    """The numbers [N, C], 0 where the gate (g, scale, shift, centre), if there is one, is 0 or less."""
    if not gate:
        return numbers
    g, scale, shift, center = gate
    return jnp.where((g.astype(scale.dtype) - center[None]) * scale[None] + shift[None] <= 0, 0, numbers)


def _gate_of_moments(a, center, given):
    """A gate in full: where it is by `a` and its centre, `moments` is given its scale and shift alone."""
    return (a, *given, center) if len(given) == 2 else given


def _moments_reference(a, b, center, counts, *given):
    b = _real(_gated(b, _gate_of_moments(a, center, given)), counts)
    return [b.sum(0), ((_real(a, counts) - center[None]) * b).sum(0)]


def _statistics_reference(x, counts):
    real = real_rows(counts, x.shape[0])[:, None]
    wide = _real(x, counts)
    mean = wide.sum(0) / jnp.maximum(real.sum(), 1).astype(wide.dtype)
    # Around the mean, not E[x^2] - mean^2, which cancels where the mean is large.
    return [mean, jnp.where(real, (wide - mean[None]) ** 2, 0).sum(0)]


def _affine_reference(x, scale, shift, center, counts, *gate, out_dtype):
    real = real_rows(counts, x.shape[0])[:, None]
    y = _gated((x.astype(scale.dtype) - center[None]) * scale[None] + shift[None], gate)
    return [jnp.where(real, y, 0).astype(out_dtype)]


# Custom calls on CUDA alone, where plain JAX is slow.


def _moments_call(platform, a, b, center, counts, *given):
    if platform != "cuda":
        return _moments_reference(a, b, center, counts, *given)
    if len(given) == 4:  # the call has no room for a gate by another array
        b, given = _gated(b, given), ()
    return _sums(b, counts, a, center, *given)


def _statistics_call(platform, x, counts):
    return _sums(x, counts) if platform == "cuda" else _statistics_reference(x, counts)


def _sums(b, counts, *rest):
    sums = jax.ShapeDtypeStruct((b.shape[1],), accumulation_dtype(b.dtype))
    return _ffi.call("jaxsparse_channel_moments_v1", [sums, sums, workspace_struct(b)], b, counts, *rest)[:2]


def workspace_struct(x):
    """The workspace of a call that sums the channels of `x`."""
    return _workspace.struct("cuda", _workspace.channels(x.shape[1], accumulation_dtype(x.dtype).itemsize))


def _two_sums(x, *_, implementation):
    return [((x.shape[1],), accumulation_dtype(x.dtype))] * 2


_moments = Op("channel_moments", _two_sums, _moments_call, _moments_reference)
_statistics = Op("channel_statistics", _two_sums, _statistics_call, _statistics_reference)
_affine = Op(
    "channel_affine",
    lambda x, *_, out_dtype, implementation: [(x.shape, out_dtype)],
    None,  # XLA fuses it
    _affine_reference,
    is_elementwise=True,
)
for _op in (_moments, _statistics, _affine):
    _op.batch_as_reference()


# --- derivatives ---


def _instantiate(tangent, like):
    return jnp.zeros_like(like) if type(tangent) is ad.Zero else tangent


def _gated_moments(a, b, center, counts, gate, **params):
    is_own = bool(gate) and gate[0] is a and gate[3] is center
    return _moments(a, b, center, counts, *(gate[1:3] if is_own else gate), **params)


def _moments_jvp(primals, tangents, **params):
    a, b, center, counts, *given = primals
    a_dot, b_dot, *_ = tangents
    out = _moments(*primals, **params)
    sums = [zero_tangent(s) for s in out]
    if type(b_dot) is not ad.Zero:
        sums = _moments(a, b_dot, center, counts, *given, **params)
    if type(a_dot) is not ad.Zero:
        gate = _gate_of_moments(a, center, given)
        product = _gated_moments(a_dot, b, jnp.zeros_like(center), counts, gate, **params)[1]
        sums = [sums[0], ad.add_tangents(sums[1], product)]
    return out, sums


def _moments_transpose(cotangents, a, b, center, counts, *given, **params):
    operands = (a, b, center, counts, *given)
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    of_sum, of_product = (_instantiate(ct, center) for ct in cotangents)
    found = [None] * len(operands)
    if ad.is_undefined_primal(b):
        gate = _gate_of_moments(a, center, given)
        found[1] = _affine(a, of_product, of_sum, center, counts, *gate, out_dtype=b.aval.dtype, **params)[0]
    else:
        zero = jnp.zeros_like(center)
        found[0] = _affine(b, of_product, zero, zero, counts, *given, out_dtype=a.aval.dtype, **params)[0]
    return found


def _affine_jvp(primals, tangents, **params):
    x, scale, shift, center, counts, *gate = primals
    x_dot, scale_dot, shift_dot, *_ = tangents
    out = _affine(*primals, **params)
    tangent = zero_tangent(out[0])
    if type(x_dot) is not ad.Zero:
        zero = jnp.zeros_like(shift)
        tangent = _affine(x_dot, scale, zero, zero, counts, *gate, **params)[0]
    if type(scale_dot) is not ad.Zero or type(shift_dot) is not ad.Zero:
        dots = _instantiate(scale_dot, scale), _instantiate(shift_dot, shift)
        tangent = ad.add_tangents(tangent, _affine(x, *dots, center, counts, *gate, **params)[0])
    return out, [tangent]


def _affine_transpose(cotangents, x, scale, shift, center, counts, *gate, out_dtype, **params):
    (ct,) = cotangents
    operands = (x, scale, shift, center, counts, *gate)
    undefined = [ad.is_undefined_primal(o) for o in operands]
    if type(ct) is ad.Zero:
        return [ad.Zero(o.aval) if u else None for o, u in zip(operands, undefined, strict=True)]
    found = [None] * len(operands)
    if undefined[0]:
        zero = jnp.zeros_like(scale)
        found[0] = _affine(ct, scale, zero, zero, counts, *gate, out_dtype=x.aval.dtype, **params)[0]
        return found
    of_shift, of_scale = _gated_moments(x, ct.astype(x.dtype), center, counts, gate, **params)
    found[1:3] = of_scale if undefined[1] else None, of_shift if undefined[2] else None
    return found


_moments.set_linear(_moments_jvp, _moments_transpose)
_affine.set_linear(_affine_jvp, _affine_transpose)


def statistics(x: jax.Array, counts: jax.Array, *, implementation: str = "auto") -> list[jax.Array]:
    """Mean of each channel over the real rows, and the sum of squared differences from it; zeros without rows.

    Args:
      x: `[N, C]`.
      counts: int32 `[1]`, real rows.
      implementation: "auto" for the custom call, "xla" for plain JAX.

    Returns:
      Two `[C]`, float32 or wider.
    """
    return _statistics(x, counts, implementation=implementation)


def _statistics_jvp(primals, tangents, **params):
    (x, counts), (x_dot, _) = primals, tangents
    mean, squares = _statistics(x, counts, **params)
    if type(x_dot) is ad.Zero:
        return [mean, squares], [zero_tangent(mean), zero_tangent(squares)]
    return [mean, squares], statistics_tangents(x, x_dot, mean, counts, **params)


def rows_at_least_one(x, counts):
    """The number of real rows, at least 1, as sums are divided by it."""
    return jnp.clip(counts[0], 1, x.shape[0]).astype(accumulation_dtype(x.dtype))


def statistics_tangents(x, x_dot, mean, counts, **params):
    """Those of the mean of each channel and of the sum of squared differences from it."""
    center = jax.lax.stop_gradient(mean)
    total, product = _moments(x, x_dot, center, counts, **params)
    return [total / rows_at_least_one(x, counts), 2 * (product - (mean - center) * total)]


_statistics.set_jvp(_statistics_jvp)


def affine(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    center: jax.Array,
    counts: jax.Array,
    *,
    relu: bool = False,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """`(x - center) * scale + shift` on real rows, 0 on the others.

    Args:
      x: `[N, C]`.
      scale, shift: `[C]`, float32 or wider.
      center: `[C]`, the same dtype; taken as constant.
      counts: int32 `[1]`, real rows.
      relu: whether negative results become 0.
      dtype: of the result; that of `x` by default.
    """
    center = jax.lax.stop_gradient(center)
    gate = (x, scale, shift, center) if relu else ()
    return _affine(x, scale, shift, center, counts, *gate, out_dtype=jnp.dtype(dtype or x.dtype))[0]
