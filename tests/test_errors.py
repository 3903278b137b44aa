"""Bad input that shapes, dtypes and options tell: an error at once, which names argument, value and remedy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from jax import lax
from scenes import random_tensor

import jaxsparse as js
from jaxsparse._dtypes import canonical_precision
from jaxsparse.geometry import Geometry

RNGS = nnx.Rngs(0)
POINTS = np.random.default_rng(0).uniform(-3, 3, (50, 3)).astype(np.float32)


def test_wrong_feature_width():
    x = random_tensor(0, features=48)
    message = f"(=32) must be 48, the features of x (shape {x.feats.shape})"
    for layer, argument in (
        (js.nn.SubMConv(32, 8, 3, rngs=RNGS), "in_features"),
        (js.nn.Linear(32, 8, rngs=RNGS), "in_features"),
        (js.nn.BatchNorm(32, rngs=RNGS), "num_features"),
    ):
        with raises(ValueError, type(layer).__name__, f"`{argument}` {message}"):
            layer(x)
    with raises(ValueError, "conv: `kernel` of shape (27, 32, 8)", "x has 48"):
        js.ops.conv(x, jnp.ones((27, 32, 8)), kernel_size=3)
    with raises(ValueError, "linear: `bias` of shape (1,) must be [8]"):
        js.ops.linear(x, jnp.ones((48, 8)), jnp.ones(1))
    with raises(ValueError, "batch_norm: `scale` of shape (1,) must be [48]"):
        js.ops.batch_norm(x, jnp.ones(48), jnp.ones(48), jnp.ones(1))
    with raises(ValueError, "batch_norm: `activation` (='relu6')", "leaky_relu"):
        js.ops.batch_norm(x, jnp.ones(48), jnp.ones(48), activation="relu6")


def test_array_in_place_of_a_tensor():
    x = jnp.ones((3, 4))
    for name, op in (
        ("SubMConv", js.nn.SubMConv(4, 8, 3, rngs=RNGS)),
        ("relu", js.nn.ReLU()),
        ("silu", js.ops.silu),
        ("conv", lambda x: js.ops.conv(x, jnp.ones((27, 4, 4)), kernel_size=3)),
        ("conv_transpose", lambda x: js.ops.conv_transpose(x, jnp.ones((27, 4, 4)), like=x, kernel_size=3)),
        ("linear", lambda x: js.ops.linear(x, x.T)),
        ("batch_statistics", js.ops.batch_statistics),
        ("batch_norm", lambda x: js.ops.batch_norm(x, x[0], x[0])),
        ("capacities", lambda x: js.capacities(js.ops.relu, [x])),
    ):
        with raises(TypeError, f"{name}: expected a SparseTensor, got Array"):
            op(x)


def test_several_tensors_in_one():
    x = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), random_tensor(0))
    for op in (js.nn.SubMConv(3, 8, 3, rngs=RNGS), js.ops.relu, js.SparseTensor.rows, lambda x: x + x):
        with raises(ValueError, "leading axes (2,)", "jax.vmap"):
            op(x)
    one, conv, up = (
        random_tensor(0),
        js.nn.SparseConv(3, 8, 2, rngs=RNGS),
        js.nn.SparseConvTranspose(3, 8, 2, rngs=RNGS),
    )
    for layer in (conv, up):
        with raises(ValueError, "leading axes (2,)", "jax.vmap"):
            layer(one, like=x)
    with raises(ValueError, "devoxelize", "leading axes (2,)", "jax.vmap"):
        js.devoxelize(x, jnp.zeros(3, jnp.int32))


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
    for dtype in (jnp.complex64, jnp.float8_e4m3fn, bool):
        with raises(TypeError, "`feats`", jnp.dtype(dtype).name):
            js.SparseTensor(coords, jnp.ones((3, 2), dtype))


def test_wide_integers_never_wrap():
    feats = jnp.ones((2, 1))
    for wide in (2**32, 2**31, -(2**31) - 1):
        with raises(ValueError, "`coords`", str(wide), "int32"):
            js.SparseTensor(np.array([[0, 0, 0, 0], [0, wide, 0, 0]]), feats)
        with raises(ValueError, "`batch`", str(wide), "int32"):
            js.voxelize(POINTS[:2], feats, 0.5, capacity=8, batch=np.array([0, wide]))
    np.testing.assert_array_equal(js.SparseTensor(np.array([[0, -5], [0, 2]]), feats).coords, [[0, -5], [0, 2]])


@pytest.mark.parametrize(
    ("count", "described"), [(1.5, "float32[]"), (np.array([3]), "int32[1]"), (True, "bool[]")], ids=str
)
def test_count_that_is_no_integer(count, described):
    with raises(ValueError, "`count` must be an integer scalar", described):
        js.SparseTensor(jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 2)), count)
    with raises(ValueError, "`count` must be an integer scalar", described):
        js.voxelize(POINTS, POINTS, 0.5, capacity=8, count=count)


@pytest.mark.parametrize("batch_size", [0, -1, 1024, 2.5, "2"])
def test_batch_size_that_keys_do_not_hold(batch_size):
    message = f"`batch_size` (={batch_size!r}) must be 1 to 1023 in 3 dimensions"
    with raises(ValueError, message):
        js.SparseTensor(jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 2)), batch_size=batch_size)
    with raises(ValueError, message):
        js.voxelize(POINTS, POINTS, 0.5, capacity=8, batch_size=batch_size)
    scene = js.SparseTensor(jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 1)))
    with raises(ValueError, "`batch_size` (=256)", "255", "4 dimensions"):
        js.collate([scene] * 256)


@pytest.mark.parametrize("size", [2**30 + 1, 2**31])
def test_bounds_that_coordinates_do_not_reach(size):
    message = f"`bounds` (=({size}, 8, 8)) must be at most 2^30"
    with raises(ValueError, message):
        js.SparseTensor(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 2)), bounds=(size, 8, 8))
    with raises(ValueError, message):
        js.voxelize(POINTS, POINTS, 0.5, capacity=8, bounds=(size, 8, 8))
    x = js.SparseTensor(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 2)), bounds=(2**30, 8, 8))
    y = js.nn.SparseConv(2, 2, 3, padding=2**30, rngs=RNGS)(x)
    assert y.bounds[0] == 2**30


@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_capacity_that_is_no_number_of_rows(capacity):
    x = random_tensor(0)
    message = f"`capacity` (={capacity}) must be an integer, at least 1"
    for make in (
        lambda: js.voxelize(POINTS, POINTS, 0.5, capacity=capacity),
        lambda: js.collate([x], capacity),
        lambda: js.SparseTensor.from_dense(jnp.ones((1, 2, 2, 1)), capacity),
        lambda: js.ops.conv(x, jnp.ones((8, 3, 3)), kernel_size=2, strides=2, sites="floor", capacity=capacity),
        lambda: js.nn.SparseConv(3, 3, 2, strides=2, capacity=capacity, rngs=RNGS),
    ):
        with raises(ValueError, message):
            make()
    with raises(ValueError, f"the capacity of grid (2, 2) (={capacity})"):
        js.Capacities({(2, 2): capacity})


def test_capacities_that_are_none():
    coords, feats = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 1))
    for make in (
        lambda plan: js.SparseTensor(coords, feats, capacities=plan),
        lambda plan: js.voxelize(POINTS, POINTS, 0.5, capacity=64, capacities=plan),
        lambda plan: js.SparseTensor.from_dense(jnp.ones((1, 2, 2, 2, 1)), 8, capacities=plan),
    ):
        with raises(TypeError, "`capacities` must be a Capacities, got dict", "jaxsparse.Capacities"):
            make({(2, 2, 2): 64})
        with raises(ValueError, "`capacities` has the grid (2, 2)", "3 entries"):
            make(js.Capacities({(2, 2): 64}))


def test_values_read_while_a_function_is_traced():
    x = random_tensor(0)
    for read in (lambda x: x.check(), lambda x: x.rows(), lambda x: js.status.check(x.status)):
        with raises(TypeError, "while it is traced", "return `y.status`", "jaxsparse.status.check"):
            jax.jit(read)(x)


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
        ({"sites": np.zeros((3, 4))}, ("`sites` must be a Sites", "ndarray", "y.sites")),
        ({"capacity": 7}, ("`capacity` (=7)", "sites that are made")),
        ({"norm": js.nn.BatchNorm(4, rngs=RNGS)}, ("`norm` must be a ChannelNorm", "BatchNorm")),
        ({"norm": js.ops.ChannelNorm(scale=jnp.ones(5)), "bias": jnp.ones(4)}, ("`norm.scale` of shape (5,)", "[4]")),
        ({"norm": js.ops.ChannelNorm(mean=jnp.ones(5)), "bias": jnp.ones(4)}, ("`norm.mean` of shape (5,)", "[4]")),
        ({"config": "fast"}, ("`config` (='fast')", "ConvConfig")),
        ({"kernel_map": (1, 2)}, ("`kernel_map` must be a KernelMap", "tuple")),
        ({"implementation": "cuda"}, ("`implementation` (='cuda')", '"xla"')),
        ({"precision": "exact"}, ("`precision` (='exact')", "highest")),
        ({"padding": (1, 2)}, ("`padding` (=(1, 2))", "3 spatial axes")),
        ({"padding": 2**30 + 1}, ("`padding`", "1073741825 cells", "2^30")),
        ({"dilation": 2**30 + 1}, ("`dilation`", "`kernel_size` (=(3, 3, 3))", "2^30")),
    ],
)
def test_options_that_are_none(options, parts):
    x = random_tensor(0)
    with raises((TypeError, ValueError), *parts):
        js.ops.conv(x, jnp.ones((27, 3, 4)), **{"kernel_size": 3, **options})


def test_weights_that_are_none():
    x = random_tensor(0)
    for shape in ((27, 3, 0), (27, 0, 4)):
        with raises(ValueError, f"conv: `kernel` of shape {shape} is empty"):
            js.ops.conv(x, jnp.ones(shape), kernel_size=3)
    with raises(TypeError, "linear: `kernel` has dtype complex64"):
        js.ops.linear(x, jnp.full((3, 1), 1j))
    with raises(ValueError, "linear: `kernel` of shape (3, 0) is empty"):
        js.ops.linear(x, jnp.ones((3, 0)))


def test_window_that_bounds_do_not_hold():
    x = js.SparseTensor(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 3)), bounds=(2,))
    with raises(ValueError, "`bounds` (=(2,))", "`kernel_size` (=(5,))", "`padding` (=(0,))"):
        js.nn.SparseConv(3, 4, 5, padding=0, dims=1, rngs=RNGS)(x)


def test_strides_beyond_int32():
    with raises(ValueError, "`stride` (=(2147483647, 2147483647, 2147483647))", "2^30"):
        js.SparseTensor(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 3)), stride=2**31 - 1)
    x = js.SparseTensor(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 3)), stride=2**30)
    with raises(ValueError, "`strides`", "2^30"):
        js.nn.SparseConv(3, 4, 2, strides=2, rngs=RNGS)(x)


def test_status_of_something_else():
    with raises(TypeError, "check: `status`", "got SparseTensor", "x.check()"):
        js.status.check(random_tensor(0))


def test_config_out_of_range():
    with raises(ValueError, "`tile_rows` (=48)", "32, 64 or 128"):
        js.ops.ConvConfig(tile_rows=48)
    with raises(ValueError, "`tile_rows` (=32.0)", "32, 64 or 128"):
        js.ops.ConvConfig(tile_rows=32.0)
    with raises(ValueError, "`sort` (='yes')", "True, False or None"):
        js.ops.ConvConfig(sort="yes")
    with raises(ValueError, "`forward` (=(8, 8, 8, 8))", "(64, 64, 4, 1)"):
        js.ops.ConvConfig(forward=(8, 8, 8, 8))


def test_a_tile_may_be_given_as_a_plain_tuple():
    tile = js.ops.ConvConfig(forward=(64, 64, 4, 1)).forward
    assert (tile.rows, tile.cols, tile.stages, tile.splits) == (64, 64, 4, 1)


def test_layer_options_are_refused_when_the_layer_is_made():
    for width in (0, 4.0):
        with raises(ValueError, f"`in_features` (={width})", "integers, at least 1"):
            js.nn.SubMConv(width, 8, 3, rngs=RNGS)
    with raises(ValueError, "`dims` (=5)"):
        js.nn.SubMConv(4, 8, 3, dims=5, rngs=RNGS)
    with raises(ValueError, "`precision` (='exact')"):
        js.nn.Linear(4, 8, precision="exact", rngs=RNGS)
    with raises(ValueError, "SubMConv", "`strides` (=(2, 2, 2))", "SparseConv"):
        js.nn.SubMConv(4, 8, 3, strides=2, rngs=RNGS)
    with raises(TypeError, "`config` (='fast')", "ConvConfig"):
        js.nn.SubMConv(4, 8, 3, config="fast", rngs=RNGS)
    with raises(ValueError, "`width` (=nan)"):
        js.models.SparseResUNet42(4, width=float("nan"), rngs=RNGS)
    with raises(ValueError, "SparseConv", "`sites` (='same')"):
        js.nn.SparseConv(4, 8, 3, sites="same", rngs=RNGS)
    with raises(ValueError, "`momentum` (=1.5)"):
        js.nn.BatchNorm(4, momentum=1.5, rngs=RNGS)
    with raises(ValueError, "`num_features` (=2.5) must be an integer"):
        js.nn.BatchNorm(2.5, rngs=RNGS)
    with raises(TypeError, "colour"):
        js.nn.SubMConv(4, 8, 3, colour="red", rngs=RNGS)


@pytest.mark.parametrize("is_training", [True, False])
def test_what_follows_a_layer_is_honoured_or_refused(is_training):
    x = random_tensor(0)
    conv, norm = js.nn.SubMConv(3, 4, 3, rngs=RNGS), js.nn.BatchNorm(4, use_running_average=not is_training, rngs=RNGS)
    with raises(TypeError, "activtion"):
        conv(x, activtion="relu")
    with raises(ValueError, "`activation` (='relu6')", "leaky_relu"):
        conv(x, norm=norm, activation="relu6")
    with raises(
        TypeError, "SubMConv: `norm` must be a jaxsparse.nn.BatchNorm, got jaxsparse.ops.channel_norm.ChannelNorm"
    ):
        conv(x, norm=js.ops.ChannelNorm())
    with raises(ValueError, "5", "4"):
        conv(x, norm=js.nn.BatchNorm(5, use_running_average=not is_training, rngs=RNGS))
    with raises(TypeError, "expected a SparseTensor, got Array"):
        conv(x, norm=norm, residual=jnp.ones((x.capacity, 4)))


def test_layer_of_other_dimensions():
    with raises(ValueError, "SubMConv: made for 3 spatial axes, but x has 2; set dims=2"):
        js.nn.SubMConv(3, 4, 3, rngs=RNGS)(random_tensor(0, dims=2))


def test_transposed_layer_without_like():
    x = random_tensor(0)
    for layer in (js.nn.SparseConvTranspose, js.nn.SparseInverseConv):
        with raises(ValueError, layer.__name__, "`like` is missing", "up(x, like=skip)"):
            layer(3, 4, 2, strides=2, rngs=RNGS)(x)


def test_capacity_of_sites_that_are_given():
    x = random_tensor(0)
    with raises(ValueError, "`capacity` (=9) is for sites that are made"):
        js.nn.SparseConv(3, 4, 3, capacity=9, rngs=RNGS)(x, like=x)


def test_vectors_of_channels():
    x, ones = random_tensor(0), [1.0, 1.0, 1.0]
    y = js.ops.batch_norm(x, ones, ones, ones, ones)
    np.testing.assert_array_equal(y.feats, js.ops.batch_norm(x, *[jnp.ones(3)] * 4).feats)
    kernel, norm = jnp.ones((27, 3, 3)), js.ops.ChannelNorm(scale=ones)
    js.ops.conv(x, kernel, ones, kernel_size=3, norm=norm)
    with raises(TypeError, "`norm.mean` has dtype int32", "floats"):
        js.ops.conv(x, kernel, kernel_size=3, norm=js.ops.ChannelNorm(mean=jnp.ones(3, jnp.int32)))
    with raises(ValueError, "`scale` of shape (2,) must be [3]"):
        js.ops.batch_norm(x, ones, ones, [1.0, 1.0])


def test_grids_that_do_not_fit():
    x = random_tensor(0)
    with raises(ValueError, "`strides` (=(2, 2, 2))", "(1, 1, 1)", "(2, 2, 2)"):
        js.nn.SparseConvTranspose(3, 4, 2, strides=2, rngs=RNGS)(x, like=x)


def test_sites_of_other_dimensions():
    x, flat = random_tensor(0), random_tensor(0, dims=2)
    with raises(ValueError, "fine sites have 3 spatial axes", "coarse sites have 2"):
        js.kernel_map(x.sites, flat.sites, 3)
    with raises(ValueError, "fine sites have 2 spatial axes", "coarse sites have 3"):
        js.nn.SparseConvTranspose(3, 4, 3, rngs=RNGS)(x, like=flat)


def test_something_else_in_place_of_a_tensor_or_sites():
    x = random_tensor(0)
    with raises(TypeError, "`in_sites` must be a Sites, got SparseTensor", "x.sites"):
        js.kernel_map(x, x, 3)
    with raises(ValueError, "`like` must be the SparseTensor or Sites", "got int"):
        js.nn.SparseConvTranspose(3, 4, 3, rngs=RNGS)(x, like=3)
    with raises(TypeError, "unsupported operand", "'SparseTensor' and 'float'"):
        x + 1.0
    for join in (js.ops.concatenate, js.collate):
        with raises(TypeError, join.__name__, "SparseTensor", "ndarray"):
            join([x, np.ones((3, 3))])


def test_rows_and_indices_that_do_not_fit():
    index = jnp.zeros(3, jnp.int32)
    with raises(ValueError, "`index` must be int32 [P]", "float32[3]"):
        js.devoxelize(jnp.ones((3, 2)), jnp.zeros(3))
    with raises(ValueError, "`index` holds integers", "do not fit int32"):
        js.devoxelize(jnp.ones((3, 2)), np.array([2**32 + 2]))
    with raises(ValueError, "`index` must be int32 [P]", "int32[3, 1]"):
        js.ops.gather_rows(jnp.ones((3, 2)), index[:, None])
    with raises(ValueError, "`x` must be [rows, C]", "(3,)"):
        js.ops.sum_rows(jnp.ones(3), index, 2)
    with raises(ValueError, "sum_rows", "4 rows", "`index` has 3"):
        js.ops.sum_rows(jnp.ones((4, 2)), index, 2)


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


@pytest.mark.parametrize("shape", [(3, 2), (1, 2, 2, 2, 2, 2, 1), (0, 2, 1), (1, 4, 0, 1)], ids=str)
def test_dense_array_of_wrong_shape(shape):
    with raises(ValueError, "`dense` must be [B, *grid, C]", str(shape)):
        js.SparseTensor.from_dense(jnp.ones(shape), 4)


def test_dense_array_beyond_the_key_range():
    with raises(ValueError, "(1, 8193, 1, 1, 1, 1)", "8192"):
        js.SparseTensor.from_dense(jnp.zeros((1, 8193, 1, 1, 1, 1)), 4)
    with raises(ValueError, "`batch_size` (=256)"):
        js.SparseTensor.from_dense(jnp.zeros((256, 1, 1, 1, 1, 1)), 4)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"reduce": "median"}, ("`reduce` (='median')", "mean")),
        ({"capacity": 0}, ("`capacity` (=0)", "at least 1")),
        ({"voxel_size": -1.0}, ("`voxel_size` (=-1.0)", "positive")),
        ({"voxel_size": float("nan")}, ("`voxel_size` (=nan)", "positive")),
        ({"voxel_size": "0.5"}, ("`voxel_size` (='0.5')", "a number")),
        ({"voxel_size": (0.5, 0.5)}, ("`voxel_size` (=(0.5, 0.5))", "3 axes")),
        ({"origin": (0.0, 0.0)}, ("`origin` must be [3]", "(2,)")),
        ({"bounds": (4, 4)}, ("`bounds` (=(4, 4))", "3 spatial axes")),
        ({"bounds": (4, 4, 0)}, ("`bounds` (=(4, 4, 0))", "at least 1")),
        ({"implementation": "triton"}, ("`implementation` (='triton')",)),
        ({"batch": np.zeros(49, int)}, ("`batch` must be int32 [50]", "[49]")),
        ({"points": POINTS[:, 0]}, ("`points` must be [P, D]", "(50,)")),
        ({"feats": POINTS[:40]}, ("`feats` must be [50, C]", "(40, 3)")),
        ({"batch": jnp.zeros(50)}, ("`batch` must be int32 [50]", "float32")),
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
    with raises(TypeError, "capacities: `samples`", "pass [x]"):
        js.capacities(lambda x: x, random_tensor(0))
    with raises(TypeError, "got a single ArrayImpl", "pass [x]"):
        js.capacities(lambda x: x, jnp.ones(3))
    for slack in (0.5, float("nan")):
        with raises(ValueError, f"`slack` (={slack})"):
            js.capacities(lambda x: x, [random_tensor(0)], slack=slack)
    with raises(ValueError, "`multiple` (=1.5)"):
        js.capacities(lambda x: x, [random_tensor(0)], multiple=1.5)
    with raises(TypeError, "autotune: `samples`", "samples=[x]"):
        js.autotune(lambda x: x, random_tensor(0), samples=random_tensor(0))
    with raises(js.SiteError, "another row has already"):
        js.capacities(lambda x: x, [js.SparseTensor(jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 1)))])
    with raises(TypeError, "grid strides", "2"):
        js.Capacities({2: 5})


def test_maps_of_other_sites_or_geometry():
    x, other = random_tensor(0), random_tensor(1, rows=40)
    kernel = jnp.ones((27, 3, 4))
    m = js.kernel_map(x.sites, other.sites, 3)  # fits the output of neither call below
    with raises(ValueError, "conv: `kernel_map`", "leads from", f"from {other.capacity} rows onto {other.capacity}"):
        js.ops.conv(other, kernel, kernel_size=3, kernel_map=m)
    with raises(ValueError, "conv_transpose: `kernel_map`", "build it from the sites"):
        js.ops.conv_transpose(other, kernel, like=other, kernel_size=3, kernel_map=m)
    m = js.kernel_map(x.sites, x.sites, 3)
    with raises(ValueError, "conv: `kernel_map` is that of", "dilation=(1, 1, 1)", "dilation=(2, 2, 2)"):
        js.ops.conv(x, kernel, kernel_size=3, dilation=2, kernel_map=m)
    with raises(ValueError, "on a grid with stride (2, 2, 2)"):
        coarse = js.SparseTensor(x.coords, x.feats, stride=2)
        js.ops.conv(coarse, kernel, kernel_size=3, kernel_map=m)
    fewer = js.SparseTensor(x.coords, x.feats, count=x.capacity - 5)
    y = js.ops.conv(fewer, kernel, kernel_size=3, kernel_map=m)
    with raises(js.SiteError, "`kernel_map` is that of other sites", f"{x.capacity} real rows", f"{x.capacity - 5};"):
        y.check()
    js.ops.conv(x, kernel, kernel_size=3, kernel_map=m).check()


def test_functions_of_features_that_return_something_else():
    x = random_tensor(0)
    for fn in (lambda f: f.sum(1), lambda f: f.sum(0), lambda f: f[:, None], lambda f: f[:5]):
        with raises(ValueError, "map_features: `fn` returned shape", f"[{x.capacity}, C']"):
            js.ops.map_features(fn, x)
    with raises(TypeError, "map_features: result of `fn`", "bool"):
        js.ops.map_features(lambda f: f > 0, x)


def test_voxels_of_a_coarser_grid():
    x, index = js.voxelize(jnp.asarray(POINTS), jnp.asarray(POINTS), 1.0, capacity=64)
    y = js.ops.conv(x, jnp.ones((8, 3, 3)), kernel_size=2, strides=2, sites="floor")
    with raises(ValueError, "devoxelize: `voxels`", "stride (2, 2, 2)", "SparseConvTranspose"):
        js.devoxelize(y, index)


def test_rows_by_index():
    index = jnp.zeros(3, jnp.int32)
    with raises(TypeError, "`sum_rows: x` has dtype int32", "float32"):
        js.ops.sum_rows(jnp.ones((3, 1), jnp.int32), index, 1)
    with raises(ValueError, "sum_rows: `groups` (=-1)"):
        js.ops.sum_rows(jnp.ones((3, 1)), index, -1)
    for call in (js.ops.gather_rows, functools.partial(js.ops.sum_rows, groups=1)):
        with raises(ValueError, "`implementation` (='XLA')"):
            call(jnp.ones((3, 1)), index, implementation="XLA")
    with raises(ValueError, "`implementation` (='XLA')"):
        random_tensor(0).sites.coarse(Geometry.create(3, 2, 2), "floor", implementation="XLA")
    assert js.ops.gather_rows(jnp.ones((3, 1), bool), index).dtype == bool


def test_scenes_that_are_stacked_or_planned_apart():
    sites, feats = np.eye(3, 4, k=1, dtype=np.int32), np.ones((3, 2), np.float32)
    scene = js.SparseTensor(sites, feats, batch_size=1, bounds=(4, 4, 4))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[scene] * 3)
    for call in (stacked.to_dense, lambda: stacked.with_feats(stacked.feats)):
        with raises(ValueError, "leading axes (3,)", "vmap"):
            call()
    with raises(ValueError, "`in_sites` has leading axes (3,)", "vmap"):
        js.kernel_map(stacked.sites, stacked.sites, 3)
    plan = js.Capacities({(2, 2, 2): 8})
    planned = js.SparseTensor(sites, feats, capacities=plan)
    with raises(ValueError, "collate: tensors must share `capacities`", "Capacities({(2, 2, 2): 8})"):
        js.collate([planned, js.SparseTensor(planned.coords, planned.feats)])
    with raises(TypeError, "collate: `tensors`", "pass [x]"):
        js.collate(planned)


def test_numpy_sizes_and_counts():
    layer = js.nn.SubMConv(2, 2, np.array([3, 3]), rngs=RNGS)
    assert layer.kernel_size == (3, 3)
    x = random_tensor(0)
    with raises(ValueError, "`coords` is a Sites"):
        js.SparseTensor(x.sites, x.feats, stride=np.array([1, 1, 1]))
    with raises(ValueError, "`count`", "int32"):
        js.voxelize(jnp.asarray(POINTS), jnp.asarray(POINTS), 1.0, capacity=64, count=np.int64(2**32 + 5))
    with raises(TypeError, "conv: `kernel` has dtype complex64"):
        js.ops.conv(x, jnp.ones((27, 3, 4), jnp.complex64), kernel_size=3)


@pytest.mark.parametrize(
    ("precision", "meant"),
    [
        (lax.DotAlgorithmPreset.F32_F32_F32, lax.Precision.HIGHEST),
        ("BF16_BF16_F32_X3", lax.Precision.HIGH),
        ("TF32_TF32_F32", lax.Precision.DEFAULT),
        (("default", "highest"), lax.Precision.HIGHEST),
    ],
)
def test_precisions_as_jax_spells_them(precision, meant):
    assert canonical_precision(precision) == meant
    if isinstance(precision, str):
        with jax.default_matmul_precision(precision):
            assert canonical_precision(None) == meant
