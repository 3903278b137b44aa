"""Layers against the golden files in `golden/`: spconv's results, an implementation that shares nothing with this one.

How the files were made, and what they hold, is said in `golden/make_spconv_golden.py`.
"""

import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import jaxsparse as js

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))
PADDING = np.iinfo(np.int32).min


def load(path):
    with np.load(path) as arrays:
        case = {name: arrays[name] for name in arrays.files}
    return SimpleNamespace(**{**case, **json.loads(str(case["spec"]))})


def padded(rows, capacity, fill):
    """`rows` with rows of `fill` added up to `capacity`."""
    return np.pad(rows, [(0, capacity - len(rows)), (0, 0)], constant_values=fill)


def real_and_padding(coords, feats, extra_rows):
    """Coords, feats and count with `extra_rows` of padding, whose features are NaN: they must not reach a real row."""
    capacity = len(coords) + extra_rows
    return padded(coords, capacity, PADDING), padded(feats, capacity, np.nan), np.int32(len(coords))


def layer_of(case, capacity):
    """The layer of a golden case; its weights come later."""
    _, c_in, c_out = case.kernel.shape
    same = {"use_bias": False, "precision": "highest", "dilation": tuple(case.dilation), "rngs": nnx.Rngs(0)}
    size, moves = tuple(case.kernel_size), {"strides": tuple(case.strides), "padding": tuple(case.padding)}
    if case.op == "subm":
        return js.nn.SubMConv(c_in, c_out, size, **same)
    if case.op == "conv":
        return js.nn.SparseConv(c_in, c_out, size, **moves, capacity=capacity, **same)
    return js.nn.SparseConvTranspose(c_in, c_out, size, **moves, **same)


def run(case, extra_rows):
    """The layer's output for a golden case, as one compiled program."""
    grid = {"batch_size": case.batch_size, "bounds": case.bounds and tuple(case.bounds)}

    @jax.jit
    def program(kernel, rows, like):
        layer = layer_of(case, capacity=len(case.out_coords) + extra_rows)
        layer.kernel[...] = kernel
        if case.op != "transpose":
            return layer(js.SparseTensor(*rows, **grid))
        x = js.SparseTensor(*rows, stride=tuple(case.strides), **grid)
        return layer(x, like=js.SparseTensor(*like, **grid))

    unused = np.zeros((len(case.out_coords), 1), np.float32)
    like = real_and_padding(case.out_coords, unused, extra_rows)
    return program(case.kernel, real_and_padding(case.coords, case.feats, extra_rows), like)


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
