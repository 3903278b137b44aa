"""The whole search, on the CPU's candidates: what it finds in a function, what wins, what never may, the report."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from jax import lax
from scenes import quick_rngs, random_kernel, random_tensor

import jaxsparse as js
from jaxsparse import _ffi, _native
from jaxsparse.geometry import Geometry
from jaxsparse.ops.conv import choices as conv_choices
from jaxsparse.tuning import TuningResult, choice, measure, search, store, synthetic, work
from jaxsparse.tuning import __main__ as command
from jaxsparse.tuning.key import Choices
from jaxsparse.tuning.record import record
from jaxsparse.tuning.work import divide

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choices of the CPU's kernels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.forget()
    yield
    store.forget()


def scene(seed=0, features=4):
    """Sorted sites, so that maps have two builders."""
    x = random_tensor(seed, rows=200, features=features, low=-4, high=5)
    y, _ = js.voxelize(
        x.coords[:, 1:].astype(jnp.float32) + 0.5, x.feats, 1.0, capacity=256, batch=x.coords[:, 0], batch_size=2
    )
    return y.check()


class Net(nnx.Module):
    """Two layers on one map, one down, one up."""

    def __init__(self):
        options = {"use_bias": False, "rngs": quick_rngs()}
        self.first, self.second = (js.nn.SubMConv(4, 4, 3, **options) for _ in range(2))
        self.down = js.nn.SparseConv(4, 8, 2, strides=2, **options)
        self.up = js.nn.SparseConvTranspose(8, 4, 2, strides=2, **options)

    def __call__(self, x):
        x = self.second(self.first(x))
        return self.up(self.down(x), like=x)


def tune(fn, *args, **options):
    return js.autotune(fn, *args, progress=False, **options)


# --- what is found in a function ---


def products(recorded):
    return [sorted((layer.op, n) for layer, n in layers.items()) for layers in recorded.layers]


def test_layers_are_grouped_by_map_however_the_function_is_wrapped():
    net, x = Net(), scene()
    graph, state = nnx.split(net)
    inference = [[("forward", 2)], [("dgrad", 1), ("forward", 1)]]
    for fn, args in (
        (net, (x,)),
        (nnx.jit(lambda net, x: net(x).feats), (net, x)),
        (jax.jit(lambda state, x: nnx.merge(graph, state)(x)), (state, x)),
        (jax.jit(lambda state, x: jax.jit(jax.checkpoint(nnx.merge(graph, state)))(x)), (state, x)),
    ):
        recorded = record(fn, [args])
        assert products(recorded) == inference
        assert recorded.unseen == 0
    step = jax.jit(jax.value_and_grad(lambda state, x: (nnx.merge(graph, state)(x).feats ** 2).sum()))
    assert products(record(step, [(state, x)])) == [
        [("dgrad", 1), ("forward", 2), ("wgrad", 2)],
        [("dgrad", 2), ("forward", 2), ("wgrad", 2)],  # the two layers are each other's gradients
    ]


def test_what_follows_a_product_changes_nothing_about_its_choice():
    x, kernel = scene(), random_kernel(0, Geometry.create(3, 3), 4, 4)

    def f(x, transposed, after):
        if transposed:
            return js.ops.conv_transpose(x, kernel, like=x, kernel_size=3, **after).feats
        return js.ops.conv(x, kernel, kernel_size=3, **after).feats

    for transposed in (False, True):
        plain, fused = (
            record(lambda x, t=transposed, a=a: f(x, t, a(x)), [(x,)])
            for a in (lambda x: {}, lambda x: {"residual": x, "activation": "relu"})
        )
        assert products(fused) == products(plain) == [[("dgrad" if transposed else "forward", 1)]]
        keys = [[list(w.tasks) for w in divide(r, "cpu", "inference")] for r in (plain, fused)]
        assert keys[0] == keys[1]
    result = tune(lambda x: f(x, False, {"residual": x, "activation": "relu"}), x, budget_s=20)
    assert [key.op for key in result.choices] == ["builder", "conv"]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_input_in_two_arrays_counts_as_their_concatenation(transposed):
    x = random_tensor(0, rows=40, capacity=48, features=16, dtype=jnp.float16)
    kernel = random_kernel(0, Geometry.create(3, 3), 16, 8, jnp.float16)

    def f(x, joins):
        y = js.ops.concatenate([x.with_feats(half) for half in jnp.split(x.feats, 2, 1)]) if joins else x
        if transposed:
            return js.ops.conv_transpose(y, kernel, like=x, kernel_size=3, activation="relu").feats
        return js.ops.conv(y, kernel, kernel_size=3, activation="relu").feats

    joined, plain = (record(lambda x, j=j: f(x, j), [(x,)]) for j in (True, False))
    assert joined.layers == plain.layers
    assert "concatenate" in str(jax.make_jaxpr(lambda x: f(x, True))(x))


def test_maps_are_those_of_the_samples():
    net, samples = Net(), [scene(seed) for seed in range(2)]
    recorded = record(net, [(x,) for x in samples])
    for x, maps in zip(samples, recorded.maps, strict=True):
        expected = js.kernel_map(x.sites, x.sites, 3)
        (operands, (table, masks, *_)) = maps[0]
        n = int(x.count)
        assert (operands[0] == x.coords).all()
        assert (table[:, :n] == expected.table[:, :n]).all()
        assert (masks[:n] == expected.masks[:n]).all()
    pairs = [int((js.kernel_map(x.sites, x.sites, 3).table[:, : int(x.count)] >= 0).sum()) for x in samples]
    assert recorded.neighbours(0, False) == pytest.approx(sum(pairs) / sum(int(x.count) for x in samples))
    assert recorded.neighbours(1, True) == pytest.approx(1.0)  # each fine site lies under one window


def test_bodies_of_loops_are_counted_and_not_seen():
    x, kernel = scene(), random_kernel(0, Geometry.create(3, 3), 4, 4)
    m = js.kernel_map(x.sites, x.sites, 3)

    def f(x, m):
        def body(feats, _):
            return js.ops.conv(x.with_feats(feats), kernel, kernel_size=3, kernel_map=m).feats, None

        return js.ops.conv(x, kernel, kernel_size=3, kernel_map=m).feats, lax.scan(body, x.feats, length=3)[0]

    recorded = record(f, [(x, m)])
    assert (products(recorded), recorded.unseen) == ([[("forward", 1)]], 1)
    result = tune(f, x, m)
    assert result.unseen == 1
    assert "not seen: 1 product" in str(result)
    assert {k.op for k in result.choices} == {"conv"}  # a map from outside is not built here


def test_samples_must_have_one_shape():
    with raises(ValueError, "`samples` differ", "pad them to one capacity"):
        tune(Net(), scene(), samples=[random_tensor(0, rows=60, features=4)])


def test_training_adds_gradients_only_where_the_function_has_none():
    net, x = Net(), scene()
    graph, state = nnx.split(net)
    step = jax.grad(lambda state, x: (nnx.merge(graph, state)(x).feats ** 2).sum())

    def counts(fn, args, mode):
        works = divide(record(fn, [args]), "cpu", mode)
        found = {}
        for part in works:
            for layers in part.layers.values():
                for layer, n in layers.items():
                    found[layer.op] = found.get(layer.op, 0) + n
        return found

    assert counts(net, (x,), "inference") == {"forward": 3, "dgrad": 1}
    assert counts(net, (x,), "training") == {"forward": 4, "dgrad": 4, "wgrad": 4}
    # The input's own gradient is not needed here.
    assert counts(step, (state, x), "training") == {"forward": 4, "dgrad": 3, "wgrad": 4}


# --- what wins ---


def test_every_decision_is_made_and_the_report_tells():
    net, x = Net(), scene()
    result = tune(net, x, samples=[scene(1)])
    assert {k.op for k in result.choices} == {"conv", "builder"}
    assert store.cached("cpu") == result.choices
    assert len(result.groups) == 1  # both maps are of the same fine sites
    (group,) = result.groups
    assert "grid 1x1x1, 256 rows, 4 products" in group.name
    assert group.total_us <= group.heuristic_us
    for decision in group.decisions:
        assert decision.chosen_us <= decision.heuristic_us
        assert not decision.rejected
    text = str(result)
    assert "conv 4 to 4, 27 taps" in text
    assert "builder" in text
    assert re.search(r"gain -?\d+ %", text)
    y = net(x).feats
    with result:
        assert jnp.abs(net(x).feats - y).max() < 1e-5


def test_tiles_are_tuned_for_each_order_of_rows(monkeypatch):
    """The quickest program may need another order and another tile, where either change alone is a loss."""
    x, kernel = scene(features=8).astype(jnp.float16), random_kernel(0, Geometry.create(3, 3), 8, 8)
    recorded = record(lambda x: js.ops.conv(x, kernel.astype(jnp.float16), kernel_size=3).feats, [(x,)])
    monkeypatch.setattr(work, "WITHIN", 1e9)
    found = search.Search(recorded, "cuda", "inference", time.perf_counter() + 60, progress=False)
    ((order,), (tile,)) = ([q for q, _ in found.works[0].shared.values() if q.key.op == "sort"], found.works[0].tasks)
    usual = order.heuristic()
    first, *_, last = work.pruned(found.works[0].tasks[tile].question, None)

    def us(choices):
        best = first if choices[order.key] == usual else last
        return (10.0 if choices[order.key] == usual else 5.0) + (10.0 if choices[tile] != best else 0.0)

    def time_layer(layer, key, candidates, maps, others, platform, expected):
        times = {c: us({**others, key: c}) for c in candidates}
        return search.Timed({c: measure.Time(t, t) for c, t in times.items()}, ())

    monkeypatch.setattr(search, "time_layer", time_layer)
    monkeypatch.setattr(
        search.Search, "_time_group", lambda self, work, variants: ([measure.Time(us(v), us(v)) for v in variants], [])
    )
    monkeypatch.setattr(search.Search, "_reference", lambda *args: None)
    (group,) = found.run()
    assert (found.decided[order.key], found.decided[tile]) == (not usual, last)
    assert group.total_us == 5.0
    assert next(d for d in group.decisions if d.what.startswith("conv")).chosen_us == 5.0


FAST_AND_WRONG = 48


@pytest.fixture
def wrong_kernel(monkeypatch):
    """One more candidate, of a kernel that returns zeros at once."""
    call = _ffi.call

    def call_or_zeros(target, results, *operands, **attributes):
        if target == "jaxsparse_conv_forward_v1" and attributes["tile_rows"] == FAST_AND_WRONG:
            return [jnp.zeros(s.shape, s.dtype) for s in results]
        return call(target, results, *operands, **attributes)

    monkeypatch.setattr(_ffi, "call", call_or_zeros)
    monkeypatch.setattr(conv_choices, "PLAIN_TILE_ROWS", (32, 64, 128, FAST_AND_WRONG))
    monkeypatch.setattr(work, "WITHIN", 1e9)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_a_wrong_kernel_never_wins_though_it_is_the_fastest(wrong_kernel):
    net, x = Net(), scene()
    recorded = record(net, [(x,)])
    (work,) = divide(recorded, "cpu", "inference")
    task = next(iter(work.tasks.values()))
    assert FAST_AND_WRONG in task.question.candidates
    maps = [recorded.maps[0][task.which][1]]
    programs = measure.compile_all(
        [lambda t=t: measure.layer_program(task.layer, maps, Choices({task.question.key: t}), "cpu") for t in (64, 48)]
    )
    right, wrong = measure.times_us(programs, "cpu", rounds=21)
    assert wrong.beats(right)
    result = tune(net, x)
    assert FAST_AND_WRONG not in result.choices.values()
    layers = [d for group in result.groups for d in group.decisions if d.what.startswith("conv")]
    assert layers
    for decision in layers:
        (reason,) = decision.rejected
        assert reason.startswith(f"{FAST_AND_WRONG}: wrong numbers, error 1.0e+00")
    assert f"rejected {FAST_AND_WRONG}: wrong numbers" in str(result)


def test_a_wrong_builder_never_wins(monkeypatch):
    call = _ffi.call

    def nothing_found(target, results, *operands, **attributes):
        if target == "jaxsparse_kernel_map_v1" and attributes["builder"] == 0:
            return [jnp.full(results[0].shape, -1, jnp.int32), jnp.zeros(results[1].shape, jnp.uint32)]
        return call(target, results, *operands, **attributes)

    monkeypatch.setattr(_ffi, "call", nothing_found)
    monkeypatch.setattr(work, "WITHIN", 1e9)
    result = tune(Net(), scene())
    (builder,) = [value for k, value in result.choices.items() if k.op == "builder"]
    assert builder == "blocks"
    assert "rejected builder hash: wrong numbers" in str(result)


def test_a_kernel_that_fails_is_rejected_with_its_message(monkeypatch):
    monkeypatch.setattr(conv_choices, "PLAIN_TILE_ROWS", (64, 80))  # the handler refuses 80
    monkeypatch.setattr(work, "WITHIN", 1e9)
    result = tune(lambda x: js.ops.conv(x, jnp.ones((27, 4, 4)), kernel_size=3), scene())
    assert [v for k, v in result.choices.items() if k.op == "conv"] == [64]
    assert "tile_rows must be 32, 64 or 128" in str(result)


def test_an_explicit_config_is_not_tuned():
    config = js.ops.ConvConfig(tile_rows=32)
    result = tune(lambda x: js.ops.conv(x, jnp.ones((27, 4, 4)), kernel_size=3, config=config), scene())
    assert {k.op for k in result.choices} == {"builder"}


# --- time ---


def test_the_budget_ends_the_search_and_what_was_found_stays(monkeypatch):
    assert not tune(Net(), scene(), budget_s=1e-3).choices
    timed = []
    time_layer = search.time_layer

    def slow(*args):
        timed.append(args[1])
        time.sleep(1.0)
        return time_layer(*args)

    monkeypatch.setattr(search, "time_layer", slow)
    x = scene()
    started = time.perf_counter()
    whole = search.Search(record(Net(), [(x,)]), "cpu", "inference", time.perf_counter() + 0.5, progress=False)
    (group,) = whole.run()
    assert time.perf_counter() - started < 30
    assert len(timed) == len(whole.decided) == len(group.decisions) == 1
    assert (group.total_us, group.heuristic_us) == (None, None)


def test_progress_says_how_far_and_how_long(capfd):
    js.autotune(Net(), scene())
    text = capfd.readouterr().err
    assert re.search(r"100 %, +\d+ s, about +0 s left", text)
    js.autotune(Net(), scene(), progress=False)
    assert capfd.readouterr().err == ""


def test_arguments_are_checked():
    with raises(ValueError, "`mode` (='serving')", '"inference" or "training"'):
        tune(Net(), scene(), mode="serving")
    with raises(TypeError, "arrays, not shapes"):
        tune(Net(), jax.eval_shape(lambda x: x, scene()))
    with raises(ValueError, "`budget_s` (=0)", "positive"):
        tune(Net(), scene(), budget_s=0)


def test_nothing_is_tuned_on_a_gpu_that_the_build_has_no_kernels_for(monkeypatch):
    monkeypatch.setattr(_native, "cuda_handlers", dict)
    monkeypatch.setattr(choice, "device_here", lambda platform: jax.local_devices()[0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for tool in (tune, js.tuning.explain):
        with raises(RuntimeError, "nothing can be tuned", "no CUDA kernels"):
            tool(Net(), scene())


# --- explain, tables ---


def test_explain_names_choice_source_and_times():
    net, x = Net(), scene()
    assert {row.source for row in js.tuning.explain(net, x).rows} == {"heuristic"}
    result = tune(net, x, cache=False)
    with result:
        rows = js.tuning.explain(net, x, measured=True).rows
    assert {row.source for row in rows} == {"result"}
    assert sum(row.layers for row in rows) == 4
    for row in rows:
        assert row.predicted_us > 0
        assert (row.measured_us is None) == ("builder" in row.what)
    store.add_to_cache("cpu", result.choices)
    explanation = js.tuning.explain(net, x)
    assert {row.source for row in explanation.rows} == {"cache"}
    assert "forward, conv 4 to 4, 27 taps" in str(explanation)
    assert all(row.measured_us is None for row in explanation.rows)


def test_a_synthetic_scene_is_as_dense_as_a_scan():
    coords = synthetic.sites(4000)
    assert len(coords) == 3600 == len({tuple(c) for c in coords})
    x = js.SparseTensor(coords, jnp.ones((len(coords), 1)))
    m = js.kernel_map(x.sites, x.sites, 3)
    assert 2 < float((m.table >= 0).sum() / len(coords)) < 12


def test_build_table_writes_what_programs_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "TABLES", tmp_path)
    options = ["--network", "SparseResNet21D", "--width", "0.06", "--voxel", "2", "--dtype", "float32"]
    monkeypatch.setattr(command, "SYNTHETIC", {"synthetic-16": (16, 200)})
    command.main(["build-table", *options, "--mode", "inference"])
    path = store.table_path(choice.device_of("cpu")[0])
    found, facts = store.decode(path.read_text())
    assert facts["device"] == "cpu"
    assert {k.op for k in found} == {"conv", "builder"}
    assert f"{len(found)} choices in {path}" in capsys.readouterr().out
    store.shipped.cache_clear()
    assert store.shipped("cpu") == found
    store.shipped.cache_clear()
    assert TuningResult.load(path).choices == found


def test_build_table_refuses_what_it_cannot_tune(tmp_path, capsys):
    for option, value in (("--width", "0"), ("--budget", "-1"), ("--voxel", "nan"), ("--data", str(tmp_path))):
        with pytest.raises(SystemExit):
            command.main(["build-table", option, value])
        assert f"error: {option} (=" in capsys.readouterr().err
    no_table = tmp_path / "notes.json"
    no_table.write_text("not a table")
    with pytest.raises(SystemExit):
        command.main(["build-table", "--out", str(no_table)])
    assert "is there already and no table" in capsys.readouterr().err
    np.savez(tmp_path / "nan.npz", points=np.full((5, 3), np.nan))
    with raises(SystemExit, "nan.npz holds no finite point"):
        command.main(["build-table", "--data", str(tmp_path), "--array", "points"])
    with raises(SystemExit, "no array 'xyz'", "--array"):
        command.main(["build-table", "--data", str(tmp_path)])


def test_timed_programs_run_their_kernels_one_by_one(monkeypatch):
    given, compile_ = [], jax.stages.Lowered.compile

    def compiled(self, options=None):
        given.append(options)
        return compile_(self, options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    program = measure.Program(lambda x: x + 1, [(jnp.ones(3),)], Choices()).compile()
    assert (program() == 2).all()
    ((name, side_by_side),) = js.COMPILER_OPTIONS.items()
    assert given[0][name] != side_by_side
