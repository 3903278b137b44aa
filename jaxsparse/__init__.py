"""jaxsparse: sparse convolution for JAX.

import jaxsparse as js

x, point_to_voxel = js.voxelize(points, feats, voxel_size=0.05, capacity=131072)
y = js.nn.SubMConv(4, 32, 3, rngs=nnx.Rngs(0))(x)
"""

from jaxsparse import models, nn, ops, status, tuning
from jaxsparse._ffi import COMPILER_OPTIONS, DISABLE_JAX_EXPORT_CHECKS
from jaxsparse.kernel_map import KernelMap, kernel_map
from jaxsparse.planning import capacities
from jaxsparse.sites import Capacities, Sites
from jaxsparse.status import SiteError
from jaxsparse.tensor import SparseTensor
from jaxsparse.tuning.search import autotune
from jaxsparse.voxel import collate, devoxelize, voxelize

__version__ = "0.1.0"

__all__ = [
    "COMPILER_OPTIONS",
    "DISABLE_JAX_EXPORT_CHECKS",
    "Capacities",
    "KernelMap",
    "SiteError",
    "Sites",
    "SparseTensor",
    "autotune",
    "capacities",
    "collate",
    "devoxelize",
    "kernel_map",
    "models",
    "nn",
    "ops",
    "status",
    "tuning",
    "voxelize",
]
