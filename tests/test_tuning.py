"""Who chooses a kernel, when a program is compiled anew, and files of choices that anything may have happened to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from conftest import raises
from scenes import random_kernel, random_tensor

import jaxsparse as js
from jaxsparse import _coords
from jaxsparse.geometry import Geometry
from jaxsparse.ops.conv import (
    FLOAT_TILES,
    FLOAT_WGRAD_TILES,
    FORWARD_TILES,
    NARROW_TILES,
    WGRAD_TILES,
    Tile,
    primitives,
)
from jaxsparse.ops.conv import choices as conv_choices
from jaxsparse.tuning import TuningResult, choice, cost, measure, search, store
from jaxsparse.tuning.key import FARTHEST, Choices, Key, from_json, row_bucket, to_json

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choices of the CPU's kernels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.forget()
    yield tmp_path / "cache"
    store.forget()


X = random_tensor(0, rows=60, features=3)
KERNEL = random_kernel(0, Geometry.create(3, 3), 3, 4)


def layer(x, kernel, config=None):
    return js.ops.conv(x, kernel, kernel_size=3, config=config).feats


def key(**changes):
    """The key of `layer(X, KERNEL)`."""
    it = Key("conv", "cpu", "float32", 3, 4, 27, "same", (1, 1, 1), row_bucket(X.capacity))
    return it._replace(**changes)


def hlo(config=None):
    return jax.jit(lambda x, k: layer(x, k, config)).lower(X, KERNEL).as_text()


def tile_rows(config=None):
    """What is in the custom call of a program compiled now."""
    (found,) = re.findall(r"jaxsparse_conv_forward_v1.*tile_rows = (\d+)", hlo(config))
    return int(found)


HEURISTIC = tile_rows()
OTHERS = [t for t in (32, 64, 128) if t != HEURISTIC]


def test_the_first_that_knows_decides(monkeypatch):
    by_source = {"table": OTHERS[0], "cache": OTHERS[1], "result": OTHERS[0], "config": OTHERS[1]}
    assert tile_rows() == HEURISTIC
    monkeypatch.setattr(
        store, "shipped", lambda device: Choices({key(): by_source["table"]} if device == "cpu" else {})
    )
    assert tile_rows() == by_source["table"]
    with js.tuning.policy(table=False):
        assert tile_rows() == HEURISTIC
    monkeypatch.setattr(store, "cached", lambda device: Choices({key(): by_source["cache"]} if device == "cpu" else {}))
    assert tile_rows() == by_source["cache"]
    with js.tuning.policy(cache=False):
        assert tile_rows() == by_source["table"]
    with TuningResult(Choices({key(): by_source["result"]})):
        assert tile_rows() == by_source["result"]
        assert tile_rows(js.ops.ConvConfig(tile_rows=by_source["config"])) == by_source["config"]
    assert tile_rows() == by_source["cache"]


def test_a_choice_that_is_not_built_is_passed_over():
    with TuningResult(Choices({key(): 48})):
        assert tile_rows() == HEURISTIC
    with TuningResult(Choices({key(): (128, 64, 3)})):
        assert tile_rows() == HEURISTIC


def test_rows_and_grid_may_be_near_and_nothing_else():
    far = row_bucket(X.capacity) + FARTHEST
    for near in (key(rows=far), key(grid=(2, 2, 2)), key(rows=far - 2, grid=(4, 4, 4))):
        with TuningResult(Choices({near: OTHERS[0]})):
            assert tile_rows() == OTHERS[0], near
    changes = [{"rows": far + 1}, {"rows": far, "grid": (2, 2, 2)}, {"c_in": 4}, {"taps": 9}, {"dtype": "float64"}]
    for change in [*changes, {"device": "NVIDIA H100 80GB HBM3"}, {"op": "wgrad"}, {"direction": "table"}]:
        with TuningResult(Choices({key(**change): OTHERS[0]})):
            assert tile_rows() == HEURISTIC, change
    with TuningResult(Choices({key(rows=far): OTHERS[1], key(rows=far - 1): OTHERS[0]})):
        assert tile_rows() == OTHERS[0]


def test_only_a_changed_result_compiles_anew():
    traces = []

    @jax.jit
    def f(x, kernel):
        traces.append(choice.active())
        return layer(x, kernel)

    first, other = (TuningResult(Choices({key(): t})) for t in (32, 128))
    results = [f(X, KERNEL)]
    for _ in range(2):
        with first:
            results.append(f(X, KERNEL))
        with TuningResult(Choices({key(): 32}), device="another report, the same choices"):
            results.append(f(X, KERNEL))
        results.append(f(X, KERNEL))
        with other:
            results.append(f(X, KERNEL))
            with first:
                results.append(f(X, KERNEL))
    assert traces == [None, first.choices, other.choices]
    for y in results[1:]:
        assert jnp.abs(y - results[0]).max() < 1e-5


def test_results_may_be_entered_again_and_leave_after_errors():
    result = TuningResult(Choices({key(): OTHERS[0]}))
    with pytest.raises(KeyError), result, result:
        raise KeyError
    assert choice.active() is None
    with result, result:
        assert tile_rows() == OTHERS[0]
    assert tile_rows() == HEURISTIC


def test_the_builder_is_a_choice_and_changes_no_map():
    x, _ = js.voxelize(jnp.asarray(X.coords[:, 1:], jnp.float32) + 0.5, X.feats, 1.0, capacity=64)

    def table(sites):
        return js.kernel_map(sites, sites, 3).table[:, : int(x.count)]

    found = {}
    for builder in ("hash", "blocks"):
        chosen = Key("builder", "cpu", "", 0, 0, 0, "table", (1, 1, 1), row_bucket(64))
        with TuningResult(Choices({chosen: builder})):
            text = jax.jit(table).lower(x.sites).as_text()
            assert f"builder = {_coords.BUILDERS.index(builder)} : i64" in text
            found[builder] = jax.jit(table)(x.sites)
    assert (found["hash"] == found["blocks"]).all()


def test_policy_refuses_what_it_does_not_know():
    with (
        raises(ValueError, "`on_cache_miss` (='time')", '"heuristic", "tune" or "error"'),
        js.tuning.policy(on_cache_miss="time"),
    ):
        pass


def test_on_cache_miss_error_names_the_layer_and_the_remedy():
    with js.tuning.policy(on_cache_miss="error"):
        with raises(LookupError, "c_in=3", "jaxsparse.autotune"):
            hlo()
        with TuningResult(Choices({key(): 64})):
            hlo()


@pytest.mark.parametrize("x64", [False, True])
def test_on_cache_miss_tune_times_once_and_keeps_the_best(x64):
    with jax.enable_x64(x64), js.tuning.policy(on_cache_miss="tune", table=False):
        before = measure.programs_timed
        first = tile_rows()
        assert measure.programs_timed > before
        assert store.cached("cpu")[key()] == first
        before = measure.programs_timed
        assert tile_rows() == first
        assert measure.programs_timed == before


def test_on_cache_miss_tune_takes_its_times_on_the_device_of_the_program(monkeypatch):
    """As where a function is lowered for the CPU in a process whose default backend is a GPU."""
    device, time_layer, seen = jax.local_devices()[-1], search.time_layer, []

    def noted(layer, key, candidates, maps, others, platform, expected):
        arrays = [*maps[0], expected, *measure.operands(layer, 0, 0)]
        seen.append((platform, {d for a in arrays for d in a.devices()}))
        return time_layer(layer, key, candidates, maps, others, platform, expected)

    monkeypatch.setattr(search, "time_layer", noted)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(search, "device_here", lambda platform: device)
    with js.tuning.policy(on_cache_miss="tune", table=False):
        first = tile_rows()
    assert seen == [("cpu", {device})]
    assert store.cached("cpu")[key()] == first


def test_a_timing_that_fails_leaves_nothing_on_the_device(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search, "time_layer", fails)
    with js.tuning.policy(on_cache_miss="tune", table=False), raises(RuntimeError, "out of memory"):
        tile_rows()
    assert measure.numbers.cache_info().currsize == 0


def test_several_processes_take_no_times_and_read_no_cache(monkeypatch):
    store.add_to_cache("cpu", Choices({key(): OTHERS[0]}))
    assert tile_rows() == OTHERS[0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert tile_rows() == HEURISTIC
    before = measure.programs_timed
    with js.tuning.policy(on_cache_miss="tune"), pytest.warns(UserWarning, match="Tune in one process"):
        assert tile_rows() == HEURISTIC
    assert measure.programs_timed == before
    with raises(RuntimeError, "2 processes", "save the result"):
        js.autotune(lambda x: layer(x, KERNEL), X)
    with TuningResult(Choices({key(): OTHERS[0]})):
        assert tile_rows() == OTHERS[0]


def test_export_for_another_platform_takes_the_table_of_its_default_device(monkeypatch):
    x, kernel = random_tensor(0, rows=60, features=16, dtype=jnp.float16), jnp.ones((27, 16, 16), jnp.float16)
    device = choice.DEFAULT_DEVICES["cuda"]
    chosen = Key("conv", device, "float16", 16, 16, 27, "same", (1, 1, 1), row_bucket(x.capacity))
    store.add_to_cache(device, Choices({chosen: Tile(64, 16, 4)}))
    monkeypatch.setattr(store, "shipped", lambda name: Choices({chosen: Tile(64, 64, 4)} if name == device else {}))

    def exported():
        leaves, tree = jax.tree.flatten((x, kernel))
        f = jax.jit(lambda *leaves: layer(*jax.tree.unflatten(tree, leaves)))
        options = {"platforms": ["cuda"], "disabled_checks": js.DISABLE_JAX_EXPORT_CHECKS}
        return jax.export.export(f, **options)(*leaves).mlir_module()

    for context in (js.tuning.policy(), TuningResult(Choices({chosen: Tile(64, 32, 3)}))):
        with context:
            assert re.search(r"conv_gemm_v1.*tile_cols = 64 : i64, tile_rows = 64", exported())
    with js.tuning.policy(table=False):
        assert not re.search(r"conv_gemm_v1.*tile_cols = 64 : i64, tile_rows = 64", exported())


# --- files ---


def test_saved_results_come_back():
    with jax.enable_x64(False):
        result = js.autotune(lambda x: layer(x, KERNEL), X, cache=False, progress=False)
    path = store.cache_path("cpu").with_name("result.json")
    result.save(path)
    loaded = TuningResult.load(path)
    assert loaded == result
    assert str(loaded) == str(result)
    assert isinstance(json.loads(path.read_text())["choices"], list)


def test_or_takes_the_right_ones_choices():
    a = TuningResult(Choices({key(): 32, key(c_in=8): (128, 64, 3)}), device="a", seconds=1)
    b = TuningResult(Choices({key(): 128, key(op="sort"): True}), device="b", seconds=2)
    both = a | b
    assert dict(both.choices) == {key(): 128, key(c_in=8): (128, 64, 3), key(op="sort"): True}
    assert (both.seconds, both.device) == (3, "a and b")
    assert (b | a).choices[key()] == 32


WHOLE = store.encode(Choices({key(): OTHERS[0]}), device="cpu")
BROKEN = {
    "empty": "",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "no JSON": "tuned!",
    "another JSON": "[1, 2]",
    "older schema": WHOLE.replace('"schema": 1', '"schema": 0'),
    "key without rows": WHOLE.replace('"rows"', '"lines"'),
    "choice of a wrong type": re.sub(r'"choice": \d+', '"choice": {}', WHOLE),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_cache_warns_once_works_and_is_replaced(what):
    path = store.cache_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(BROKEN[what])
    with pytest.warns(UserWarning, match=re.escape(str(path))) as found:
        assert tile_rows() == tile_rows() == HEURISTIC
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.add_to_cache("cpu", Choices({key(): OTHERS[1]}))
        assert tile_rows() == OTHERS[1]


def test_a_cache_that_cannot_be_read_or_written_warns_once_and_works(own_cache):
    own_cache.mkdir()
    (own_cache / "jaxsparse").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="is not used") as found:
        assert tile_rows() == tile_rows() == HEURISTIC
    assert len(found) == 1
    with pytest.warns(UserWarning, match="cannot be written.*XDG_CACHE_HOME") as found:
        result = js.autotune(lambda x: layer(x, KERNEL), X, progress=False)
    assert len([w for w in found if "cannot be written" in str(w.message)]) == 1
    assert key() in result.choices


def test_a_process_keeps_what_it_tuned_where_the_cache_cannot_be_written(monkeypatch):
    def read_only(path, text):
        raise PermissionError(path)

    monkeypatch.setattr(store, "write", read_only)
    with js.tuning.policy(on_cache_miss="tune", table=False):
        with pytest.warns(UserWarning, match="keeps the result"):
            first = tile_rows()
        before = measure.programs_timed
        assert tile_rows() == first
        assert measure.programs_timed == before
    with pytest.warns(UserWarning, match="keeps the result"):
        store.add_to_cache("cpu", Choices({key(c_in=8): OTHERS[0]}))
    assert dict(store.cached("cpu")) == {key(): first, key(c_in=8): OTHERS[0]}
    assert not store.cached("NVIDIA H200")


def test_load_refuses_what_is_no_result(tmp_path):
    path = tmp_path / "result.json"
    for text in (BROKEN["truncated"], BROKEN["older schema"], "\udcff"):  # the last is no UTF-8
        path.write_text(text, errors="surrogateescape")
        with raises(ValueError, str(path), "TuningResult.save"):
            TuningResult.load(path)


def run_python(code, **environment):
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_writers_at_the_same_time_lose_nothing():
    code = """
import sys
from jaxsparse.tuning import store
from jaxsparse.tuning.key import Choices, Key
for i in range(20):
    c_in = 100 * int(sys.argv[1]) + i
    store.add_to_cache("cpu", Choices({Key("conv", "cpu", "float32", c_in, 8, 27, "same", (1, 1, 1), 20): 32}))
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(3)]
    assert [w.wait(timeout=300) for w in writers] == [0] * 3
    assert {k.c_in for k in store.cached("cpu")} == {100 * w + i for w in range(3) for i in range(20)}
    assert sorted(p.suffix for p in store.cache_path("cpu").parent.iterdir()) == [".json", ".lock"]


def test_a_second_process_finds_the_choices_takes_no_times_and_emits_the_same_program():
    store.add_to_cache("cpu", Choices({key(): OTHERS[1]}))
    folder = os.path.dirname(__file__)
    code = f"""
import hashlib, os, sys
sys.path.insert(0, {folder!r})
import test_tuning as t
os.environ["XDG_CACHE_HOME"] = {os.environ["XDG_CACHE_HOME"]!r}  # which conftest sets
print(t.tile_rows(), t.measure.programs_timed, hashlib.sha256(t.hlo().encode()).hexdigest())
"""
    runs = [run_python(code, PYTHONHASHSEED=str(seed)).split() for seed in (1, 2)]
    assert runs[0] == [str(OTHERS[1]), "0", hashlib.sha256(hlo().encode()).hexdigest()]
    assert runs[0] == runs[1]


def test_a_cache_is_found_by_device_kind(own_cache):
    assert store.cache_path("NVIDIA H100 80GB HBM3") == own_cache / "jaxsparse/tuning/nvidia_h100_80gb_hbm3.json"


# --- the cost model ---


def questions(rows, c_in, c_out, dtype=jnp.float16):
    """Forward and wgrad on CUDA."""
    spec = primitives.Spec(
        jnp.dtype(dtype), jax.lax.Precision.DEFAULT, rows, js.ops.ConvConfig(), True, (), (1, 1, 1), (1, 1, 1)
    )
    problem = conv_choices.Problem(spec, rows, rows, 27, c_in, c_out)
    return conv_choices.conv("cuda", problem), conv_choices.wgrad("cuda", problem)


@pytest.mark.parametrize("rows", [100, 6_000, 100_000])
@pytest.mark.parametrize("channels", [(16, 16), (4, 32), (64, 96), (256, 256)])
def test_no_tile_is_predicted_to_beat_the_floor(rows, channels):
    c_in, c_out = channels
    for neighbours in (2.0, 9.0):
        pairs = rows * neighbours
        floor = max(pairs * c_in * c_out / 400e6, rows * (c_in + c_out) * 2 / 4.3e6)  # us, of an H200
        for question in questions(rows, c_in, c_out):
            for tile in question.candidates:
                assert question.predict(tile, neighbours) > floor


def test_tiles_of_several_splits_are_for_devices_that_have_clusters(monkeypatch):
    few = questions(3_000, 256, 256)[0]
    assert all(tile.splits == 1 for tile in few.candidates)  # no GPU here, or one that may be another
    monkeypatch.setattr(conv_choices, "has_clusters", lambda platform: True)
    few, many = questions(3_000, 256, 256)[0], questions(90_000, 64, 64)[0]
    assert few.candidates == many.candidates == FORWARD_TILES
    assert few.heuristic().splits > 1
    assert many.heuristic().splits == 1


@pytest.mark.parametrize(
    ("capability", "built", "has"),
    [
        ("9.0", "80 90a-real", True),
        ("8.0", "80 90a-real", False),
        ("12.0", "80 90a-real", False),
        ("9.0", "80", False),
        ("12.0", "80 90a-real 120-real", True),
        ("9.0", None, False),
    ],
)
def test_a_device_has_clusters_if_code_for_it_was_built(capability, built, has, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device()])
    monkeypatch.setattr(conv_choices._native, "cuda_architectures", built)
    assert conv_choices.has_clusters("cuda") == has


@pytest.mark.parametrize(("capability", "kib"), [("8.0", 163), ("8.6", 99), ("8.9", 99), ("9.0", 227), ("12.0", 99)])
def test_tiles_fit_the_shared_memory_of_the_device(capability, kib, monkeypatch):
    class Device:
        compute_capability, device_kind = capability, "a device"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device()])
    assert conv_choices.most_shared_bytes("cuda") == kib * 1024
    for c_in, dtype in ((64, "float16"), (4, "float16"), (64, "float32")):
        forward, wgrad = questions(50_000, c_in, 64, dtype)
        assert forward.candidates
        assert wgrad.candidates
        assert all(cost.conv_shared_bytes(tile, 27) <= kib * 1024 for tile in forward.candidates)
        assert all(cost.wgrad_shared_bytes(tile) <= kib * 1024 for tile in wgrad.candidates)
    assert (Tile(128, 128, 4) in questions(50_000, 64, 64)[0].candidates) == (kib > 99)
    assert (Tile(128, 128, 3) in questions(50_000, 64, 64)[1].candidates) == (kib > 99)


def test_a_tile_in_a_file_from_before_there_were_splits_has_one():
    entry = json.loads(json.dumps(to_json(key(), (128, 64, 3))))
    assert from_json(entry) == (key(), Tile(128, 64, 3, 1))
    whole = TuningResult(Choices({key(): Tile(128, 128, 3, 4)}))
    assert store.decode(store.encode(whole.choices))[0] == whole.choices


def test_predictions_grow_with_the_work():
    for smaller, larger in (((5_000, 64, 64), (100_000, 64, 64)), ((50_000, 32, 32), (50_000, 256, 256))):
        for a, b in zip(questions(*smaller), questions(*larger), strict=True):
            assert all(a.predict(tile, 5.0) < b.predict(tile, 5.0) for tile in a.candidates)


def test_executed_taps_lie_between_those_of_a_row_and_all():
    m = cost.Map(rows=100_000, taps=27, neighbours=4.0)
    for is_sorted in (False, True):
        executed = [m.executed(rows, is_sorted) for rows in (1, 16, 64, 128, 256, 10**6)]
        assert executed == sorted(executed)
        assert executed[0] == pytest.approx(4.0)
        assert executed[-1] <= 27
    assert m.executed(128, True) < m.executed(128, False)


def test_the_neighbours_of_a_map_change_the_prediction():
    question, _ = questions(50_000, 64, 64)
    assert question.predict(question.heuristic(), 2.0) < question.predict(question.heuristic(), 20.0)


@pytest.mark.parametrize("path", sorted(store.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table_reads_and_names_what_is_built(path):
    table, facts = store.decode(path.read_text())
    assert table
    assert path == store.table_path(facts["device"])
    assert {key.device for key in table} == {facts["device"]}
    tiles = {"conv": {*FORWARD_TILES, *NARROW_TILES, *FLOAT_TILES}, "wgrad": {*WGRAD_TILES, *FLOAT_WGRAD_TILES}}
    built = {"builder": {"hash", "blocks"}, "sort": {True, False}, **tiles}
    assert all(choice in built[key.op] for key, choice in table.items())
