"""What a spinning LiDAR measures of a scene made of boxes, upright cylinders and ellipsoids, by exact ray casting.

Every solid is a unit shape (cube [-1, 1]^3, unit cylinder, unit sphere) that was scaled by `half`, turned by `yaw`
about z and moved to `centre`. A ray is taken back into that frame, where it stays a ray with the same parameter t,
and meets the convex unit shape in one interval [enter, leave]. The nearest `enter` of all solids is the return.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

_AXES = {"box": ((0, 1, 2), ()), "cylinder": ((2,), (0, 1)), "ellipsoid": ((), (0, 1, 2))}  # shape -> slabs, quadric


@dataclass(frozen=True)
class Solid:
    """A convex solid. `half`: half sizes in metres (a cylinder's are radius, radius, half its height)."""

    shape: str  # "box", "cylinder" or "ellipsoid"
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    label: int
    reflectivity: float
    yaw: float = 0.0
    porosity: float = 0.0  # share of rays that pass through: foliage, wire fences
    depth: float = 0.0  # mean depth in metres that a ray reaches below the surface: foliage, grass

    def moved(self, x: float, y: float, yaw: float) -> Solid:
        """This solid turned by `yaw` about the origin, then moved by (x, y)."""
        cx, cy, cz = self.centre
        c, s = np.cos(yaw), np.sin(yaw)
        return replace(self, centre=(x + c * cx - s * cy, y + s * cx + c * cy, cz), yaw=self.yaw + yaw)


@dataclass(frozen=True)
class Lidar:
    """A sensor at (0, 0, height) whose beams turn about z, by default much like a 64-beam one on a car's roof."""

    beams: int = 64
    azimuths: int = 600
    lowest_deg: float = -24.0
    highest_deg: float = 9.0
    height: float = 1.73
    max_range: float = 60.0
    range_noise: float = 0.02  # standard deviation, metres
    dropout: float = 0.02  # share of returns lost at any range; far returns are lost more often

    def directions(self) -> np.ndarray:
        """Unit vectors float64 [beams * azimuths, 3], beam by beam from the lowest."""
        elevation = np.deg2rad(np.linspace(self.lowest_deg, self.highest_deg, self.beams))[:, None]
        azimuth = (np.arange(self.azimuths) * (2 * np.pi / self.azimuths))[None, :]
        level = np.cos(elevation)
        xyz = (level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation) + 0.0 * azimuth)
        return np.stack(xyz, axis=-1).reshape(-1, 3)


@dataclass
class Returns:
    """The nearest hit of each ray; `distance` is infinite where there is none."""

    distance: np.ndarray  # [R] metres along the ray
    label: np.ndarray = field(repr=False)  # [R] int32
    reflectivity: np.ndarray = field(repr=False)  # [R]
    cosine: np.ndarray = field(repr=False)  # [R] of the angle of incidence


def _interval(origin: np.ndarray, direction: np.ndarray, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """[enter, leave] of rays [R, 3] with a unit shape; enter > leave where a ray misses."""
    slabs, quadric = _AXES[shape]
    enter, leave = np.full(len(direction), -np.inf), np.full(len(direction), np.inf)
    for axis in slabs:
        with np.errstate(divide="ignore", invalid="ignore"):  # a ray along the slab gives infinities of the right sign
            t = np.sort((np.array([-1.0, 1.0])[:, None] - origin[axis]) / direction[:, axis], axis=0)
        enter, leave = np.fmax(enter, t[0]), np.fmin(leave, t[1])
    if quadric:  # |o + t d|^2 = 1 over the quadric's axes
        o, d = origin[list(quadric)], direction[:, list(quadric)]
        a = np.einsum("ri,ri->r", d, d)
        b = d @ o
        root = np.sqrt(np.maximum(b * b - a * (o @ o - 1.0), 0.0))
        missed = b * b < a * (o @ o - 1.0)
        enter = np.where(missed, np.inf, np.maximum(enter, (-b - root) / a))
        leave = np.minimum(leave, (-b + root) / a)
    return enter, leave


def _normal(point: np.ndarray, shape: str) -> np.ndarray:
    """Outward direction [R, 3] (not normalised) of a unit shape at surface points [R, 3]."""
    if shape == "ellipsoid":
        return point
    reach = np.abs(point)
    if shape == "cylinder":
        reach[:, :2] = np.hypot(point[:, 0], point[:, 1])[:, None]
    # The face is the one whose reach is 1; the others' are less.
    return np.where(reach == reach.max(axis=1, keepdims=True), point, 0.0)


def cast(origin: np.ndarray, directions: np.ndarray, solids: list[Solid], rng: np.random.Generator) -> Returns:
    """Nearest hit of each ray from `origin` [3] along unit `directions` [R, 3] with `solids`."""
    rays = len(directions)
    out = Returns(np.full(rays, np.inf), np.full(rays, -1, np.int32), np.zeros(rays), np.zeros(rays))
    for solid in solids:
        half = np.asarray(solid.half)
        offset = np.asarray(solid.centre) - origin
        along = directions @ offset
        reach = half @ half  # squared radius of the bounding sphere: most rays miss it and go no further
        near = np.flatnonzero((offset @ offset - along**2 <= reach) & (along > -np.sqrt(reach)))
        c, s = np.cos(solid.yaw), np.sin(solid.yaw)
        turn = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])  # world to solid
        local_origin, local_direction = turn @ -offset / half, directions[near] @ turn.T / half
        enter, leave = _interval(local_origin, local_direction, solid.shape)
        stopped = (enter <= leave) & (enter > 0.0)
        # Random numbers are drawn for the rays near this solid whatever they hit: a scene depends on its seed alone.
        stopped &= rng.random(len(near)) >= solid.porosity
        distance = np.minimum(enter + rng.exponential(1.0, len(near)) * solid.depth, leave)
        kept = stopped & (distance < out.distance[near])
        hit = near[kept]
        normal = _normal(local_origin + enter[kept, None] * local_direction[kept], solid.shape) / half @ turn
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        out.distance[hit] = distance[kept]
        out.label[hit] = solid.label
        out.reflectivity[hit] = solid.reflectivity
        out.cosine[hit] = np.abs(np.einsum("ri,ri->r", normal, directions[hit]))
    return out


def measure(lidar: Lidar, solids: list[Solid], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One turn of `lidar`: xyz float32 [P, 3] in the sensor's frame, intensity float32 [P] in 0..1, label int32 [P]."""
    directions = lidar.directions()
    hits = cast(np.array([0.0, 0.0, lidar.height]), directions, solids, rng)
    share = hits.distance / lidar.max_range
    lost = lidar.dropout + 0.3 * np.minimum(share, 1.0) ** 2
    kept = (share < 1.0) & (rng.random(len(share)) >= lost)
    distance = hits.distance + rng.normal(0.0, lidar.range_noise, len(share))
    intensity = hits.reflectivity * (0.35 + 0.65 * hits.cosine) * np.exp(-0.7 * np.minimum(share, 1.0))
    intensity = np.clip(intensity + rng.normal(0.0, 0.02, len(share)), 0.0, 1.0)
    xyz = directions[kept] * distance[kept, None]
    return xyz.astype(np.float32), intensity[kept].astype(np.float32), hits.label[kept]
