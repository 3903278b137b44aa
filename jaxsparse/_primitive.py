"""One way to make a primitive: shapes in, one implementation a platform, batching beside it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxsparse import _native
from jaxsparse._compat import Primitive, ad, apply_primitive, batching, mlir, out_aval, promote, zero_tangent
from jaxsparse.tuning import choice

Shapes = Sequence[tuple[Sequence[int], Any]]

_KEPT: set[str] = set()


def save_products(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: products and maps are kept; norms, activations and additions are computed again.

        loss = jax.checkpoint(loss, policy=js.ops.save_products)

    A backward pass then needs 0.7 to 0.9 times the memory, for one more elementwise pass over each layer's features.
    """
    return primitive.name in _KEPT


def check_implementation(implementation: str) -> None:
    """Refuses a name that is no implementation."""
    if implementation not in ("auto", "xla"):
        raise ValueError(f'`implementation` (={implementation!r}) must be "auto" or "xla".')


def lacks_kernels(platform: str) -> bool:
    """Whether plain JAX has to serve a platform of custom calls: a device of this process, and a build without them.

    A program for a platform that this process has no device of is for another machine and its build.
    """
    return platform == "cuda" and not _native.cuda_handlers() and choice.device_here(platform) is not None


@functools.cache
def _warn_of_plain_jax() -> None:
    warnings.warn(
        "jaxsparse: this build has no CUDA kernels; plain JAX runs on the GPU in their place, which is slower. Install "
        "jaxsparse where nvcc is, with JAXSPARSE_CUDA=ON in the environment, to have them (see README.md).",
        stacklevel=2,
    )


class Op:
    """A primitive of several results with a lowering for each platform.

    Args:
      name: the primitive's name, as it shows in a jaxpr.
      shapes: `(*operand_avals, **params) -> [(shape, dtype), ...]`.
      custom_call: JAX code that emits the custom calls, `(platform, *operands, **params) -> results`, used on CPU and
        CUDA where `params["implementation"]` is "auto", see `lacks_kernels` too; None where plain JAX serves
        everywhere.
      reference: plain JAX code with the same results, `(*operands, **params) -> results`, used where
        `params["implementation"]` is "xla" and on every other platform.
      is_elementwise: whether it is sooner computed again than kept, see `save_products`.
    """

    def __init__(
        self,
        name: str,
        shapes: Callable[..., Shapes],
        custom_call: Callable | None,
        reference: Callable,
        *,
        is_elementwise: bool = False,
    ):
        if not is_elementwise:
            _KEPT.add(name)
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_impl(lambda *operands, **params: apply_primitive(self.primitive, *operands, **params))
        self.primitive.def_abstract_eval(
            lambda *avals, **params: [out_aval(avals[0], *shape) for shape in shapes(*avals, **params)]
        )

        self._custom_call, self._reference = custom_call, reference
        for platform in ("cpu", "cuda"):
            self.lower_as(platform, on=platform)
        mlir.register_lowering(self.primitive, self._lowering(None))
        self.set_batching(self.loop_over_batch)

    def _lowering(self, platform: str | None):
        def run(*operands, implementation, **params):
            if implementation == "xla" or platform is None or self._custom_call is None:
                return list(self._reference(*operands, **params))
            if lacks_kernels(platform):
                _warn_of_plain_jax()
                return list(self._reference(*operands, **params))
            return list(self._custom_call(platform, *operands, **params))

        return mlir.lower_fun(run, multiple_results=True)

    def lower_as(self, platform: str, *, on: str) -> None:
        """Emits on one platform the custom calls of another: the same one, but for tests without a GPU."""
        mlir.register_lowering(self.primitive, self._lowering(platform), platform=on)

    def __call__(self, *operands: jax.Array, **params) -> list[jax.Array]:
        check_implementation(params.setdefault("implementation", "auto"))
        return self.primitive.bind(*promote(operands), **params)

    def set_batching(self, rule: Callable) -> None:
        """Sets the `vmap` rule: `rule(operands, dims, **params) -> (results, result_dims)`."""
        batching.primitive_batchers[self.primitive] = rule

    def set_jvp(self, jvp: Callable) -> None:
        """Sets the derivative rule: `jvp(primals, tangents, **params) -> (results, tangents of the results)`."""
        ad.primitive_jvps[self.primitive] = jvp

    def set_linear(self, jvp: Callable, transpose: Callable) -> None:
        """Sets the derivative rules of an op that is linear in each of its float operands."""
        self.set_jvp(jvp)
        ad.primitive_transposes[self.primitive] = transpose

    def set_linear_in_first(self, transposed: Callable) -> None:
        """Sets the rules of an op of one result that is linear in its first operand and constant in the others.

        Args:
          transposed: the operand's cotangent, `transposed(ct, *rest, **params)`.
        """

        def jvp(primals, tangents, **params):
            out = self(*primals, **params)
            dot = tangents[0]
            return out, [zero_tangent(out[0]) if type(dot) is ad.Zero else self(dot, *primals[1:], **params)[0]]

        def transpose(cotangents, x, *rest, **params):
            (ct,) = cotangents
            found = ad.Zero(x.aval) if type(ct) is ad.Zero else transposed(ct, *rest, **params)
            return [found, *[None] * len(rest)]

        self.set_linear(jvp, transpose)

    def set_bilinear(self, for_first: Callable, for_second: Callable) -> None:
        """Sets the rules of an op of one result that is linear in each of its first two operands.

        Args:
          for_first, for_second: the cotangent of one operand, from that of the result and the other operand:
            `for_first(ct, second, *rest, **params)`, where `out_dtype` in `params` is that of the cotangent wanted.
        """

        def jvp(primals, tangents, **params):
            a, b, *rest = primals
            a_dot, b_dot = tangents[:2]
            out = self(*primals, **params)
            tangent = zero_tangent(out[0])
            if type(a_dot) is not ad.Zero:
                tangent = ad.add_tangents(tangent, self(a_dot, b, *rest, **params)[0])
            if type(b_dot) is not ad.Zero:
                tangent = ad.add_tangents(tangent, self(a, b_dot, *rest, **params)[0])
            return out, [tangent]

        def transpose(cotangents, a, b, *rest, **params):
            (ct,) = cotangents
            is_first = ad.is_undefined_primal(a)
            wanted = (a if is_first else b).aval
            params["out_dtype"] = wanted.dtype
            if type(ct) is ad.Zero:
                found = ad.Zero(wanted)
            else:
                found = for_first(ct, b, *rest, **params) if is_first else for_second(ct, a, *rest, **params)
            return [*((found, None) if is_first else (None, found)), *[None] * len(rest)]

        self.set_linear(jvp, transpose)

    def batch_as_reference(self) -> None:
        """Makes `vmap` run the plain JAX code, batched."""

        def rule(operands, dims, *, implementation, **params):
            results = jax.vmap(lambda *x: list(self._reference(*x, **params)), dims)(*operands)
            return results, [0] * len(results)

        self.set_batching(rule)

    def loop_over_batch(self, operands, dims, **params):
        """The `vmap` rule that always holds: one call after another."""
        size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
        batched = [batching.bdim_at_front(x, d, size) for x, d in zip(operands, dims, strict=True) if d is not None]
        whole = [x if d is None else None for x, d in zip(operands, dims, strict=True)]

        def one(batched_operands):
            rest = iter(batched_operands)
            return self(*[next(rest) if x is None else x for x in whole], **params)

        results = lax.map(one, batched)
        return results, [0] * len(results)
