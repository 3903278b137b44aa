"""The example's parts against brute force, and short runs of the whole."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from conftest import SCANS
from flax import nnx
from scenes import quick_rngs

import jaxsparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import train_segmentation
from segmentation import batches, labels, ray_casting, report, scans, street_scenes, training
from segmentation.ray_casting import Lidar, Solid

TINY = Lidar(beams=12, azimuths=90)


def in_solid_frame(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Points in the frame where the solid is a unit shape."""
    c, s = np.cos(solid.yaw), np.sin(solid.yaw)
    return (points - solid.centre) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) / solid.half


def how_far_out(solid: Solid, points: np.ndarray) -> np.ndarray:
    """1 on the solid's surface, less inside."""
    p = np.abs(in_solid_frame(solid, points))
    if solid.shape == "box":
        return p.max(axis=1)
    if solid.shape == "cylinder":
        return np.maximum(np.hypot(p[:, 0], p[:, 1]), p[:, 2])
    return np.linalg.norm(p, axis=1)


def random_solids(rng, number: int) -> list[Solid]:
    solids = []
    for i in range(number):
        shape = ("box", "cylinder", "ellipsoid")[i % 3]
        centre = rng.normal(0, 1, 3)
        centre *= rng.uniform(3, 6) / np.linalg.norm(centre)
        half = rng.uniform(0.3, 1.5, 3)
        if shape == "cylinder":
            half[1] = half[0]
        solids.append(Solid(shape, tuple(centre), tuple(half), i, 0.5, yaw=rng.uniform(0, 6)))
    return solids


def random_directions(rng, number: int) -> np.ndarray:
    directions = rng.normal(0, 1, (number, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def test_a_ray_ends_on_the_surface_of_the_first_solid_that_it_meets():
    rng = np.random.default_rng(0)
    solids, directions = random_solids(rng, 18), random_directions(rng, 2000)
    hits = ray_casting.cast(np.zeros(3), directions, solids, rng)
    marched = np.full(len(directions), np.inf)  # by small steps, independent of any closed form
    for t in np.arange(0.0, 9.0, 0.02):
        inside = np.any([how_far_out(solid, t * directions) < 1 for solid in solids], axis=0)
        marched = np.where(inside & np.isinf(marched), t, marched)
    hit = np.isfinite(hits.distance)
    assert 0.3 < hit.mean() < 0.95
    # A march with steps of 2 cm may miss a chord shorter than that, never the other way round.
    assert not np.any(np.isfinite(marched) & ~hit)
    assert np.mean(np.isfinite(marched[hit])) > 0.99
    both = np.isfinite(marched) & hit
    late = marched[both] - hits.distance[both]
    assert late.min() >= -1e-9
    assert np.quantile(late, 0.98) <= 0.021
    for i, solid in enumerate(solids):
        of_this = hits.label == i
        np.testing.assert_allclose(how_far_out(solid, (hits.distance[:, None] * directions)[of_this]), 1.0, atol=1e-9)


def test_incidence_agrees_with_the_numerical_gradient_of_the_surface():
    rng = np.random.default_rng(1)
    solids, directions = random_solids(rng, 9), random_directions(rng, 3000)
    hits = ray_casting.cast(np.zeros(3), directions, solids, rng)
    for i, solid in enumerate(solids):
        of_this = hits.label == i
        points, step = hits.distance[of_this, None] * directions[of_this], 1e-6
        offsets = step * np.eye(3)
        gradient = np.stack([how_far_out(solid, points + o) - how_far_out(solid, points - o) for o in offsets], axis=1)
        gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
        cosine = np.abs(np.sum(gradient * directions[of_this], axis=1))
        # Next to an edge the difference straddles two faces; elsewhere both must agree.
        assert np.mean(np.abs(cosine - hits.cosine[of_this]) < 1e-3) > 0.99


def test_pores_let_their_share_of_rays_through_and_depth_stays_inside():
    rng = np.random.default_rng(2)
    directions = np.tile([[1.0, 0.0, 0.0]], (20_000, 1))
    bush = Solid("ellipsoid", (5.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0, 0.5, porosity=0.3, depth=0.4)
    wall = Solid("box", (9.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1, 0.5)
    hits = ray_casting.cast(np.zeros(3), directions, [wall, bush], rng)
    assert np.mean(hits.label == 1) == pytest.approx(0.3, abs=0.02)
    assert np.all(hits.distance[hits.label == 1] == 8.0)
    reached = hits.distance[hits.label == 0]
    assert 4.0 < reached.min() < reached.max() <= 6.0
    assert np.median(reached) == pytest.approx(4.0 + 0.4 * np.log(2), abs=0.03)


def test_a_seed_gives_the_same_scan_twice_and_another_seed_another():
    first, again, other = (street_scenes.street_scan(seed, TINY) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert first[0].shape != other[0].shape or np.abs(first[0] - other[0]).max() > 1


def test_road_points_lie_on_the_road_and_the_rest_of_the_scene_above_it():
    lidar = Lidar(azimuths=300)
    xyz, intensity, label = street_scenes.street_scan(0, lidar)
    z = xyz[:, 2] + lidar.height
    on_road = label == labels.SEMANTIC_KITTI.index("road")
    assert on_road.sum() > 2000
    # Noise acts along the ray, so only its vertical share moves a point off the plane.
    sine = np.abs(xyz[:, 2]) / np.linalg.norm(xyz, axis=1)
    deviation = z[on_road] / (sine[on_road] * lidar.range_noise)
    assert np.abs(deviation).max() < 6
    assert deviation.std() == pytest.approx(1.0, abs=0.05)
    on_sidewalk = label == labels.SEMANTIC_KITTI.index("sidewalk")
    assert np.median(z[on_sidewalk]) == pytest.approx(0.15, abs=0.02)
    assert z[label == labels.SEMANTIC_KITTI.index("building")].max() > 3
    assert intensity.min() >= 0
    assert intensity.max() <= 1
    assert np.linalg.norm(xyz, axis=1).max() < lidar.max_range + 0.2


def test_the_default_streets_hold_twelve_classes():
    found = np.unique(np.concatenate([street_scenes.street_scan(seed)[2] for seed in range(6)]))
    assert {labels.SEMANTIC_KITTI.names[c] for c in found} == {
        "car", "truck", "person", "road", "sidewalk", "building", "fence", "vegetation", "trunk", "terrain", "pole",
        "traffic-sign",
    }  # fmt: skip


def test_raw_ids_map_as_semantic_kitti_publishes():
    # semantic-kitti.yaml, learning_map: raw id -> class, 0 ignored.
    published = {
        0: 0, 1: 0, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10, 48: 11, 49: 12,
        50: 13, 51: 14, 52: 0, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 99: 0, 252: 1, 253: 7, 254: 6, 255: 8,
        256: 5, 257: 5, 258: 4, 259: 5,
    }  # fmt: skip
    ours = labels.SEMANTIC_KITTI.from_raw(np.array(list(published), np.uint16))
    np.testing.assert_array_equal(ours, np.array(list(published.values())) - 1)
    assert len(labels.SEMANTIC_KITTI) == 19
    assert labels.SEMANTIC_KITTI.from_raw(np.array([65535], np.uint16)) == labels.IGNORED


def test_other_ids_are_relabelled_densely_with_zero_ignored():
    table = labels.dense_table([np.array([7, 0, 41]), np.array([7, 5])])
    assert table.names == ("id 5", "id 7", "id 41")
    np.testing.assert_array_equal(table.from_raw(np.array([41, 0, 5, 7, 6])), [2, -1, 0, 1, -1])
    assert len(set(table.colours)) == 3


def test_semantic_kitti_folders_are_read_with_instances_cut_off(tmp_path):
    written = {}
    for sequence, frame, points in (("00", "000000", 5), ("00", "000001", 3), ("08", "000000", 4)):
        rng = np.random.default_rng(points)
        folder = tmp_path / "sequences" / sequence
        (folder / "velodyne").mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        data = rng.random((points, 4)).astype(np.float32)
        raw = rng.choice([0, 10, 40, 252], points).astype(np.uint32)
        data.tofile(folder / "velodyne" / f"{frame}.bin")
        (raw | np.uint32(7 << 16)).tofile(folder / "labels" / f"{frame}.label")
        written[f"{sequence}/{frame}"] = data, raw
    np.zeros((9, 4), np.float32).tofile(tmp_path / "sequences/00/velodyne/000002.bin")  # has no labels: left out
    scan_set = scans.open_scans([tmp_path])
    assert scan_set.names == ("00/000000", "00/000001", "08/000000")
    assert scan_set.points == (5, 3, 4)
    for i, name in enumerate(scan_set.names):
        scan, (data, raw) = scan_set.load(i), written[name]
        np.testing.assert_array_equal(scan.xyz, data[:, :3])
        np.testing.assert_array_equal(scan.intensity, data[:, 3])
        np.testing.assert_array_equal(scan.label, [{0: -1, 10: 0, 40: 8, 252: 0}[r] for r in raw.tolist()])
    assert scans.open_scans([tmp_path], ["08"]).names == ("08/000000",)


def test_npz_files_say_what_they_lack(tmp_path):
    xyz = np.zeros((4, 3), np.float32)
    np.savez(tmp_path / "a.npz", xyz=xyz, intensity=np.array([0, 51, 255, 0], np.uint8), label=np.array([3, 0, 9, 3]))
    scan_set = scans.open_scans([tmp_path])
    np.testing.assert_allclose(scan_set.load(0).intensity, [0, 0.2, 1, 0])
    np.testing.assert_array_equal(scan_set.load(0).label, [0, -1, 1, 0])
    np.savez(tmp_path / "b.npz", xyz=xyz, intensity=np.zeros(4))
    with pytest.raises(ValueError, match=r"no array `label` in b\.npz.*Name the labelled ones.*a\.npz"):
        scans.open_scans([tmp_path])
    np.savez(tmp_path / "semkitti_7.npz", xyz=xyz, intensity=np.zeros(4), label=np.array([10, 40, 0, 0]))
    with pytest.raises(ValueError, match="different systems"):
        scans.open_scans([tmp_path / "a.npz", tmp_path / "semkitti_7.npz"])
    assert scans.open_scans([tmp_path / "semkitti_7.npz"]).classes is labels.SEMANTIC_KITTI
    with pytest.raises(ValueError, match="no such file"):
        scans.open_scans([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": [1, 2]}, r"no array `xyz` in c\.npz"),
        ({"label": [0, 0], "xyz": np.zeros((2, 3))}, r"every label in c\.npz is 0"),
        ({"label": [], "xyz": np.zeros((0, 3))}, r"no points in c\.npz"),
        ({"label": [1, 2], "xyz": np.zeros((2, 3)), "meta": "not JSON"}, r"c\.npz: its array `meta` is no JSON"),
        (None, r"c\.npz: not a sound \.npz file"),
    ],
)
def test_unsound_npz_files_are_named(tmp_path, arrays, message):
    if arrays is None:
        (tmp_path / "c.npz").write_bytes(b"")
    else:
        np.savez(tmp_path / "c.npz", intensity=np.zeros(len(arrays["label"])), **arrays)
    with pytest.raises(ValueError, match=message):
        scans.open_scans([tmp_path / "c.npz"])


def test_a_schedule_for_the_shortest_run():
    tx = training.adamw(1e-3, 1)
    params = {"w": jnp.ones(3, jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):  # as in a user's program
        updates, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(updates["w"]).all()


def test_real_scans_are_read_with_their_classes():
    if not SCANS.is_dir():
        pytest.skip(f"no real scans at {SCANS} (set JAXSPARSE_SCANS to the folder that holds them)")
    kitti = scans.open_scans(sorted(SCANS.glob("semkitti_*.npz")))
    assert kitti.classes is labels.SEMANTIC_KITTI
    counts = np.bincount(kitti.load(0).label + 1)
    assert counts[1 + kitti.classes.index("road")] == 34228 + 1053  # raw ids 40 and 60
    with pytest.raises(ValueError, match="no array `label` in kitti_obj"):
        scans.open_scans([SCANS])


def test_miou_is_that_of_a_count_point_by_point():
    rng = np.random.default_rng(5)
    label, predicted = rng.choice([0, 1, 3], 400), rng.integers(0, 5, 400)  # classes 2 and 4 are never labelled
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (label, predicted), 1)
    expected = [
        sum((a == c) & (b == c) for a, b in zip(label, predicted, strict=True))
        / sum((a == c) | (b == c) for a, b in zip(label, predicted, strict=True))
        for c in (0, 1, 3)
    ]
    scores = report.iou(confusion)
    np.testing.assert_allclose(scores[[0, 1, 3]], expected)
    assert np.isnan(scores[[2, 4]]).all()
    assert report.mean_iou(confusion) == pytest.approx(np.mean(expected))
    assert report.mean_iou(np.diag([3, 0, 2])) == 1.0


def test_a_bucket_holds_its_scans_and_few_buckets_hold_all():
    points = [120_000, 125_000, 99_000, 30_000, 34_000, 1]
    sizes = batches.bucket_sizes(points)
    assert all(p <= s and s % 1024 == 0 for p, s in zip(points, sizes, strict=True))
    assert sizes[0] == sizes[1] == sizes[2] != sizes[3] == sizes[4] != sizes[5]


def test_an_epoch_draws_each_scan_once_and_depends_on_the_step_alone():
    scan_set = scans.synthetic_streets(5, lidar=TINY)
    sampler = batches.Sampler(scan_set, batch=2, seed=0)
    epoch = sampler.steps_per_epoch
    drawn = [sampler.at(step).scans for step in range(3 * epoch)]
    for first in range(0, 3 * epoch, epoch):
        assert sorted(sum(drawn[first : first + epoch], ())) == [0, 1, 2, 3, 4]
    assert len({tuple(drawn[i : i + epoch]) for i in range(0, 3 * epoch, epoch)}) > 1
    resumed = batches.Sampler(scan_set, batch=2, seed=0)
    assert resumed.at(2 * epoch + 1).scans == drawn[2 * epoch + 1]


def test_packed_scans_keep_their_points_and_the_rest_is_ignored():
    scan_set = scans.synthetic_streets(2, lidar=TINY)
    a, b = scan_set.load(0), scan_set.load(1)
    packed = batches.pack([a, b], bucket=1024, batch=3)
    n, total = len(a.xyz), len(a.xyz) + len(b.xyz)
    assert packed.count == total
    np.testing.assert_array_equal(packed.xyz[n:total], b.xyz)
    np.testing.assert_array_equal(packed.scan[:total], np.repeat([0, 1], [n, total - n]))
    assert (packed.label[total:] == labels.IGNORED).all()
    with pytest.raises(ValueError, match="do not fit"):
        batches.pack([a, b], bucket=1024, batch=1)


def test_voxels_are_counted_as_distinct_cells():
    xyz = np.random.default_rng(6).normal(0, 3, (500, 3)).astype(np.float32)
    assert batches.voxels(xyz, 0.5) == len({tuple(cell) for cell in np.floor(xyz / 0.5).astype(int).tolist()})


def test_the_picture_shows_the_prediction_in_its_last_panel(tmp_path):
    scan = scans.synthetic_streets(1).load(0)
    wrong = np.full_like(scan.label, labels.SEMANTIC_KITTI.index("person"))
    panels = []
    for name, prediction in (("right", scan.label), ("wrong", wrong)):
        report.draw_from_above(tmp_path / f"{name}.png", scan, prediction, labels.SEMANTIC_KITTI, "a street")
        image = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert image.shape[1] > 2000
        height, width = image.shape[:2]
        panels.append([image[height // 5 : height * 4 // 5, i * width // 3 : (i + 1) * width // 3] for i in range(3)])
    right, wrong = panels
    for panel in right:
        assert (np.abs(panel - panel[0, 0]).max(axis=-1) > 0.1).mean() > 0.03  # not blank
    np.testing.assert_array_equal(right[1], wrong[1])
    assert np.abs(right[2] - wrong[2]).max() > 0.3
    # Equal labels and predictions give equal panels, up to the columns at their borders.
    assert np.abs(right[1][:, 40:-40].mean() - right[2][:, 40:-40].mean()) < 0.01


# --- short runs of the whole ---

RUN = ["--scenes", "3", "--beams", "12", "--azimuths", "90", "--width", "0.1", "--voxel", "0.5"]


def main(*arguments: str | Path) -> dict:
    """Runs the example as a program would: the suite's strict promotion is not optax's."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train_segmentation.main([*RUN, *map(str, arguments)])


def parameters(folder: Path, step: int) -> list[np.ndarray]:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        state = manager.restore(step, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the results of three uninterrupted steps."""
    folder = tmp_path_factory.mktemp("run")
    return folder, main("--steps", "3", "--save-every", "1", "--out", folder)


def test_a_run_compiles_each_step_once_and_leaves_scores_and_a_picture(run):
    folder, results = run
    assert results["compilations"] == {"train": 1, "evaluate": 1}
    assert results["step"] == 3
    assert 0 < results["miou"] < 1
    assert json.loads((folder / "scores.json").read_text()) == results
    image = matplotlib.image.imread(folder / "prediction.png")[..., :3]
    assert image.shape[1] > 2000
    assert (np.abs(image - image[0, 0]).max(axis=-1) > 0.1).mean() > 0.002


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(run, tmp_path, capsys):
    folder, results = run
    shutil.copytree(folder, tmp_path / "cut")
    expected = parameters(folder, 3)
    shutil.rmtree(tmp_path / "cut/checkpoints/3")
    again = main("--steps", "3", "--out", tmp_path / "cut")
    assert "going on from step 2" in capsys.readouterr().out
    for ours, theirs in zip(parameters(tmp_path / "cut", 3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    before = parameters(folder, 2)
    assert any(np.any(a != b) for a, b in zip(before, expected, strict=True))  # the third step changes something
    assert again["miou"] == results["miou"]


def test_a_folder_with_another_run_is_left_alone(run):
    folder, _ = run
    with pytest.raises(SystemExit, match=r"holds another run \(width 0\.1 there, 0\.2 here\).*--fresh"):
        main("--width", "0.2", "--steps", "3", "--out", folder)


def test_a_scan_with_too_many_voxels_is_refused_by_name_of_the_option():
    packed = batches.pack([scans.synthetic_streets(1, lidar=TINY).load(0)], bucket=1024, batch=1)
    x, _ = training.voxels_of(jax.numpy.asarray(packed.xyz), packed, training.Grid(0.5, scans=1, capacity=64))
    measured = training.Measured(np.float32(1), np.zeros((2, 2)), x.status, np.zeros(1))
    with pytest.raises(jaxsparse.SiteError, match="voxels do not fit") as info:
        training.check(measured)
    assert "--slack" in info.value.__notes__[0]
    with pytest.raises(FloatingPointError, match="learning rate"):
        training.check(measured._replace(status=jax.numpy.zeros_like(x.status), loss=np.float32(np.nan)))


def test_augmentation_turns_mirrors_and_scales_each_scan_as_a_whole():
    rng = np.random.default_rng(7)
    xyz = rng.normal(0, 5, (40, 3)).astype(np.float32)
    scan = np.repeat([0, 1], 20).astype(np.int32)
    mirrored, scales, angles = [], [], []
    for seed in range(12):
        moved = np.asarray(training.augment(jax.numpy.asarray(xyz), scan, 2, jax.random.key(seed)))
        for s in (0, 1):
            a, b = xyz[scan == s], moved[scan == s]
            linear = np.linalg.lstsq(a, b, rcond=None)[0]
            np.testing.assert_allclose(a @ linear, b, atol=1e-4)  # one linear map for the scan,
            scale = linear[2, 2]
            np.testing.assert_allclose(linear @ linear.T, scale**2 * np.eye(3), atol=1e-5)  # which keeps angles
            np.testing.assert_allclose(linear[2], [0, 0, scale], atol=1e-5)  # and the vertical
            scales.append(scale)
            mirrored.append(np.linalg.det(linear) < 0)
            angles.append(np.arctan2(linear[0, 1], linear[0, 0]))
    assert 0.95 <= min(scales) < 0.97 < 1.03 < max(scales) <= 1.05
    assert 4 < sum(mirrored) < 20
    assert min(angles) < -2
    assert max(angles) > 2


class Above(nnx.Module):
    """Two classes: voxels whose mean height is positive, and the others."""

    def __call__(self, x: jaxsparse.SparseTensor) -> jaxsparse.SparseTensor:
        return x.with_feats(jax.numpy.concatenate([x.feats[:, :1], -x.feats[:, :1]], axis=1))


def test_points_are_scored_by_their_voxel_and_unlabelled_ones_not_at_all():
    rng = np.random.default_rng(8)
    made = [
        scans.Scan(f"{n}", rng.uniform(-4, 4, (n, 3)).astype(np.float32), np.zeros(n, np.float32),
                   rng.integers(-1, 2, n).astype(np.int32))
        for n in (150, 90)
    ]  # fmt: skip
    packed = batches.pack(made, bucket=256, batch=2)
    steps = training.Steps(Above(), optax.sgd(0.1), np.ones(2, np.float32), "float32")
    measured = steps.evaluate(training.Grid(2.0, 2, 256), steps.initial_state(), packed)
    training.check(measured)
    expected = np.zeros((2, 2), int)
    for scan in made:
        cells = [tuple(cell) for cell in np.floor(scan.xyz / 2.0).astype(int).tolist()]
        for cell, label in zip(cells, scan.label, strict=True):
            height = np.mean([z for z, other in zip(scan.xyz[:, 2], cells, strict=True) if other == cell])
            if label >= 0:
                expected[label, int(height <= 0)] += 1
    np.testing.assert_array_equal(measured.confusion, expected)
    assert steps.compilations("evaluate") == 1
    assert steps.compilations("train") == 0


# --- mixed precision ---


def test_the_loss_scale_halves_on_overflow_and_grows_after_good_steps():
    scale = training.LossScale.create("float16")
    assert float(scale.factor) == 2.0**15
    for finite, factor, good in [
        (True, 2.0**15, 1), (True, 2.0**15, 2), (True, 2.0**16, 0), (True, 2.0**16, 1), (False, 2.0**15, 0),
        (False, 2.0**14, 0), (True, 2.0**14, 1), (True, 2.0**14, 2), (True, 2.0**15, 0),
    ]:  # fmt: skip
        scale = scale.after(jax.numpy.asarray(finite), growth_steps=3)
        assert (float(scale.factor), int(scale.good_steps)) == (factor, good)
    for _ in range(40):
        scale = scale.after(jax.numpy.asarray(False), growth_steps=3)
    assert float(scale.factor) == 1.0
    assert float(training.LossScale.create("bfloat16").factor) == 1.0


def leaves(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


class TwoLayers(nnx.Module):
    """Products in float16, parameters and statistics in float32."""

    def __init__(self, classes: int):
        options = {"dtype": jax.numpy.float16, "use_bias": False, "rngs": quick_rngs()}
        self.conv, self.norm = jaxsparse.nn.SubMConv(4, 8, 3, **options), jaxsparse.nn.BatchNorm(8, rngs=quick_rngs())
        self.head = jaxsparse.nn.SubMConv(8, classes, 3, **options)

    def __call__(self, x: jaxsparse.SparseTensor) -> jaxsparse.SparseTensor:
        return self.head(jaxsparse.ops.relu(self.norm(self.conv(x))))


def test_a_float16_step_that_overflows_changes_the_scale_alone_and_the_next_one_learns():
    scan_set = scans.synthetic_streets(1, lidar=TINY)
    packed = batches.pack([scan_set.load(0)], bucket=1024, batch=1)
    grid, key = training.Grid(0.5, scans=1, capacity=1024), jax.random.key(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights = np.ones(len(scan_set.classes), np.float32)
        steps = training.Steps(TwoLayers(len(weights)), training.adamw(1e-2, 10), weights, "float16")
        state = steps.initial_state()
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
        # The gradients of the logits, a thousandth or so, leave float16's range of 65504.
        huge = training.LossScale(jax.numpy.float32(2.0**24), state.scale.good_steps + 7)
        before = leaves(state[:3])
        state, measured = steps.train(grid, state._replace(scale=huge), packed, key)
        training.check(measured)
        for a, b in zip(leaves(state[:3]), before, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (float(state.scale.factor), int(state.scale.good_steps), int(state.step)) == (2.0**23, 0, 1)
        gentle = training.LossScale(jax.numpy.float32(2.0**10), state.scale.good_steps)
        state, measured = steps.train(grid, state._replace(scale=gentle), packed, key)
        training.check(measured)
        assert (float(state.scale.factor), int(state.scale.good_steps), int(state.step)) == (2.0**10, 1, 2)
        after = leaves(state[:2])
        assert all(np.isfinite(a).all() for a in after)
        assert any(np.any(a != b) for a, b in zip(after, before[: len(after)], strict=True))
        assert steps.compilations("train") == 1
