"""The layers that `layers.py` times: scenes, maps, inputs, the passes as functions, and the truth in float64."""

import functools
from dataclasses import dataclass

import inputs
import jax
import jax.numpy as jnp
import numpy as np
import reference
import scans
from reference import ONE, THREE, TWO

import jaxsparse as js
from jaxsparse.geometry import Geometry
from jaxsparse.tensor import on_sites

DTYPES = {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "float32": jnp.float32, "tf32": jnp.float32}
PASSES = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True)
class Scene:
    """A scan in voxels of so many metres, or (scan None) a full cube; kernel and strides from each grid to the next."""

    scan: str | None
    voxel_size: float | tuple[float, float, float] = 0.05
    downs: tuple = ((TWO, TWO),) * 4


SCENES = {
    "lidar": Scene("semkitti_00_000000"),
    "10 sweeps": Scene("nusc_10sweep", (0.1, 0.1, 0.2), ((THREE, TWO),) * 3 + (((1, 3, 1), (1, 2, 1)),)),
    "key frame": Scene("nusc_key00", 0.1),
    "room": Scene("pcl_room_scan1", 0.02),
    "fragment": Scene("redwood_fragment", 0.02),
    "full cube": Scene(None),
}
CUBE = 40  # sites on an edge of the full cube


@dataclass(frozen=True)
class Layer:
    """A convolution from `level` of a scene's pyramid: "submanifold", "strided" to the next level, "inverse" back."""

    scene: str
    level: int
    c_in: int
    c_out: int
    kernel: tuple[int, int, int] = THREE
    kind: str = "submanifold"

    @property
    def strides(self):
        """Strides of the convolution that the map belongs to."""
        return ONE if self.kind == "submanifold" else SCENES[self.scene].downs[self.level][1]

    def __str__(self):
        size = "x".join(map(str, self.kernel))
        return f"{self.kind} {size}, {self.c_in} to {self.c_out}, {self.scene} {self.level}"


def _same(scene, level, *widths, kernel=THREE):
    return [Layer(scene, level, c, c, kernel) for c in widths]


DECODER = (256, 256), (256, 128), (128, 96), (96, 96)  # of SparseResUNet42, from the coarsest level up
ROWS = {
    "levels": [
        *_same("lidar", 0, 32, 64, 96),
        *_same("lidar", 1, 64, 128),
        *_same("lidar", 2, 128),
        *_same("lidar", 3, 256),
    ],
    "widths": [
        *(Layer("lidar", 0, *widths) for widths in ((4, 32), (3, 16), (30, 50))),
        *_same("lidar", 0, 16, 48, 36),
        *_same("lidar", 3, 512),
    ],
    "few": [
        *_same("key frame", 0, 32, 96),
        *_same("key frame", 1, 64),
        *_same("key frame", 2, 128),
        *_same("key frame", 3, 256),
        *_same("lidar", 4, 256),
    ],
    "strided": [
        *(Layer("lidar", level, c, c, TWO, "strided") for level, c in enumerate((32, 32, 64, 128))),
        *(Layer("lidar", 3 - i, *widths, TWO, "inverse") for i, widths in enumerate(DECODER)),
        *(Layer("10 sweeps", level, c, 2 * c, THREE, "strided") for level, c in enumerate((16, 32, 64))),
        Layer("10 sweeps", 3, 128, 128, (1, 3, 1), "strided"),
    ],
    "kernels": [
        Layer("lidar", 0, 128, 96, ONE),
        Layer("lidar", 0, 64, 64, (1, 3, 1)),
        Layer("lidar", 1, 32, 32, (5, 5, 5)),
        Layer("lidar", 2, 32, 32, (7, 7, 7)),
    ],
    "scenes": [*_same("room", 0, 64), *_same("fragment", 0, 64), *_same("full cube", 0, 64)],
}


def layers_of(groups, folder):
    """The layers of these groups of `ROWS`; says which scenes are skipped because their scan is not in the folder."""
    layers = [layer for group in groups for layer in ROWS[group]]
    for scene in {layer.scene for layer in layers}:
        scan = SCENES[scene].scan
        if scan and (reason := scans.missing(folder, [scan])):
            print(f"skipped {scene}: {reason}")
            layers = [layer for layer in layers if layer.scene != scene]
    return layers


# --- what a layer works on ---


@functools.cache
def pyramid(name, folder, share):
    """Sites of each level of a scene, with a tenth of the rows to spare, as the library sorts them."""
    scene = SCENES[name]
    if scene.scan is None:
        voxels = scans.block(max(2, round(CUBE * share ** (1 / 3))))
    else:
        voxels = scans.read(folder, scene.scan, scene.voxel_size, share)
    levels, coords = [inputs.tensor(voxels, jnp.float32, inputs.capacity_for(len(voxels.coords))).sites], voxels.coords
    for kernel, strides in scene.downs:
        coords = reference.reachable(coords, kernel, strides)
        geometry = Geometry.create(3, kernel, strides)
        levels.append(levels[-1].coarse(geometry, "reachable", inputs.capacity_for(len(coords))).check())
    return levels


@functools.cache
def host_table(scene, level, kernel, kind, *where):
    """The table of a layer's forward pass, found on the host: int32 [taps, output sites]."""
    levels = [inputs.real(s) for s in pyramid(scene, *where)[level : level + 2]]
    coarse, strides = (levels[0], ONE) if kind == "submanifold" else (levels[1], SCENES[scene].downs[level][1])
    rows = reference.table(levels[0], coarse, kernel, strides)
    return reference.transpose(rows, len(levels[0])) if kind == "inverse" else rows


class Case:
    """A layer with its map and a ring of inputs and cotangents, and the truth for the first of them."""

    def __init__(self, layer, dtype, args):
        levels = pyramid(layer.scene, args.data, args.share)
        fine = levels[layer.level]
        coarse = fine if layer.kind == "submanifold" else levels[layer.level + 1]
        self.layer, self.dtype, self.precision = layer, dtype, "highest" if dtype == "float32" else "default"
        self.fine, self.sites = fine, (coarse, fine) if layer.kind == "inverse" else (fine, coarse)
        self.table = host_table(layer.scene, layer.level, layer.kernel, layer.kind, args.data, args.share)
        self.pairs = int((self.table >= 0).sum())
        self.map = None
        if layer.kernel != ONE:
            to = () if coarse is fine else (coarse,)  # the same object makes a submanifold map, its own reverse
            build = jax.jit(lambda f, *c: js.kernel_map(f, *(c or (f,)), layer.kernel, layer.strides))
            self.map = build(fine, *to)
        self.weights, self.ring = self._inputs(len(self.table))

    def _inputs(self, taps):
        """Weights, and four pairs of features and cotangents: normal numbers that the dtype holds exactly."""
        layer, (x, y) = self.layer, self.sites
        sides = (x, layer.c_in), (y, layer.c_out)

        def draw(key, shape, scale=1.0):
            values = scale * jax.random.normal(key, shape, jnp.float32)
            if self.dtype == "tf32":
                values = jax.lax.reduce_precision(values, 8, 10)
            return values.astype(DTYPES[self.dtype])

        def make(keys):
            weights = draw(keys[0], (taps, layer.c_in, layer.c_out), 1 / np.sqrt(taps * layer.c_in))
            drawn = [draw(key, (4, s.capacity, c)) for key, (s, c) in zip(keys[1:], sides, strict=True)]
            real = [jnp.where(s.is_real[:, None], a, 0) for a, (s, _) in zip(drawn, sides, strict=True)]
            return weights, [(real[0][i], real[1][i]) for i in range(4)]

        return jax.jit(make)(jax.random.split(jax.random.key(0, impl="rbg"), 3))

    @property
    def rest(self):
        """What the passes take besides the ring's."""
        return self.weights, self.sites, self.map

    @functools.cached_property
    def truth(self):
        """For each pass the result in float64 and the sum of the products' magnitudes, on the device."""
        real = [slice(int(s.count)) for s in self.sites]
        x, g = (a[rows] for a, rows in zip(self.ring[0], real, strict=True))

        def products(x, g, w):
            y, back = jax.vjp(lambda x, w: reference.conv(x, w, self.table), x, w)
            return y, *back(g)

        def both(*operands):
            operands = [a.astype(jnp.float64) for a in operands]
            return products(*operands), products(*map(jnp.abs, operands))

        with jax.enable_x64(True):
            results = jax.jit(both, compiler_options=reference.COMPILER)(x, g, self.weights)
        return [dict(zip(PASSES, of, strict=True)) for of in results]

    def prepare(self):
        """Computes the truth and compiles what compares with it, so that this can happen beside other work."""
        for name, (true, _) in zip(PASSES, zip(*(of.values() for of in self.truth), strict=True), strict=True):
            rows = {"forward": self.sites[1].capacity, "dgrad": self.sites[0].capacity}.get(name, len(true))
            self.error(name, jnp.zeros((rows, *true.shape[1:]), self.weights.dtype))

    def error(self, name, found):
        """The largest error of a pass's result in units of the bound; infinite where padding rows are not 0."""
        true, magnitude = (of[name] for of in self.truth)
        with jax.enable_x64(True):
            return float(_error(found, true, magnitude, self.roundings[name]))

    @functools.cached_property
    def roundings(self):
        """What a pass's sums may round, in units of 2^-23 of the magnitude: the root of a sum's steps, at least 8.

        A step adds the eight products that tensor cores take together in TF32, of the most that any sum has.
        """
        taps, layer = len(self.table), self.layer
        most = {"forward": taps * layer.c_in, "dgrad": taps * layer.c_out, "wgrad": len(self.table[0])}
        return {name: max(8.0, (number / 8) ** 0.5) for name, number in most.items()}

    def function(self, name, config, implementation):
        """The pass as a function of what is in the ring, weights, sites and map."""
        layer, options = self.layer, {"config": config, "implementation": implementation, "precision": self.precision}

        def forward(x, w, sites, kernel_map):
            x, options["kernel_map"] = on_sites(sites[0], x), kernel_map
            if layer.kind == "inverse":
                return js.ops.conv_transpose(
                    x, w, like=sites[1], kernel_size=layer.kernel, strides=layer.strides, **options
                ).feats
            to = "submanifold" if layer.kind == "submanifold" else sites[1]
            return js.ops.conv(x, w, kernel_size=layer.kernel, strides=layer.strides, sites=to, **options).feats

        def run(x, g, w, *rest):
            if name == "forward":
                return forward(x, w, *rest)
            if name == "dgrad":
                return jax.vjp(lambda x: forward(x, w, *rest), x)[1](g)[0]
            return jax.vjp(lambda w: forward(x, w, *rest), w)[1](g)[0]

        return run

    @property
    def work(self):
        """Useful FLOPs of each pass, and its least bytes."""
        layer, size = self.layer, self.weights.dtype.itemsize
        elements = sum(int(s.count) * c for s, c in zip(self.sites, (layer.c_in, layer.c_out), strict=True))
        return 2 * self.pairs * layer.c_in * layer.c_out, size * (elements + self.weights.size) + 4 * self.pairs


@jax.jit
def _error(found, true, magnitude, roundings):
    info = jnp.finfo(found.dtype)
    exponent = jnp.maximum(jnp.frexp(true)[1] - 1, int(info.minexp))
    bound = jnp.ldexp(1.0, exponent - info.nmant) + roundings * 2.0**-23 * magnitude
    real = found[: len(true)].astype(jnp.float64)
    worst = jnp.max(jnp.where(jnp.isfinite(real), jnp.abs(real - true), jnp.inf) / bound)
    return jnp.where(jnp.all(found[len(true) :] == 0), worst, jnp.inf)
