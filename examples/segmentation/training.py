"""The compiled parts of training, and what they need to know beforehand: capacities, class weights, the optimiser.

The model is split once into its graph and its arrays, and each step is a plain function of arrays that is compiled
ahead of time for each bucket. `Steps.compilations` counts those compilations; a compiled step refuses other shapes,
so there are no hidden ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsparse as js

from . import batches
from .batches import Batch
from .labels import IGNORED
from .scans import ScanSet

_PLANNED_FROM = 64  # scans of each bucket that capacities and class weights are planned from


class LossScale(NamedTuple):
    """What the loss is multiplied by, and gradients divided by: float16 gradients below 6e-8 would vanish.

    It is halved where gradients overflow and doubled after many steps without.
    """

    factor: jax.Array
    good_steps: jax.Array  # since it last changed

    @staticmethod
    def create(dtype: str) -> LossScale:
        """The first factor: 1 for other dtypes than float16, whose range is that of float32."""
        factor = 2.0**15 if dtype == "float16" else 1.0
        return LossScale(jnp.asarray(factor, jnp.float32), jnp.zeros((), jnp.int32))

    def after(self, finite: jax.Array, growth_steps: int = 1000) -> LossScale:
        """The scale for the step after one whose gradients were finite or not."""
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grows = good_steps == growth_steps
        factor = jnp.where(finite, jnp.where(grows, 2 * self.factor, self.factor), self.factor / 2)
        return LossScale(jnp.clip(factor, 1.0, 2.0**24), jnp.where(grows, 0, good_steps))


class TrainState(NamedTuple):
    """Everything that training changes, and all that a checkpoint holds."""

    params: Any
    stats: Any  # running statistics of the batch norms
    optimizer: Any
    step: jax.Array
    scale: LossScale


class Measured(NamedTuple):
    """What a step reports: read it on the host, `status` first."""

    loss: jax.Array
    confusion: jax.Array  # int32 [classes, classes], labelled x predicted, over labelled points
    status: jax.Array
    prediction: jax.Array  # int32 [points]


@dataclass(frozen=True)
class Grid:
    """How the points of one bucket become voxels: static, and so part of what is compiled."""

    voxel_size: float
    scans: int
    capacity: int
    capacities: js.Capacities | None = None


def check(measured: Measured) -> None:
    """Waits for a step; raises if voxels did not fit their capacity, or if training has diverged."""
    try:
        js.status.check(measured.status)
    except js.SiteError as error:
        error.add_note("This scan needs more rows than the scans that were planned from: pass a larger --slack.")
        raise
    if not np.isfinite(measured.loss):
        raise FloatingPointError(f"the loss is {float(measured.loss)}: lower the learning rate")


def features(xyz: jax.Array, intensity: jax.Array) -> jax.Array:
    """[P, 4]: height, distance from the sensor, intensity, and 1, each of order one. None depends on the heading."""
    distance = jnp.linalg.norm(xyz[:, :2], axis=1)
    return jnp.stack([xyz[:, 2] / 2.0, distance / 20.0, intensity, jnp.ones_like(distance)], axis=1)


def augment(xyz: jax.Array, scan: jax.Array, scans: int, key: jax.Array) -> jax.Array:
    """Turns each scan about z by any angle, mirrors half of them, and scales each by 0.95 to 1.05."""
    turn_key, flip_key, scale_key = jax.random.split(key, 3)
    angle = jax.random.uniform(turn_key, (scans,), maxval=2 * jnp.pi)
    flip = jnp.where(jax.random.bernoulli(flip_key, shape=(scans,)), -1.0, 1.0)
    scale = jax.random.uniform(scale_key, (scans,), minval=0.95, maxval=1.05)
    c, s, flip, scale = (v[scan] for v in (jnp.cos(angle), jnp.sin(angle), flip, scale))
    x, y, z = xyz[:, 0], xyz[:, 1] * flip, xyz[:, 2]
    return scale[:, None] * jnp.stack([c * x - s * y, s * x + c * y, z], axis=1)


def voxels_of(xyz: jax.Array, batch: Batch, grid: Grid) -> tuple[js.SparseTensor, jax.Array]:
    """The batch as one sparse tensor, and each point's voxel."""
    return js.voxelize(
        xyz,
        features(xyz, batch.intensity),
        voxel_size=grid.voxel_size,
        capacity=grid.capacity,
        count=batch.count,
        batch=batch.scan,
        batch_size=grid.scans,
        capacities=grid.capacities,
    )


def _measure(model: nnx.Module, xyz: jax.Array, batch: Batch, grid: Grid, weights: jax.Array) -> Measured:
    """Cross entropy over the labelled points, each class with its weight, and what was predicted for each point."""
    x, voxel_of_point = voxels_of(xyz, batch, grid)
    y = model(x)
    logits = js.devoxelize(y.feats.astype(jnp.float32), voxel_of_point)  # [P, classes]
    valued = (batch.label != IGNORED) & (voxel_of_point >= 0)
    label = jnp.where(valued, batch.label, 0)
    weight = jnp.where(valued, weights[label], 0.0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    loss = jnp.sum(weight * entropy) / jnp.maximum(jnp.sum(weight), 1e-6)
    prediction = jnp.argmax(logits, axis=1).astype(jnp.int32)
    classes = logits.shape[1]
    # Points without a class count into one more cell at the end, which is cut off.
    cell = jnp.where(valued, label * classes + prediction, classes * classes)
    confusion = jnp.bincount(cell, length=classes * classes + 1)[:-1].reshape(classes, classes)
    return Measured(loss, confusion.astype(jnp.int32), y.status, prediction)


def plan(scan_set: ScanSet, sampler: batches.Sampler, model: nnx.Module, voxel_size: float, slack: float):
    """The grid of each bucket, with room for its fullest scans, and the points of each class in the scans read."""
    grids: dict[int, Grid] = {}
    points = np.zeros(len(scan_set.classes), np.int64)
    for bucket, members in sampler.buckets.items():
        seen = [scan_set.load(i) for i in members[:: -(-len(members) // _PLANNED_FROM)]]
        for scan in seen:
            points += np.bincount(scan.label[scan.label != IGNORED], minlength=len(points))
        fullest = sorted(seen, key=lambda scan: batches.voxels(scan.xyz, voxel_size))[-sampler.batch :]
        grid = Grid(voxel_size, sampler.batch, batches.voxel_capacity(fullest, sampler.batch, voxel_size, slack))
        sample = batches.pack(fullest, bucket, sampler.batch)
        x, _ = voxels_of(jnp.asarray(sample.xyz), sample, grid)
        grids[bucket] = replace(grid, capacities=js.capacities(model, [x]))
    return grids, points


def class_weights(points: np.ndarray, kind: str) -> np.ndarray:
    """float32 [classes], mean 1 over the points: all 1 ("none"), or falling as 1 / sqrt(points) ("sqrt")."""
    if kind == "none":
        return np.ones(len(points), np.float32)
    weights = 1.0 / np.sqrt(np.maximum(points, 1))
    return (weights * points.sum() / (weights @ points)).astype(np.float32)


def adamw(highest: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a linear warm-up over a tenth of the steps, then a cosine down to a hundredth of the highest rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.1 * highest, highest, steps // 10, steps, 0.01 * highest)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))


class Steps:
    """The train and the evaluation step of one model and one optimiser, compiled once for each bucket.

    With float16 (`dtype`, that of the model's products) the loss is scaled, and a step whose gradients overflow changes
    nothing but the scale.
    """

    def __init__(self, model: nnx.Module, optimizer: optax.GradientTransformation, weights: np.ndarray, dtype: str):
        model.train()
        self._train_graph, self._params, self._stats = nnx.split(model, nnx.Param, ...)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self._optimizer, self._weights, self._dtype = optimizer, jnp.asarray(weights), dtype
        self._compiled: dict[tuple, Any] = {}
        self.compile_seconds = 0.0

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        scale = LossScale.create(self._dtype)
        return TrainState(
            self._params, self._stats, self._optimizer.init(self._params), jnp.zeros((), jnp.int32), scale
        )

    def compilations(self, name: str) -> int:
        """How often the step "train" or "evaluate" was compiled."""
        return sum(key[0] == name for key in self._compiled)

    def train(self, grid: Grid, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Measured]:
        """One optimiser step on an augmented batch. `state` is given away; running statistics move with it."""
        return self._run("train", self._train, grid, state, batch, key)

    def evaluate(self, grid: Grid, state: TrainState, batch: Batch) -> Measured:
        """Loss and predictions without augmentation, by the running statistics."""
        return self._run("evaluate", self._evaluate, grid, state, batch)

    def _run(self, name: str, step, grid: Grid, *arguments):
        key = (name, grid, arguments[1].label.shape)
        if key not in self._compiled:
            begun = time.perf_counter()
            jitted = jax.jit(step, static_argnums=0, donate_argnums=(1,) if name == "train" else ())
            self._compiled[key] = jitted.lower(grid, *arguments).compile()
            self.compile_seconds += time.perf_counter() - begun
        return self._compiled[key](*arguments)

    def _train(self, grid: Grid, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Measured]:
        xyz = augment(batch.xyz, batch.scan, grid.scans, jax.random.fold_in(key, state.step))

        def scaled_loss(params):
            model = nnx.merge(self._train_graph, params, state.stats, copy=True)
            measured = _measure(model, xyz, batch, grid, self._weights)
            return measured.loss * state.scale.factor, (measured, nnx.split(model, nnx.Param, ...)[2])

        gradients, (measured, stats) = jax.grad(scaled_loss, has_aux=True)(state.params)
        gradients = jax.tree.map(lambda g: g / state.scale.factor, gradients)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
        params, step = optax.apply_updates(state.params, updates), state.step + 1
        if self._dtype != "float16":
            return TrainState(params, stats, optimizer, step, state.scale), measured
        finite = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]))
        kept = (state.params, state.stats, state.optimizer)
        params, stats, optimizer = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (params, stats, optimizer), kept)
        return TrainState(params, stats, optimizer, step, state.scale.after(finite)), measured

    def _evaluate(self, grid: Grid, state: TrainState, batch: Batch) -> Measured:
        model = nnx.merge(self._eval_graph, state.params, state.stats)
        return _measure(model, batch.xyz, batch, grid, self._weights)
