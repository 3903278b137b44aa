"""The layers of a function and their kernel maps on sample inputs, found in its jaxpr.

The function is traced once. Its jaxpr is walked through `jit`, `checkpoint` and custom derivatives, as if their bodies
stood in line; a product of a convolution is a layer, and the value that its table comes from tells which layers share
a map.
Products inside `scan`, `while`, `cond`, `shard_map` and `vmap`-made loops are counted, but not seen.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxsparse import _coords
from jaxsparse._compat import bind_equation, sub_jaxprs
from jaxsparse._keys import real_rows
from jaxsparse.ops.conv import choices, primitives
from jaxsparse.tuning.choice import Question

_NAMES = {op.primitive: name for name, op in primitives.PRODUCTS.items()}
IN_LINE = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One product of a convolution.

    Attributes:
      op: "forward", "dgrad" or "wgrad", see `jaxsparse.ops.conv.primitives`.
      spec, out_dtype, implementation: its parameters.
      first, second: its float operands.
      table: aval of its map's table.
    """

    op: str
    spec: primitives.Spec
    out_dtype: Any
    implementation: str
    first: jax.ShapeDtypeStruct
    second: jax.ShapeDtypeStruct
    table: jax.ShapeDtypeStruct

    @property
    def problem(self) -> choices.Problem:
        """The product that its lowering asks about."""
        taps, out_rows = self.table.shape
        (rows, a), b = self.first.shape, self.second.shape[-1]
        if self.op == "dgrad":  # x is the cotangent, weights are transposed
            reverse = not self.spec.is_symmetric
            return choices.Problem(self.spec, rows, self.spec.in_rows, taps, a, self.second.shape[1], reverse)
        return choices.Problem(self.spec, rows, out_rows, taps, a, b)

    def questions(self, platform: str) -> dict[str, tuple[Question, Any]]:
        """The decisions of this layer, "own" and "sort", each with what `config=` says of it."""
        p, config = self.problem, self.spec.config
        if self.implementation == "xla":
            return {}
        if not self.spec.uses_gemm(platform):
            asks = platform == "cpu" and self.op != "wgrad"
            return {"own": (choices.conv(platform, p), config.tile_rows)} if asks else {}
        if self.op == "wgrad":
            return {"own": (choices.wgrad(platform, p), config.wgrad)}
        tile = config.dgrad if self.op == "dgrad" else config.forward
        return {"own": (choices.conv(platform, p), tile), "sort": (choices.sort(platform, p), config.sort)}

    def run(self, first, second, kernel_map: Sequence[jax.Array], implementation: str | None = None) -> jax.Array:
        """The product."""
        op = primitives.PRODUCTS[self.op]
        options = {"spec": self.spec, "out_dtype": self.out_dtype}
        return op(first, second, *kernel_map, **options, implementation=implementation or self.implementation)[0]

    def with_gradients(self) -> list[Layer]:
        """This product and the two that differentiating it needs."""
        names = ["forward", "dgrad", "wgrad"]  # of (x, w), (g, w), (x, g)
        if self.op == "wgrad":
            return [self]
        out_rows = self.table.shape[1]
        if self.op == "forward":
            x, w = self.first, self.second
            g = jax.ShapeDtypeStruct((out_rows, w.shape[2]), self.out_dtype)
        else:
            g, w = self.first, self.second
            x = jax.ShapeDtypeStruct((self.spec.in_rows, w.shape[1]), self.out_dtype)
        operands = {"forward": (x, w), "dgrad": (g, w), "wgrad": (x, g)}
        dtypes = {"forward": self.out_dtype, "dgrad": self.out_dtype, "wgrad": w.dtype}
        return [
            dataclasses.replace(self, op=n, out_dtype=dtypes[n], first=operands[n][0], second=operands[n][1])
            for n in names
        ]


@dataclasses.dataclass(frozen=True)
class MapBuild:
    """How a map is made from sites: parameters of the `kernel_map` primitive."""

    params: tuple[tuple[str, Any], ...]
    sites: int

    def question(self, platform: str) -> Question | None:
        """The choice of a builder, None where it was given."""
        params = dict(self.params)
        if params["builder"] != "auto" or params["implementation"] != "auto":
            return None
        return _coords.builder_question(platform, self.sites, params["geometry"], params.get("grid", ()))

    def run(self, operands: Sequence[jax.Array]) -> list[jax.Array]:
        """Table and masks."""
        return _coords.kernel_map(*operands, **dict(self.params))


@dataclasses.dataclass
class Recorded:
    """What a function was seen to do.

    Attributes:
      layers: for each map, its layers and how often each occurs.
      builds: for each map, how it is made, None for one that came from outside.
      maps: for each sample and map, (operands of its build or (), (table, masks, in_counts, out_counts)).
      unseen: products in bodies that are not walked.
    """

    layers: list[collections.Counter[Layer]]
    builds: list[MapBuild | None]
    maps: list[list[tuple[tuple, tuple]]]
    unseen: int

    def neighbours(self, which: int, of_reverse: bool) -> float:
        """Pairs of a map over its rows, those of its reverse if so, mean over samples."""
        maps = [sample[which][1] for sample in self.maps]
        pairs, rows = sum(int(_pairs(*m)) for m in maps), sum(int(m[2 if of_reverse else 3].sum()) for m in maps)
        return pairs / max(rows, 1)


@jax.jit
def _pairs(table, masks, in_counts, out_counts):
    return ((table >= 0) & real_rows(out_counts, table.shape[1])[None]).sum()


def as_function(fn: Callable, args: Sequence) -> tuple[Callable, tuple]:
    """A function of arrays for a model or function, and its arguments: modules are split, and merged when it runs."""
    if not isinstance(fn, nnx.Module) and not any(isinstance(a, nnx.Module) for a in args):
        return fn, tuple(args)
    graph, state = nnx.split((fn, tuple(args)) if isinstance(fn, nnx.Module) else (None, tuple(args)))

    def call(state):
        model, args = nnx.merge(graph, state, copy=True)
        return (model or fn)(*args)

    return call, (state,)


def record(fn: Callable, samples: Sequence[tuple]) -> Recorded:
    """Walks `fn` on the first sample's shapes, and computes the maps of every sample in one compiled program.

    Raises:
      ValueError: where samples differ in shapes or structure.
      TypeError: where they hold shapes in place of arrays.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(samples)):
        raise TypeError("arguments must be arrays, not shapes: the maps of their sites decide what is quickest.")
    call, first = as_function(fn, samples[0])
    closed = jax.make_jaxpr(call)(*first)
    tree: Any = jax.tree.structure(first)
    shapes = _shapes(first)
    found = _Walk()

    @jax.jit
    def maps_of(*leaves):
        found.reset()
        found.walk(closed.jaxpr, closed.consts, leaves)
        return [(operands, tuple(kernel_map)) for operands, kernel_map in zip(found.operands, found.maps, strict=True)]

    maps = []
    for sample in samples:
        _, arguments = as_function(fn, sample)
        leaves = jax.tree.leaves(arguments)
        if jax.tree.structure(arguments) != tree or _shapes(arguments) != shapes:
            raise ValueError(
                "`samples` differ in structure, shapes or dtypes; pad them to one capacity, as for a compiled "
                f"function. The first has {shapes}, another {_shapes(arguments)}."
            )
        maps.append(maps_of(*leaves))
    return Recorded(found.layers, found.builds, maps, found.unseen)


def _shapes(tree) -> list:
    return [(jax.numpy.shape(a), jax.numpy.result_type(a).name) for a in jax.tree.leaves(tree)]


class _Walk:
    """Runs a jaxpr with bodies in line, and notes maps and products."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.layers: list[collections.Counter[Layer]] = []
        self.builds: list[MapBuild | None] = []
        self.operands: list[tuple] = []
        self.maps: list[list] = []
        self.unseen = 0
        self._number: dict[int, int] = {}  # by identity of the table; `_made` keeps those alive
        self._made: dict[int, tuple] = {}

    def walk(self, jaxpr, consts, args) -> list:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v):
            return v.val if hasattr(v, "val") else env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            bodies = sub_jaxprs(eqn)
            if _is_product(eqn):
                self._product(eqn, values)
            if bodies and eqn.primitive.name in IN_LINE:
                out = self.walk(bodies[0].jaxpr, bodies[0].consts, values)
            else:
                self.unseen += sum(map(_count_products, bodies))
                out = bind_equation(eqn, values)
            if eqn.primitive is _coords.kernel_map.primitive:
                build = MapBuild(tuple(sorted(eqn.params.items())), eqn.invars[0].aval.shape[0])
                self._made[id(out[0])] = (out[0], build, tuple(values))
            env.update(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _product(self, eqn, values) -> None:
        kernel_map = values[2:6]
        number = self._number.get(id(kernel_map[0]))
        if number is None:
            number = self._number[id(kernel_map[0])] = len(self.maps)
            _, build, operands = self._made.get(id(kernel_map[0]), (None, None, ()))
            self.maps.append(kernel_map)
            self.builds.append(build)
            self.operands.append(operands)
            self.layers.append(collections.Counter())
        first, second, table = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars[:3])
        name = _name(eqn)
        if name != "wgrad":  # an input in two arrays counts as one
            first = first.update(shape=(first.shape[0], second.shape[2 if name == "dgrad" else 1]))
        spec, out_dtype, implementation = (eqn.params[p] for p in ("spec", "out_dtype", "implementation"))
        self.layers[number][Layer(name, spec, out_dtype, implementation, first, second, table)] += 1


def _is_product(eqn) -> bool:
    return isinstance(eqn.params.get("spec"), primitives.Spec)


def _name(eqn) -> str:
    """Which product: a primitive that does more after one has its name among the parameters."""
    return _NAMES.get(eqn.primitive) or eqn.params["product"]


def _count_products(closed) -> int:
    return sum(_is_product(eqn) + sum(map(_count_products, sub_jaxprs(eqn))) for eqn in closed.jaxpr.eqns)
