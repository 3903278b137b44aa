"""Labelled scans from a SemanticKITTI folder, from `.npz` files, or made up: one `Scan` type, one `ScanSet`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .labels import SEMANTIC_KITTI, ClassTable, dense_table
from .ray_casting import Lidar
from .street_scenes import DEFAULT_LIDAR, street_scan


@dataclass(frozen=True)
class Scan:
    """Points in the sensor's frame. `label` is a class index, -1 where a point has no class."""

    name: str
    xyz: np.ndarray  # float32 [P, 3] metres
    intensity: np.ndarray  # float32 [P], 0..1
    label: np.ndarray  # int32 [P]

    def __post_init__(self):
        points = len(self.xyz)
        if self.xyz.shape != (points, 3) or self.intensity.shape != (points,) or self.label.shape != (points,):
            raise ValueError(
                f"{self.name}: xyz {self.xyz.shape}, intensity {self.intensity.shape} and label {self.label.shape} do "
                "not describe the same points; they must be [P, 3], [P] and [P]"
            )


@dataclass(frozen=True)
class ScanSet:
    """Scans that share one class table. `load(i)` reads scan i, perhaps from disk; `points[i]` is known without it."""

    classes: ClassTable
    names: tuple[str, ...]
    points: tuple[int, ...]
    load: Callable[[int], Scan]

    def __len__(self) -> int:
        return len(self.names)


def _in_memory(classes: ClassTable, scans: Sequence[Scan]) -> ScanSet:
    points = tuple(len(scan.xyz) for scan in scans)
    return ScanSet(classes, tuple(scan.name for scan in scans), points, list(scans).__getitem__)


def synthetic_streets(scenes: int, seed: int = 0, lidar: Lidar = DEFAULT_LIDAR) -> ScanSet:
    """`scenes` random streets. The table is SemanticKITTI's, of which streets hold twelve classes."""
    seeds = range(seed, seed + scenes)
    return _in_memory(SEMANTIC_KITTI, [Scan(f"street {s}", *street_scan(s, lidar)) for s in seeds])


def semantic_kitti(root: Path, sequences: Sequence[str] | None = None) -> ScanSet:
    """Scans below `root/sequences/NN/` that have a label file. Scans are read when they are asked for.

    `velodyne/*.bin` holds float32 x, y, z, remission for each point; `labels/*.label` holds uint32, the class in the
    low 16 bits and the instance above.
    """
    folders = [root / "sequences" / s for s in sequences] if sequences else sorted((root / "sequences").iterdir())
    bins = [path for folder in folders for path in sorted((folder / "velodyne").glob("*.bin"))]
    pairs = [(path, path.parent.parent / "labels" / f"{path.stem}.label") for path in bins]
    pairs = [(points, labels) for points, labels in pairs if labels.exists()]
    if not pairs:
        raise ValueError(f"{root}: no scan with labels (sequences/NN/velodyne/*.bin with sequences/NN/labels/*.label)")
    names = tuple(f"{points.parent.parent.name}/{points.stem}" for points, _ in pairs)

    def load(i: int) -> Scan:
        points = np.fromfile(pairs[i][0], np.float32).reshape(-1, 4)
        raw = np.fromfile(pairs[i][1], np.uint32) & 0xFFFF
        return Scan(names[i], points[:, :3], points[:, 3], SEMANTIC_KITTI.from_raw(raw))

    return ScanSet(SEMANTIC_KITTI, names, tuple(points.stat().st_size // 16 for points, _ in pairs), load)


def npz_scans(paths: Sequence[Path]) -> ScanSet:
    """Scans from `.npz` files with arrays `xyz` [P, 3], `intensity` [P] and `label` [P].

    SemanticKITTI's ids become its 19 classes where a file's `meta` text or its name says that they are SemanticKITTI's.
    Other ids are relabelled densely; all files must then use the same ids.
    """
    arrays = [_arrays(path) for path in paths]

    def names(wrong: Callable[[dict[str, np.ndarray]], bool]) -> list[str]:
        return [path.name for path, data in zip(paths, arrays, strict=True) if wrong(data)]

    if unlabelled := names(lambda data: "label" not in data):
        labelled = ", ".join(path.name for path in paths if path.name not in unlabelled)
        remedy = f"Name the labelled ones with --data: {labelled}." if labelled else "None of the files has one."
        raise ValueError(f"no array `label` in {', '.join(unlabelled)}: labels say which classes there are. {remedy}")
    for name in ("xyz", "intensity"):
        if incomplete := names(lambda data, name=name: name not in data):
            raise ValueError(f"no array `{name}` in {', '.join(incomplete)}: the model reads it")
    if empty := names(lambda data: len(data["xyz"]) == 0):
        raise ValueError(f"no points in {', '.join(empty)}: leave such files out")
    if not any(np.any(data["label"]) for data in arrays):
        every = ", ".join(path.name for path in paths)
        raise ValueError(f"every label in {every} is 0, which stands for no class: name files with classes")
    kinds = {_label_system(path, data) for path, data in zip(paths, arrays, strict=True)}
    if len(kinds) > 1:
        systems = ", ".join(sorted(kinds))
        raise ValueError(f"the files label their points by different systems ({systems}): name files of one of them")
    classes = SEMANTIC_KITTI if kinds == {"SemanticKITTI"} else dense_table([data["label"] for data in arrays])
    scans = []
    for path, data in zip(paths, arrays, strict=True):
        intensity = data["intensity"].astype(np.float32)
        if intensity.max(initial=0.0) > 1.0:  # 8-bit sensors
            intensity /= 255.0
        xyz = data["xyz"].astype(np.float32)
        scans.append(Scan(path.stem, xyz, intensity, classes.from_raw(data["label"])))
    return _in_memory(classes, scans)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a sound .npz file ({error})") from error


def _label_system(path: Path, data: dict[str, np.ndarray]) -> str:
    try:
        meta = json.loads(str(data["meta"])) if "meta" in data else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its array `meta` is no JSON text ({error})") from error
    described = f"{path.stem} {meta.get('labels', '')}".lower()
    if "semkitti" in described or "semantickitti" in described:
        return "SemanticKITTI"
    return str(meta.get("sensor", "unknown ids"))


def open_scans(paths: Sequence[Path], sequences: Sequence[str] | None = None) -> ScanSet:
    """The scans of a SemanticKITTI root (of these `sequences`), of a folder of `.npz` files, or of the files named."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"no such file or folder: {', '.join(missing)}")
    if len(paths) == 1 and (paths[0] / "sequences").is_dir():
        return semantic_kitti(paths[0], sequences)
    files = [file for path in paths for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    wrong = [file.name for file in files if file.suffix != ".npz"]
    if wrong or not files:
        found = ", ".join(wrong) or paths[0]
        raise ValueError(f"{found}: expected .npz files, a folder of them, or a folder that holds sequences/NN/")
    return npz_scans(files)
