"""`python -m jaxsparse`: versions, what was built, the devices found, and which ops and dtypes run on each."""

from __future__ import annotations

import argparse
import sys

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jaxsparse as js
from jaxsparse import _native
from jaxsparse.tensor import FLOAT_DTYPES


def _runs(op, device, dtype) -> bool:
    """Whether an op gives the right answer on a device in a dtype: runs it."""
    with jax.enable_x64(True), jax.default_device(device):
        try:
            coords = jnp.asarray([[0, i, j, 0] for i in range(3) for j in range(3)], jnp.int32)
            x = js.SparseTensor(coords, jnp.ones((9, 4), dtype))
            value, expected = op(x)
            return bool(np.isclose(np.float64(value), expected, rtol=1e-2))
        except Exception as error:  # whatever stops it, the table says no; the reason goes to stderr
            print(f"{device}: {dtype.__name__}: {error}", file=sys.stderr)
            return False


def _forward(x):
    kernel = jnp.ones((27, 4, 2), x.dtype)
    return js.ops.conv(x, kernel, kernel_size=3).feats[4, 0], 36


def _gradient(x):
    def loss(kernel, feats):
        return js.ops.conv(x.with_feats(feats), kernel, kernel_size=3).feats.sum()

    kernel_bar, feats_bar = jax.grad(loss, (0, 1))(jnp.ones((27, 4, 2), x.dtype), x.feats)
    return kernel_bar[13, 0, 0] + feats_bar[4, 0], 9 + 18


def _resample(x):
    options = {"kernel_size": 2, "strides": 2}
    y = js.ops.conv(x, jnp.ones((8, 4, 4), x.dtype), sites="reachable", **options)
    return js.ops.conv_transpose(y, jnp.ones((8, 4, 2), x.dtype), like=x, **options).feats[0, 0], 64


def _voxelize(x):
    points = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.1, 0.2], [1.5, 0.0, 0.0]], jnp.float32)
    feats = jnp.asarray([[1.0], [3.0], [5.0]], x.dtype)
    y, index = js.voxelize(points, feats, 1.0, capacity=4)
    return js.devoxelize(y, index).sum(), 9


_OPS = {"conv": _forward, "conv gradient": _gradient, "strided, transposed": _resample, "voxelize": _voxelize}


def main() -> None:
    """Prints the report."""
    argparse.ArgumentParser(prog="python -m jaxsparse", description=__doc__.partition(": ")[2]).parse_args()
    cuda = "no"
    if _native.cuda_version is not None:
        major, minor = divmod(_native.cuda_version, 1000)
        cuda = f"{major}.{minor // 10}, architectures {_native.cuda_architectures}"
    print(f"jaxsparse {js.__version__}, built against jaxlib {_native.jaxlib_version()}, CUDA kernels: {cuda}")
    print(
        f"Python {sys.version.split()[0]}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax {flax.__version__}"
    )
    names = [jnp.dtype(d).name for d in FLOAT_DTYPES]
    for platform in ("cpu", "gpu"):
        try:
            devices = jax.devices(platform)
        except RuntimeError:
            print(f"\n{platform}: no device")
            continue
        for device in devices:
            native = device.platform == "cpu" or bool(_native.cuda_handlers())
            how = "custom calls" if native else "plain JAX: built without CUDA kernels"
            print(f"\n{device} ({device.device_kind}): {how}")
            print(f"  {'':20} " + " ".join(f"{name:>9}" for name in names))
            for name, op in _OPS.items():
                marks = ["yes" if _runs(op, device, d) else "no" for d in FLOAT_DTYPES]
                print(f"  {name:20} " + " ".join(f"{mark:>9}" for mark in marks))


if __name__ == "__main__":
    main()
