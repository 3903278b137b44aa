"""The networks and scans that `networks.py` times, and what both libraries' sides share: limits, errors, figures."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import measure
import numpy as np
import reference

import jaxsparse as js

IN_FEATURES = 4
LOSS_SCALE = {"float16": 2.0**16, "bfloat16": 1.0, "float32": 1.0}
LEARNING_RATE = 1e-3  # of the train step's AdamW


@dataclass(frozen=True)
class Network:
    """A model of this library, and its description for a given width, from which reference and peer are made."""

    model: type
    stages: Callable[[float], tuple[reference.Stage, ...]]


SEG = Network(js.models.SparseResUNet42, reference.seg_stages)
DET = Network(js.models.SparseResNet21D, reference.det_stages)


@dataclass(frozen=True)
class Workload:
    """A network on scans: one scan a batch entry, voxel edge in metres, or one an axis."""

    network: Network
    scans: tuple[str, ...]
    voxel_size: float | tuple[float, float, float]
    width: float = 1.0
    training: bool = False

    @property
    def stages(self):
        """Description of the network at its width."""
        return self.network.stages(self.width)


WORKLOADS = {
    "seg-kitti": Workload(SEG, ("semkitti_00_000000",), 0.05),
    "seg-kitti-half": Workload(SEG, ("semkitti_00_000000",), 0.05, width=0.5),
    "seg-nuscenes": Workload(SEG, ("nusc_key00",), 0.1),
    "seg-room": Workload(SEG, ("pcl_room_scan1",), 0.02),
    "seg-room-quarter": Workload(SEG, ("pcl_room_scan1",), 0.05, width=0.25),
    "det-nuscenes10": Workload(DET, ("nusc_10sweep",), (0.1, 0.1, 0.2)),
    "det-pandaset": Workload(DET, ("pandaset_002_01",), (0.1, 0.1, 0.15)),
    "seg-kitti-train": Workload(SEG, ("semkitti_00_000000", "semkitti_00_000001"), 0.05, training=True),
    "det-pandaset-train": Workload(DET, ("pandaset_002_01", "pandaset_002_40"), (0.1, 0.1, 0.15), training=True),
}


def error_limit(dtype, training):
    """The largest error that passes.

    With 16-bit floats and TF32 every layer rounds what it multiplies: ten roundings. In float32 the sums round, of up
    to 27 x 512 products: the square root of that, about a hundred. Gradients jump where a ReLU's input lies so close
    to 0 that rounding changes its sign; one such unit was seen to move the gradients of a small scene by 2 percent.
    """
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    if training:
        return 0.05 if exact else 0.3
    if exact:
        return 100 * 2.0**-23
    return 10 * (2.0**-10 if dtype == "float32" else float(jnp.finfo(dtype).eps))


def error(found, expected):
    """|found - expected| / |expected| in the 2-norm over all leaves; infinite where the numbers of sites differ."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    if any(np.shape(f) != e.shape for f, e in pairs):
        return float("inf")
    difference = sum(float(np.sum((np.asarray(f, np.float64) - e) ** 2)) for f, e in pairs)
    return float(np.sqrt(difference / sum(float(np.sum(e**2)) for _, e in pairs)))


def first_scan(sites, feats):
    """The features of batch entry 0, in an order that depends on their sites alone."""
    sites, feats = sites[sites[:, 0] == 0], feats[sites[:, 0] == 0]
    return feats[np.argsort(reference.keys(sites))]


def wall_figures(step, ring, sync, steps, calls=0):
    """Wall times of one program: step by step, launched one after another, and the tail of many steps."""
    found = {
        "wall_ms": measure.summary(measure.wall_ms(step, ring, sync, steps)),
        "pipelined_ms": measure.pipelined_ms(step, ring, sync, steps),
    }
    if calls:
        times = measure.wall_ms(step, ring, sync, calls)
        found |= {"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}
    return found
