"""Batch norm by the batch's own statistics as one op, with the two linear ops that are its derivatives.

    normalize(x, s, t)           (x - mean) factor + t + residual, mean, variance, inverse, factor, t
    normalize_tangent(x, s, t)   factor (x - <x> - z <z x>) + z s + t
    normalize_cotangent(y)       factor (y - <y> - z <z y>), sum(z y), sum(y)

Here < > is the mean over real rows, inverse = 1 / sqrt(variance + epsilon), factor = inverse s, and z = (x - mean)
inverse where the first op was taken. On CUDA the first and the last are one kernel each, which reads its arrays once
where they fit its shared memory; all else is made of the sums and maps of `jaxsparse.ops.channels`.

The last two are each other's transposes, and what they are taken at is an operand like any other: their derivatives by
it are those of the formulas below, so that every mode and order goes through. With `relu` the first is 0 where it is
negative, the second then too, and the third counts cotangents there as 0; neither needs the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _ffi
from jaxsparse._compat import DropVar, ad, set_remat, zero_tangent
from jaxsparse._dtypes import accumulation_dtype
from jaxsparse._keys import real_rows
from jaxsparse._primitive import Op
from jaxsparse.ops.channels import (
    _affine,
    _gated_moments,
    _instantiate,
    _moments,
    _statistics,
    rows_at_least_one,
    statistics_tangents,
    workspace_struct,
)
from jaxsparse.ops.elementwise import _where_positive


def _normalize_formula(x, scale, bias, counts, *residual, epsilon, relu, implementation="xla"):
    mean, squares = _statistics(x, counts, implementation=implementation)
    variance = squares / rows_at_least_one(x, counts)
    inverse = lax.rsqrt(variance + epsilon)
    factor, shift = inverse * scale.astype(mean.dtype), bias.astype(mean.dtype)
    run = {"relu": relu, "implementation": implementation}
    return [*_apply_formula(x, mean, factor, shift, counts, *residual, **run), mean, variance, inverse, factor, shift]


def _apply_formula(x, mean, factor, shift, counts, *residual, relu, implementation="xla"):
    center = lax.stop_gradient(mean)
    out = {"out_dtype": mean.dtype, "implementation": implementation}
    (y,) = _affine(x, factor, shift + (center - mean) * factor, center, counts, **out)
    if residual:
        y = jnp.where(real_rows(counts, x.shape[0])[:, None], y + residual[0].astype(y.dtype), 0)
    if relu:
        y = jnp.where(y <= 0, 0, y)
    return [y.astype(x.dtype)]


def _around(x, mean, factor, shift, relu):
    """A constant of the mean's value, what the mean is less than it, and the gate of `relu`."""
    center = lax.stop_gradient(mean)
    return center, center - mean, (x, factor, shift, center) if relu else ()


def _tangent_formula(
    x_dot, scale_dot, bias_dot, x, mean, inverse, factor, shift, counts, *, relu, implementation="xla"
):
    center, gap, gate = _around(x, mean, factor, shift, relu)
    run = {"implementation": implementation}
    out, zero = {"out_dtype": mean.dtype, **run}, jnp.zeros_like(mean)
    total, product = _moments(x, x_dot, center, counts, **run)
    product, rows = product + gap * total, rows_at_least_one(x, counts)
    slope = inverse * scale_dot.astype(mean.dtype) - factor * inverse**2 * product / rows
    offset = bias_dot.astype(mean.dtype) - factor * total / rows + gap * slope
    (moved,) = _affine(x_dot, factor, zero, zero, counts, *gate, **out)
    (rest,) = _affine(x, slope, offset, center, counts, *gate, **out)
    return [(moved + rest).astype(x.dtype)]


def _cotangent_formula(ct, x, mean, inverse, factor, shift, counts, *, relu, dtype, implementation="xla"):
    center, gap, gate = _around(x, mean, factor, shift, relu)
    run = {"implementation": implementation}
    out, zero = {"out_dtype": mean.dtype, **run}, jnp.zeros_like(mean)
    total, product = _gated_moments(x, ct, center, counts, gate, **run)
    product, rows = product + gap * total, rows_at_least_one(x, counts)
    slope = -factor * inverse**2 * product / rows
    (moved,) = _affine(ct, factor, zero, zero, counts, *gate, **out)
    (rest,) = _affine(x, slope, gap * slope - factor * total / rows, center, counts, **out)
    return [(moved + rest).astype(x.dtype), (inverse * product).astype(dtype), total.astype(dtype)]


def _struct(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _normalize_call(platform, x, scale, bias, counts, *residual, epsilon, relu):
    if platform != "cuda":
        return _normalize_formula(x, scale, bias, counts, *residual, epsilon=epsilon, relu=relu)
    results = [_struct(x), *[_struct(scale, accumulation_dtype(x.dtype))] * 5, workspace_struct(x)]
    options = {"epsilon": float(epsilon), "relu": int(relu)}
    return _ffi.call("jaxsparse_batch_norm_v1", results, x, counts, scale, bias, *residual, **options)[:6]


def _tangent_call(platform, *operands, relu):
    return _tangent_formula(*operands, relu=relu, implementation="auto" if platform == "cuda" else "xla")


def _cotangent_call(platform, ct, x, mean, *rest, relu, dtype):
    operands = ct, x, mean, *rest
    if platform != "cuda":
        return _cotangent_formula(*operands, relu=relu, dtype=dtype)
    results = [_struct(x), *[_struct(mean, dtype)] * 2, workspace_struct(x)]
    return _ffi.call("jaxsparse_batch_norm_grad_v1", results, *operands, relu=int(relu))[:3]


_normalize = Op(
    "normalize",
    lambda x, scale, *_, **__: [(x.shape, x.dtype), *[(scale.shape, accumulation_dtype(x.dtype))] * 5],
    _normalize_call,
    _normalize_formula,
    is_elementwise=True,
)
_tangent = Op(
    "normalize_tangent",
    lambda x_dot, *_, **__: [(x_dot.shape, x_dot.dtype)],
    _tangent_call,
    _tangent_formula,
    is_elementwise=True,
)
_cotangent = Op(
    "normalize_cotangent",
    lambda ct, x, mean, *_, dtype, **__: [(ct.shape, ct.dtype), *[(mean.shape, dtype)] * 2],
    _cotangent_call,
    _cotangent_formula,
    is_elementwise=True,
)
# The first result alone, where the statistics are known.
_apply = Op("normalize_again", lambda x, *_, **__: [(x.shape, x.dtype)], None, _apply_formula, is_elementwise=True)
for _op in (_normalize, _tangent, _cotangent, _apply):
    _op.batch_as_reference()


def _normalize_jvp(primals, tangents, *, epsilon, relu, implementation):
    x, scale, bias, counts, *residual = primals
    x_dot, scale_dot, bias_dot, _, *residual_dot = tangents
    run = {"implementation": implementation}
    out = _normalize(*primals, epsilon=epsilon, relu=relu, **run)
    y, mean, _, inverse, factor, shift = out
    dots = [zero_tangent(v) for v in out]
    if type(x_dot) is not ad.Zero:
        mean_dot, squares_dot = statistics_tangents(x, x_dot, mean, counts, **run)
        variance_dot = squares_dot / rows_at_least_one(x, counts)
        inverse_dot = -0.5 * inverse**3 * variance_dot
        dots[1:5] = mean_dot, variance_dot, inverse_dot, inverse_dot * scale.astype(mean.dtype)
    if type(scale_dot) is not ad.Zero:
        dots[4] = ad.add_tangents(dots[4], inverse * scale_dot.astype(mean.dtype))
    if type(bias_dot) is not ad.Zero:
        dots[5] = bias_dot.astype(mean.dtype)
    own = (x_dot, x), (scale_dot, scale), (bias_dot, bias)
    if any(type(dot) is not ad.Zero for dot, _ in own):
        moving = [_instantiate(*pair) for pair in own]
        gated = relu and not residual
        dots[:1] = _tangent(*moving, x, mean, inverse, factor, shift, counts, relu=gated, **run)
    if residual and type(residual_dot[0]) is not ad.Zero:
        dots[0] = ad.add_tangents(dots[0], residual_dot[0])
        if not relu:
            dots[0] = jnp.where(real_rows(counts, x.shape[0])[:, None], dots[0], 0)
    if residual and relu and type(dots[0]) is not ad.Zero:
        (dots[0],) = _where_positive(dots[0], y, **run)  # 0 on padding rows as the result is
    return out, dots


def _jvp_of_linear(op, formula, number):
    """The rule of an op that is linear in its first operands, this number, and given by a formula in the others."""

    def jvp(primals, tangents, **params):
        out = op(*primals, **params)
        dots = [zero_tangent(v) for v in out]
        if any(type(t) is not ad.Zero for t in tangents[:number]):
            first = [_instantiate(t, v) for t, v in zip(tangents[:number], primals, strict=False)]
            dots = op(*first, *primals[number:], **params)
        moving = {i: t for i, t in enumerate(tangents) if i >= number and type(t) is not ad.Zero}
        moving = {i: t for i, t in moving.items() if jnp.issubdtype(primals[i].dtype, jnp.floating)}
        if moving:
            at = {i: primals[i] for i in moving}
            _, more = jax.jvp(
                lambda at: formula(*[at.get(i, v) for i, v in enumerate(primals)], **params), (at,), (moving,)
            )
            dots = [ad.add_tangents(a, b) for a, b in zip(dots, more, strict=True)]
        return out, dots

    return jvp


def _tangent_transpose(cotangents, x_dot, scale_dot, bias_dot, *at, **params):
    (ct,) = cotangents
    undefined = [ad.is_undefined_primal(o) for o in (x_dot, scale_dot, bias_dot)]
    avals = [o.aval if u else o for o, u in zip((x_dot, scale_dot, bias_dot), undefined, strict=True)]
    if type(ct) is ad.Zero:
        found = [ad.Zero(aval) if u else None for aval, u in zip(avals, undefined, strict=True)]
    else:
        found = _cotangent(ct, *at, dtype=avals[1].dtype, **params)
    return [f if u else None for f, u in zip(found, undefined, strict=True)] + [None] * len(at)


def _cotangent_transpose(cotangents, ct, x, mean, *at, dtype, **params):
    found, vector = ad.Zero(ct.aval), mean.astype(dtype)
    if any(type(c) is not ad.Zero for c in cotangents):
        given = [_instantiate(c, v) for c, v in zip(cotangents, (x, vector, vector), strict=True)]
        (found,) = _tangent(*given, x, mean, *at, **params)
    return [found, *[None] * (2 + len(at))]


def _again(eqn):
    """What a rematerialised backward pass has in place of the op: it keeps the statistics and leaves the sums out."""
    x, _, _, counts, *residual = eqn.invars
    y, mean, _, _, factor, shift = eqn.outvars
    if any(isinstance(v, DropVar) for v in (mean, factor, shift)):
        return None
    params = {name: value for name, value in eqn.params.items() if name != "epsilon"}
    operands = [x, mean, factor, shift, counts, *residual]
    return eqn.replace(invars=operands, outvars=[y], primitive=_apply.primitive, params=params)


_normalize.set_jvp(_normalize_jvp)
set_remat(_normalize.primitive, _again)
_apply.set_jvp(_jvp_of_linear(_apply, _apply_formula, 0))
_tangent.set_linear(_jvp_of_linear(_tangent, _tangent_formula, 3), _tangent_transpose)
_cotangent.set_linear(_jvp_of_linear(_cotangent, _cotangent_formula, 1), _cotangent_transpose)


def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    counts: jax.Array,
    residual: jax.Array | None = None,
    *,
    epsilon: float,
    relu: bool = False,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias + residual` over the real rows, 0 on the others.

    Args:
      x: `[N, C]`.
      scale, bias: `[C]`, both of one dtype.
      counts: int32 `[1]`, real rows.
      residual: `[N, C]` in the dtype of `x`, or None.
      epsilon: added to the variance.
      relu: whether negative results become 0.
      implementation: "auto" for the custom calls, "xla" for plain JAX.

    Returns:
      The result in the dtype of `x`, computed in float32 or wider; mean and biased variance `[C]`, zeros without rows.
    """
    extra = () if residual is None else (residual,)
    options = {"epsilon": epsilon, "relu": relu, "implementation": implementation}
    y, mean, variance, *_ = _normalize(x, scale, bias, counts, *extra, **options)
    return y, mean, variance
