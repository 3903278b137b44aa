"""Bad input: each error names the argument, its value and the remedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from scenes import random_tensor

import jaxsparse as js

RNGS = nnx.Rngs(0)
POINTS = np.random.default_rng(0).uniform(-3, 3, (50, 3)).astype(np.float32)


def tensor(rows, features=4, **kwargs):
    coords = np.asarray(rows, np.int32)
    return js.SparseTensor(coords, jnp.ones((len(coords), features)), **kwargs)


# --- what shapes, dtypes and options tell, raised at once ---


def test_wrong_feature_width():
    x = random_tensor(0, features=48)
    message = f"kernel has 32 input features but x.feats has 48 (shape {x.feats.shape}); set in_features=48"
    for layer in (js.nn.SubMConv(32, 8, 3, rngs=RNGS), js.nn.Linear(32, 8, rngs=RNGS), js.nn.BatchNorm(32, rngs=RNGS)):
        with raises(ValueError, type(layer).__name__, message):
            layer(x)
    with raises(ValueError, message):
        js.ops.conv(x, jnp.ones((27, 32, 8)), kernel_size=3)


def test_array_in_place_of_a_tensor():
    with raises(TypeError, "SubMConv", "`x` must be a SparseTensor", "Array"):
        js.nn.SubMConv(4, 8, 3, rngs=RNGS)(jnp.ones((3, 4)))


def test_float_coordinates():
    with raises(TypeError, "`coords`", "float32", "jaxsparse.voxelize"):
        js.SparseTensor(jnp.zeros((3, 4)), jnp.ones((3, 2)))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 6)])
def test_coordinates_of_wrong_shape(shape):
    with raises(ValueError, "`coords` must be [N, 1 + D]", str(shape)):
        js.SparseTensor(jnp.zeros(shape, jnp.int32), jnp.ones((3, 2)))


def test_features_of_wrong_shape_or_dtype():
    coords = jnp.zeros((3, 4), jnp.int32)
    with raises(ValueError, "`feats` must be [3, C]", "(4, 2)"):
        js.SparseTensor(coords, jnp.ones((4, 2)))
    with raises(TypeError, "`feats`", "int32", "float32, bfloat16, float16, float64", ".astype"):
        js.SparseTensor(coords, jnp.ones((3, 2), jnp.int32))


def test_static_facts_given_twice():
    x = random_tensor(0)
    with raises(ValueError, "`coords` is a Sites"):
        js.SparseTensor(x.sites, x.feats, count=3)


def test_kernel_of_wrong_shape():
    x = random_tensor(0)
    with raises(ValueError, "`kernel` of shape (8, 3, 4)", "K = 27"):
        js.ops.conv(x, jnp.ones((8, 3, 4)), kernel_size=3)
    with raises(ValueError, "`bias` of shape (5,)", "[4]"):
        js.ops.conv(x, jnp.ones((27, 3, 4)), jnp.ones(5), kernel_size=3)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"kernel_size": 0}, ("`kernel_size` (=0)", "at least 1")),
        ({"kernel_size": (3, 3)}, ("`kernel_size` (=(3, 3))", "3 spatial axes")),
        ({"kernel_size": 2.5}, ("`kernel_size` (=2.5)", "integer")),
        ({"kernel_size": 100}, ("`kernel_size` (=100)", "1000000 taps", "65536")),
        ({"dilation": 0}, ("`dilation` (=0)",)),
        ({"strides": 2}, ("`strides` (=2)", "submanifold", "reachable")),
        ({"sites": "all"}, ("`sites` (='all')", "reachable", "floor")),
        ({"implementation": "cuda"}, ("`implementation` (='cuda')", '"xla"')),
        ({"precision": "exact"}, ("`precision` (='exact')", "highest")),
    ],
)
def test_options_that_are_none(options, parts):
    x = random_tensor(0)
    with raises((TypeError, ValueError), *parts):
        js.ops.conv(x, jnp.ones((27, 3, 4)), **{"kernel_size": 3, **options})


def test_config_out_of_range():
    with raises(ValueError, "`tile_rows` (=48)", "32, 64 or 128"):
        js.ops.ConvConfig(tile_rows=48)


def test_layer_options_are_refused_when_the_layer_is_made():
    with raises(ValueError, "`in_features` (=0)"):
        js.nn.SubMConv(0, 8, 3, rngs=RNGS)
    with raises(ValueError, "SubMConv", "`strides` (=(2, 2, 2))", "SparseConv"):
        js.nn.SubMConv(4, 8, 3, strides=2, rngs=RNGS)
    with raises(ValueError, "SparseConv", "`sites` (='same')"):
        js.nn.SparseConv(4, 8, 3, sites="same", rngs=RNGS)
    with raises(ValueError, "`momentum` (=1.5)"):
        js.nn.BatchNorm(4, momentum=1.5, rngs=RNGS)
    with raises(TypeError, "colour"):
        js.nn.SubMConv(4, 8, 3, colour="red", rngs=RNGS)


def test_transposed_layer_without_like():
    x = random_tensor(0)
    for layer in (js.nn.SparseConvTranspose, js.nn.SparseInverseConv):
        with raises(ValueError, layer.__name__, "`like` is missing", "up(x, like=skip)"):
            layer(3, 4, 2, strides=2, rngs=RNGS)(x)


def test_grids_that_do_not_fit():
    x = random_tensor(0)
    with raises(ValueError, "`strides` (=(2, 2, 2))", "(1, 1, 1)", "(2, 2, 2)"):
        js.nn.SparseConvTranspose(3, 4, 2, strides=2, rngs=RNGS)(x, like=x)


def test_addition_of_different_shapes():
    x, y = random_tensor(0, capacity=80), random_tensor(0, capacity=90)
    with raises(ValueError, "add", "(80, 4)", "(90, 4)"):
        x + y
    with raises(ValueError, "equal features", "3 and 5"):
        js.ops.add(x, x.with_feats(jnp.ones((80, 5))))
    with raises(ValueError, "concatenate", "empty"):
        js.ops.concatenate([])


def test_dense_form_without_its_sizes():
    with raises(ValueError, "`batch_size` (=None)", "`bounds` (=None)"):
        random_tensor(0).to_dense()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"reduce": "median"}, ("`reduce` (='median')", "mean")),
        ({"capacity": 0}, ("`capacity` (=0)", "at least 1")),
        ({"voxel_size": -1.0}, ("`voxel_size` (=-1.0)", "positive")),
        ({"points": POINTS[:, 0]}, ("`points` must be [P, D]", "(50,)")),
        ({"feats": POINTS[:40]}, ("`feats` must be [50, C]", "(40, 3)")),
        ({"batch": jnp.zeros(50)}, ("`batch` must be integers [50]", "float32")),
        ({"points": POINTS.astype(np.int32)}, ("`points`", "int32")),
    ],
)
def test_voxelize_arguments(options, parts):
    arguments = {"points": POINTS, "feats": POINTS, "voxel_size": 0.5, "capacity": 64, **options}
    with raises((TypeError, ValueError), *parts):
        js.voxelize(**arguments)


def test_collate_and_capacities_arguments():
    with raises(ValueError, "collate", "empty"):
        js.collate([])
    with raises(ValueError, "collate", "share"):
        js.collate([random_tensor(0, features=3), random_tensor(0, features=4)])
    with raises(ValueError, "capacities", "empty"):
        js.capacities(lambda x: x, [])


# --- what only values tell, raised by check ---


def test_coordinate_outside_the_key_range():
    x = tensor([[0, 0, 0, 0], [0, 131_072, 0, 0]])
    with raises(js.SiteError, "1 rows have a coordinate outside [-131072, 131072)", "origin"):
        x.check()
    tensor([[0, 131_071, -131_072, 0]]).check()


def test_duplicate_sites():
    with raises(js.SiteError, "`coords`", "2 rows whose site another row has already", "jaxsparse.voxelize"):
        tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 2, 1, 1], [0, 1, 1, 1]]).check()


@pytest.mark.parametrize(("batch", "batch_size"), [(-1, None), (-1, 2), (2, 2), (1023, None)])
def test_batch_index_out_of_range(batch, batch_size):
    x = tensor([[0, 0, 0, 0], [batch, 0, 0, 0]], batch_size=batch_size)
    with raises(js.SiteError, "1 rows of `coords` have a batch index", f"[0, {batch_size or 1023})", "`batch_size`"):
        x.check()


def test_sites_outside_bounds():
    with raises(js.SiteError, "1 rows of `coords` lie outside `bounds`"):
        tensor([[0, 0, 0, 0], [0, 4, 0, 0]], bounds=(4, 4, 4)).check()


def test_count_out_of_range():
    with raises(js.SiteError, "`count` (=5)", "[0, 2]"):
        tensor([[0, 0, 0, 0], [0, 1, 0, 0]], count=5).check()


def test_voxelize_overflow():
    x, index = js.voxelize(POINTS, POINTS, 0.5, capacity=8)
    found = len(np.unique(np.floor(POINTS * np.float32(2)), axis=0))
    with raises(js.SiteError, f"voxelize: {found} voxels", "`capacity` (=8)", f"at least {found}"):
        x.check()
    assert (index < 8).all()
    assert int(x.count) == 8


def test_strided_layer_overflow_is_carried_through_later_layers():
    x = random_tensor(0, rows=60)
    down = js.nn.SparseConv(3, 4, 3, strides=2, capacity=10, rngs=RNGS)
    conv = js.nn.SubMConv(4, 3, 3, rngs=RNGS)
    up = js.nn.SparseConvTranspose(3, 3, 3, strides=2, rngs=RNGS)

    @jax.jit
    def run(x):
        return js.ops.relu(up(conv(down(x)), like=x) + x)

    y = run(x)
    with raises(js.SiteError, "grid with stride (2, 2, 2)", "capacity (=10)", "jaxsparse.capacities"):
        y.check()
    x.check()
    assert np.isfinite(y.feats).all()


def test_non_finite_points():
    points = POINTS.copy()
    points[3] = np.nan
    points[5, 1] = np.inf
    x, index = js.voxelize(points, points, 0.5, capacity=64)
    with raises(js.SiteError, "2 rows of `points` are not finite", "`count`"):
        x.check()
    assert index[3] == -1
    assert index[5] == -1
    assert np.isfinite(x.feats).all()


def test_point_outside_the_key_range():
    points = POINTS.copy()
    points[0] = 1e9
    with raises(js.SiteError, "1 rows have a coordinate outside"):
        js.voxelize(points, points, 0.5, capacity=64)[0].check()


def test_point_with_a_wrong_batch_index():
    batch = jnp.zeros(50, jnp.int32).at[0].set(2).at[1].set(-1)
    x, index = js.voxelize(POINTS, POINTS, 0.5, capacity=64, batch=batch, batch_size=2)
    with raises(js.SiteError, "2 rows", "batch index", "[0, 2)"):
        x.check()
    assert (index[:2] == -1).all()


def test_unequal_sites_in_an_addition():
    x, y = tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), tensor([[0, 0, 0, 0], [0, 2, 0, 0]])
    for joined in (x + y, js.ops.concatenate([x, y])):
        with raises(js.SiteError, "1 rows of the two tensors have different sites"):
            joined.check()
    (x + tensor([[0, 0, 0, 0], [0, 1, 0, 0]])).check()


def test_dense_overflow():
    with raises(js.SiteError, "from_dense: 27 nonzero sites", "`capacity` (=4)"):
        js.SparseTensor.from_dense(jnp.ones((1, 3, 3, 3, 2)), capacity=4).check()


def test_first_problem_is_the_one_reported():
    x = tensor([[0, 1, 1, 1], [0, 1, 1, 1], [5, 2, 1, 1]], batch_size=2)
    y = js.nn.SparseConv(4, 4, 3, strides=2, capacity=1, rngs=RNGS)(x)
    with raises(js.SiteError, "batch index"):
        y.check()
