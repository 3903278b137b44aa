"""Layers against the golden files in `golden/`: spconv's results, an implementation that shares nothing with this one.

How the files were made, and what they hold, is said in `golden/make_spconv_golden.py`.
"""

import json
import pathlib
from types import SimpleNamespace

import jax.numpy as jnp
import jaxsparse as js
import numpy as np
import pytest
from flax import nnx

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))
PADDING = np.iinfo(np.int32).min


def load(path):
    with np.load(path) as arrays:
        case = {name: arrays[name] for name in arrays.files}
    return SimpleNamespace(**{**case, **json.loads(str(case["spec"]))})


def padded(rows, capacity, fill):
    """`rows` with rows of `fill` added up to `capacity`."""
    return np.pad(rows, [(0, capacity - len(rows)), (0, 0)], constant_values=fill)


def tensor(coords, feats, extra_rows, **kwargs):
    """A SparseTensor with `extra_rows` of padding, whose features are NaN: they must not reach any real row."""
    capacity = len(coords) + extra_rows
    return js.SparseTensor(
        jnp.asarray(padded(coords, capacity, PADDING)), jnp.asarray(padded(feats, capacity, np.nan)),
        count=jnp.int32(len(coords)), **kwargs)


def build(case, capacity):
    """The layer of a golden case, with its weights."""
    _, c_in, c_out = case.kernel.shape
    same = {"use_bias": False, "precision": "highest", "dilation": tuple(case.dilation), "rngs": nnx.Rngs(0)}
    size, moves = tuple(case.kernel_size), {"strides": tuple(case.strides), "padding": tuple(case.padding)}
    if case.op == "subm":
        layer = js.nn.SubMConv(c_in, c_out, size, **same)
    elif case.op == "conv":
        layer = js.nn.SparseConv(c_in, c_out, size, **moves, capacity=capacity, **same)
    else:
        layer = js.nn.SparseConvTranspose(c_in, c_out, size, **moves, **same)
    layer.kernel[...] = jnp.asarray(case.kernel)
    return layer


def run(case, extra_rows):
    """Input tensor(s) in, output tensor out, the layer under jit."""
    grid = {"batch_size": case.batch_size, "bounds": case.bounds and tuple(case.bounds)}
    layer = build(case, capacity=len(case.out_coords) + extra_rows)
    if case.op != "transpose":
        x = tensor(case.coords, case.feats, extra_rows, **grid)
        return nnx.jit(lambda layer, x: layer(x))(layer, x)
    x = tensor(case.coords, case.feats, extra_rows, stride=tuple(case.strides), **grid)
    like = tensor(case.out_coords, np.zeros((len(case.out_coords), 1), np.float32), extra_rows, **grid)
    return nnx.jit(lambda layer, x, like: layer(x, like=like))(layer, x, like)


@pytest.mark.parametrize("extra_rows", [0, 37])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_agrees_with_spconv(path, extra_rows):
    case = load(path)
    y = run(case, extra_rows)
    y.check()

    coords, feats, count = np.asarray(y.coords), np.asarray(y.feats), int(y.count)
    assert count == len(case.out_coords)
    order = np.lexsort(coords[:count].T[::-1])
    np.testing.assert_array_equal(coords[:count][order], case.out_coords)
    error = np.abs(feats[:count][order] - case.out_feats).max() / np.abs(case.out_feats).max()
    assert error <= 1e-5, f"{error:.1e} of the largest output"
    assert (coords[count:] == PADDING).all()
    assert (feats[count:] == 0).all()


def test_golden_files_are_there():
    assert {load(path).op for path in FILES} == {"subm", "conv", "transpose"}
