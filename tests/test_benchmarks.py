"""The benchmarks' own parts: what is timed is checked, and times go where they belong. No scans are needed."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import random_tensor

import jaxsparse as js

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bounds
import breakdown
import fit_cost_model
import layer_cases
import layers
import measure
import tuning
import workloads

from jaxsparse.tuning import cost


@pytest.fixture(autouse=True)
def standard_promotion():
    """The suite's strict promotion is not that of a user's program."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_layers(monkeypatch, folder):
    """The benchmark of layers on a small full cube alone: the scans are missing, and so are their rows."""
    arguments = ["layers.py", "--rows", "scenes", "--dtype", "float32", "--share", "0.002", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(folder)])
    layers.main()
    return json.loads((folder / "layers_float32.json").read_text())


def test_layers_are_checked_timed_and_drawn(monkeypatch, tmp_path, capsys):
    content = run_layers(monkeypatch, tmp_path)
    assert [row["pass"] for row in content["results"]] == ["forward", "dgrad", "wgrad", "backward"]
    assert "skipped lidar" not in capsys.readouterr().out  # only scenes that the rows name
    edge = 5
    pairs = (3 * edge - 2) ** 3
    for row in content["results"][:3]:
        assert (row["sites"], row["pairs"], row["flops"]) == (edge**3, pairs, 2 * pairs * 64 * 64)
        assert row["bytes"] == 4 * (2 * edge**3 * 64 + 27 * 64 * 64 + pairs)
        assert all(0 < c["error"] <= 1 and c["us"] > 0 for c in row["candidates"])
        assert row["us"] == min(c["us"] for c in row["candidates"])
        assert row["candidates"][-1]["kernel"] == layers.PLAIN
    assert (tmp_path / "layers_float32.png").stat().st_size > 10_000
    assert "| backward |" in (tmp_path / "layers_float32.md").read_text()


def test_a_wrong_kernel_gets_no_time(monkeypatch, tmp_path):
    conv = js.ops.conv

    def wrong(x, *args, implementation, **options):
        y = conv(x, *args, implementation=implementation, **options)
        return y if implementation == "xla" else y.with_feats(y.feats * 1.0001)

    monkeypatch.setattr(layer_cases.js.ops, "conv", wrong)
    for row in run_layers(monkeypatch, tmp_path)["results"][:3]:
        assert row["kernel"] == layers.PLAIN
        assert all(("us" in c) == (c["kernel"] == layers.PLAIN) for c in row["candidates"])
        assert max(c["error"] for c in row["candidates"]) > 1


def test_error_counts_in_units_of_the_bound():
    with jax.enable_x64(True):
        true = jnp.asarray([[1.0, 2.0**-20], [100.0, 0.0]])
        magnitude = jnp.asarray([[1.0, 1.0], [100.0, 0.0]])
        found = jnp.asarray(true, jnp.float16)
        assert float(layer_cases._error(found, true, magnitude, 8.0)) == 0
        off = found.at[0, 0].add(2.0**-10)  # one ulp, of which the sum's rounding takes a little
        assert 0.99 < float(layer_cases._error(off, true, magnitude, 8.0)) < 1
        assert float(layer_cases._error(off.at[0, 0].add(2.0**-10), true, magnitude, 8.0)) > 1.9
        padded = jnp.concatenate([found, jnp.zeros((1, 2), jnp.float16)])
        assert float(layer_cases._error(padded, true, magnitude, 8.0)) == 0
        assert float(layer_cases._error(padded.at[2, 1].set(1e-7), true, magnitude, 8.0)) == np.inf
        assert float(layer_cases._error(found.at[1, 1].set(jnp.nan), true, magnitude, 8.0)) == np.inf


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the calls of the CPU are named here")
def test_the_gpu_is_busy_while_at_least_one_kernel_runs():
    def kernel(start, ns):
        return measure.Kernel("k", "", "", start, ns)

    assert measure.busy_ms([]) == 0
    apart, inside, after = kernel(1e6, 2e6), kernel(1.5e6, 1e6), kernel(2.5e6, 1e6)
    assert measure.busy_ms([apart, kernel(5e6, 1e6)]) == 3
    assert measure.busy_ms([after, apart, inside]) == 2.5


def test_kernels_are_told_apart_by_their_instruction():
    x = random_tensor(0, rows=60, features=8)
    kernels = jnp.ones((27, 8, 8)), jnp.ones((8, 8, 8))

    def step(x, kernels):
        def loss(kernels):
            y = js.ops.conv(x, kernels[0], kernel_size=3)
            return (js.ops.conv(y, kernels[1], kernel_size=2, strides=2, sites="reachable").feats ** 2).sum()

        return jax.value_and_grad(loss)(kernels)

    compiled = jax.jit(step).lower(x, kernels).compile()
    assert measure.program_name(compiled) == "jit_step"
    calls = measure.custom_calls(compiled)
    kernels = [measure.Kernel("", "jit_step", name, 0, 1) for name in calls]
    parts = [breakdown.part_of(kernel, calls) for kernel in kernels]
    counts = {part: parts.count(part) for part in set(parts)}
    # Two maps with an index and coarse sites; the reversed map; one gradient of features, two of weights.
    assert counts == {"maps": 4, "row order, pairs": 1, "forward": 2, "dgrad": 1, "wgrad": 2}
    for instruction, part in {
        "loop_select_fusion.3": "norms, elementwise",
        "gemm_fusion_dot.7": "1x1 products",
        "copy.2": "rest",
        "": "rest",
    }.items():
        assert breakdown.part_of(measure.Kernel("k", "jit_step", instruction, 0, 1), calls) == part


def test_tuning_times_every_way_of_a_network(monkeypatch, tmp_path):
    xyz = np.random.default_rng(0).uniform(0, 4, (300, 3)).astype(np.float32)
    np.savez(tmp_path / "cube.npz", xyz=xyz)
    tiny = workloads.Workload(workloads.DET, ("cube",), 0.5, width=0.25)
    monkeypatch.setattr(tuning, "WORKLOADS", {"tiny": tiny})
    monkeypatch.setattr(tuning, "BUDGETS", {"inference": 2.0})
    arguments = ["tuning.py", "--data", str(tmp_path), "--dtype", "float32", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--part", "networks", "--singles", "1"])
    tuning.main()
    (row,) = json.loads((tmp_path / "tuning.json").read_text())["results"]
    assert set(row["all_ms"]) == {"heuristic", "table", "tuned", row["single"]}
    assert all(ms > 0 for ms in row["all_ms"].values())
    assert js.tuning.TuningResult.load(tmp_path / "tuned_tiny.json").choices


def test_the_cost_model_is_near_what_was_measured_and_chooses_almost_the_best():
    path = Path(fit_cost_model.__file__).parent / "results/h200/layers_float16_all_tiles.json"
    layers = list(fit_cost_model.measured_layers(path))
    judged = [fit_cost_model.judge(layer, cost.H200) for layer in layers]
    logs = [math.log(guess / us) for times, _ in judged for us, guess in times.values()]
    assert len(logs) > 500
    assert math.sqrt(np.mean(np.square(logs))) < 0.25
    assert np.mean([regret for _, regret in judged]) < 0.04
    split = 0
    for layer, (times, regret) in zip(layers, judged, strict=True):
        assert regret < (0.32 if layer["op"] == "conv" else 0.07)
        if layer["op"] == "conv" and layer["sorts"] and any(tile.splits > 1 for tile in times):
            chosen, best = (min(times, key=lambda tile: times[tile][i]) for i in (1, 0))
            assert chosen.splits == best.splits or regret < 0.15
            split += chosen.splits > 1
    assert split >= 4


def test_the_profilers_counters_become_a_sentence(tmp_path):
    stall, per_issue = bounds.STALL
    stalls = {"selected": 9, "barrier": 0.9, "long_scoreboard": 1.8}
    names = [bounds.NS, bounds.L2_SECTORS, *bounds.UNITS.values(), *(f"{stall}{s}{per_issue}" for s in stalls)]
    units = ["ns", "sector"] + ["%"] * len(bounds.UNITS) + ["inst"] * len(stalls)
    first = ["12,000", "1,500,000", "31.4", "46", "2", "11", "40", *map(str, stalls.values())]
    second = ["60,000", "1,000,000", "58", "50", "2", "51", "27", *map(str, stalls.values())]
    rows = [",".join(f'"{text}"' for text in row) for row in (names, units, first, second)]
    (tmp_path / "ncu.csv").write_text("\n".join(["==PROF== Connected", *rows, "==PROF== Disconnected"]))
    slow, fast = map(bounds.figures, bounds.launches(tmp_path / "ncu.csv"))
    assert (slow["us"], slow["l2_bytes"], slow["stall"]) == (12, 48e6, "long_scoreboard")
    assert bounds.COLUMNS["L2 to and from multiprocessors, TB/s"](slow) == 4
    assert bounds.bound(slow).startswith("latency: warps wait for memory; busiest is L1 and shared memory, 46 % (issue")
    assert bounds.bound(fast) == "L2: 58 % (tensor cores 51, L1 and shared memory 50, issue slots 27, DRAM 2)"
