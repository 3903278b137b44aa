"""Sums over rows, channel by channel, and their adjoint: what batch normalisation is made of.

    moments(a, b, c) = sum_m b[m], sum_m (a[m] - c) b[m]        two [C], over the real rows m
    affine(x, s, t, c)[m] = (x[m] - c) s + t                    [N, C], 0 for the others

The centre c is a constant: it takes no derivative, and only keeps numbers small. Then each op is linear in each of its
other operands, `affine` in s and t together, and its transposes are the other one. So the sums of every derivative are
`moments`, whose custom call reads its operands once, where XLA's column sums take several times as long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsparse import _ffi
from jaxsparse._compat import ad, zero_tangent
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops import _workspace
from jaxsparse.ops.conv.reference import accumulation_dtype


def _real(x, counts):
    """The real rows in the dtype of sums, 0 in place of the others."""
    return jnp.where(real_rows(counts, x.shape[0])[:, None], x, 0).astype(accumulation_dtype(x.dtype))


def _moments_reference(a, b, center, counts):
    b = _real(b, counts)
    return [b.sum(0), ((_real(a, counts) - center[None]) * b).sum(0)]


def _statistics_reference(x, counts):
    real = real_rows(counts, x.shape[0])[:, None]
    wide = _real(x, counts)
    mean = wide.sum(0) / jnp.maximum(real.sum(), 1).astype(wide.dtype)
    # Around the mean, not E[x^2] - mean^2, which cancels where the mean is large.
    return [mean, jnp.where(real, (wide - mean[None]) ** 2, 0).sum(0)]


def _affine_reference(x, scale, shift, center, counts, *, out_dtype):
    real = real_rows(counts, x.shape[0])[:, None]
    y = (x.astype(scale.dtype) - center[None]) * scale[None] + shift[None]
    return [jnp.where(real, y, 0).astype(out_dtype)]


# Custom calls on CUDA alone, where plain JAX is slow.


def _moments_call(platform, a, b, center, counts):
    return _sums(b, counts, a, center) if platform == "cuda" else _moments_reference(a, b, center, counts)


def _statistics_call(platform, x, counts):
    return _sums(x, counts) if platform == "cuda" else _statistics_reference(x, counts)


def _sums(b, counts, *a_and_center):
    dtype, channels = accumulation_dtype(b.dtype), b.shape[1]
    sums = jax.ShapeDtypeStruct((channels,), dtype)
    workspace = _workspace.struct("cuda", _workspace.moments(channels, dtype.itemsize))
    return _ffi.call("jaxsparse_channel_moments_v1", [sums, sums, workspace], b, counts, *a_and_center)[:2]


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


def _moments_jvp(primals, tangents, **params):
    a, b, center, counts = primals
    a_dot, b_dot, *_ = tangents
    out = _moments(*primals, **params)
    sums = [zero_tangent(s) for s in out]
    if type(b_dot) is not ad.Zero:
        sums = _moments(a, b_dot, center, counts, **params)
    if type(a_dot) is not ad.Zero:
        product = _moments(a_dot, b, jnp.zeros_like(center), counts, **params)[1]
        sums = [sums[0], ad.add_tangents(sums[1], product)]
    return out, sums


def _moments_transpose(cotangents, a, b, center, counts, **params):
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (a, b, center, counts)]
    of_sum, of_product = (_instantiate(ct, center) for ct in cotangents)
    if ad.is_undefined_primal(b):
        return [None, _affine(a, of_product, of_sum, center, counts, out_dtype=b.aval.dtype, **params)[0], None, None]
    zero = jnp.zeros_like(center)
    return [_affine(b, of_product, zero, zero, counts, out_dtype=a.aval.dtype, **params)[0], None, None, None]


def _affine_jvp(primals, tangents, **params):
    x, scale, shift, center, counts = primals
    x_dot, scale_dot, shift_dot, *_ = tangents
    out = _affine(*primals, **params)
    tangent = zero_tangent(out[0])
    if type(x_dot) is not ad.Zero:
        zero = jnp.zeros_like(shift)
        tangent = _affine(x_dot, scale, zero, zero, counts, **params)[0]
    if type(scale_dot) is not ad.Zero or type(shift_dot) is not ad.Zero:
        dots = _instantiate(scale_dot, scale), _instantiate(shift_dot, shift)
        tangent = ad.add_tangents(tangent, _affine(x, *dots, center, counts, **params)[0])
    return out, [tangent]


def _affine_transpose(cotangents, x, scale, shift, center, counts, *, out_dtype, **params):
    (ct,) = cotangents
    operands = (x, scale, shift, center, counts)
    undefined = [ad.is_undefined_primal(o) for o in operands]
    if type(ct) is ad.Zero:
        return [ad.Zero(o.aval) if u else None for o, u in zip(operands, undefined, strict=True)]
    if undefined[0]:
        zero = jnp.zeros_like(scale)
        return [_affine(ct, scale, zero, zero, counts, out_dtype=x.aval.dtype, **params)[0], *[None] * 4]
    of_shift, of_scale = _moments(x, ct.astype(x.dtype), center, counts, **params)
    return [None, of_scale if undefined[1] else None, of_shift if undefined[2] else None, None, None]


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
    center = jax.lax.stop_gradient(mean)
    total, product = _moments(x, x_dot, center, counts, **params)
    rows = jnp.maximum(counts[0], 1).astype(mean.dtype)
    return [mean, squares], [total / rows, 2 * (product - (mean - center) * total)]


_statistics.set_jvp(_statistics_jvp)


def affine(x: jax.Array, scale: jax.Array, shift: jax.Array, center: jax.Array, counts: jax.Array) -> jax.Array:
    """`(x - center) * scale + shift` on real rows, 0 on the others, in the dtype of `x`.

    Args:
      x: `[N, C]`.
      scale, shift: `[C]`, float32 or wider.
      center: `[C]`, the same dtype; taken as constant.
      counts: int32 `[1]`, real rows.
    """
    return _affine(x, scale, shift, jax.lax.stop_gradient(center), counts, out_dtype=x.dtype)[0]
