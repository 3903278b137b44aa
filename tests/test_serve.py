"""The serving example: what it serves is what the model says, and its whole loop runs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import raises
from flax import nnx
from scenes import quick_rngs

import jaxsparse as js

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import serve
from segmentation import scans, training
from segmentation.ray_casting import Lidar

TINY = Lidar(beams=12, azimuths=90)


@pytest.fixture(autouse=True)
def standard_promotion():
    """The suite's strict promotion is not that of a user's program."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    """float32 in full on a GPU too: programs are compared whose elementwise steps round in other places."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def served():
    """A model, its grid, and the server of its exported program."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = js.models.SparseResUNet42(4, width=0.1, num_classes=5, rngs=quick_rngs())
        model.eval()
        grid = training.Grid(0.5, scans=1, capacity=1024)
        return model, grid, serve.Server(serve.export(model, grid, 1200), jax.devices()[0])


def test_the_server_gives_the_classes_and_confidences_of_the_model(served):
    model, grid, server = served
    for scan in map(scans.synthetic_streets(2, lidar=TINY).load, range(2)):
        count = len(scan.xyz)
        label, confidence, _ = server(server.send(scan))
        x, voxel = js.voxelize(
            jnp.asarray(scan.xyz),
            training.features(jnp.asarray(scan.xyz), jnp.asarray(scan.intensity)),
            grid.voxel_size,
            capacity=grid.capacity,
        )
        probability = np.asarray(nnx.softmax(model(x).feats))[np.asarray(voxel)]
        np.testing.assert_allclose(np.asarray(confidence)[:count], probability.max(1), rtol=1e-4)
        # Of two classes as likely as each other either may win.
        chosen = probability[np.arange(count), np.asarray(label)[:count]]
        np.testing.assert_allclose(chosen, probability.max(1), rtol=1e-4)
        assert (np.asarray(label)[count:] == -1).all()
        assert (np.asarray(confidence)[count:] == 0).all()


def test_a_wrong_command_line_ends_the_program_with_a_word(capsys):
    for option, word in (("--requests", "0"), ("--beams", "0"), ("--width", "-1"), ("--voxel", "nan")):
        with pytest.raises(SystemExit):
            serve.main([option, word])
        assert f"argument {option}: {word} must be positive" in capsys.readouterr().err
    with raises(SystemExit, "error: no such file or folder: nowhere"):
        serve.main(["--data", "nowhere"])
    with pytest.raises(SystemExit):
        serve.main(["--out", f"{__file__}/below"])
    assert "is, or lies below, a file" in capsys.readouterr().err


def test_scans_sent_ahead_give_the_same_bits(served):
    *_, server = served
    requests = [scans.synthetic_streets(3, lidar=TINY).load(i) for i in (0, 1, 2, 0)]
    times, expected = serve.one_by_one(lambda scan: server(server.send(scan)), requests)
    assert len(times) == len(expected) == 4
    for ours, theirs in zip(serve.overlapped(server, requests), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(expected[0], expected[1])


def test_a_scan_that_does_not_fit_is_refused(served):
    *_, server = served
    scan = scans.Scan("big", np.zeros((1201, 3), np.float32), np.zeros(1201, np.float32), np.zeros(1201, np.int32))
    with raises(ValueError, "big", "1,201", "1,200", "export"):
        server.send(scan)
    spread = np.random.default_rng(0).uniform(-90, 90, (1200, 3)).astype(np.float32)
    scan = scans.Scan("wide", spread, np.zeros(1200, np.float32), np.zeros(1200, np.int32))
    with raises(js.SiteError, "voxels do not fit"):
        serve.received(server(server.send(scan)), 1200)


def test_the_whole_program_runs_and_writes_what_it_serves(tmp_path, capsys):
    tiny = ["--beams", "12", "--azimuths", "90", "--width", "0.1", "--voxel", "0.5", "--requests", "2"]
    times = serve.main([*tiny, "--out", str(tmp_path)])
    assert list(times) == ["nnx.jit", "jax.jit, state split once", "exported, compiled ahead of time"]
    assert all(len(ms) == 2 and min(ms) > 0 for ms in times.values())
    assert "p99" in capsys.readouterr().out
    server = serve.Server((tmp_path / "program.jax").read_bytes(), jax.devices()[0])
    scan = scans.synthetic_streets(1, 1, TINY).load(0)
    assert len(serve.received(server(server.send(scan)), len(scan.xyz))) == len(scan.xyz)
