"""Synthetic street scenes: a road, perhaps a crossing, sidewalks, gardens, buildings, trees, cars and people.

`street_scene(rng)` places solids around a sensor that drives along +x in the right lane; `street_scan(seed)` measures
one. Lengths are metres. z is 0 on the road. Classes are SemanticKITTI's.
"""

from __future__ import annotations

import numpy as np

from .labels import SEMANTIC_KITTI
from .ray_casting import Lidar, Solid, measure

DEFAULT_LIDAR = Lidar()
_EXTENT = 64.0  # the scene reaches this far from the sensor, a little further than it sees
_KERB = 0.15
# Mean reflectivity of each class that the scenes hold: dark asphalt, bright signs.
_REFLECTIVITY = {
    "road": 0.22, "sidewalk": 0.42, "terrain": 0.55, "building": 0.48, "fence": 0.38, "vegetation": 0.50, "trunk": 0.32,
    "pole": 0.62, "traffic-sign": 0.98, "car": 0.70, "truck": 0.60, "person": 0.45,
}  # fmt: skip


def _solid(rng, name, shape, centre, half, **more) -> Solid:
    reflectivity = _REFLECTIVITY[name] * rng.uniform(0.85, 1.15)
    return Solid(shape, tuple(centre), tuple(half), SEMANTIC_KITTI.index(name), reflectivity, **more)


def _slab(rng, name, x0, x1, y0, y1, z0, z1, **more) -> Solid:
    centre, half = ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2), ((x1 - x0) / 2, (y1 - y0) / 2, (z1 - z0) / 2)
    return _solid(rng, name, "box", centre, half, **more)


def _car(rng) -> list[Solid]:
    """A car at the origin that heads along +x: body, cabin and four wheels."""
    length, width = rng.uniform(3.8, 4.7), rng.uniform(1.7, 1.9)
    body = _slab(rng, "car", -length / 2, length / 2, -width / 2, width / 2, 0.28, 0.9)
    cabin = _slab(rng, "car", -0.42 * length, 0.18 * length, -0.44 * width, 0.44 * width, 0.9, rng.uniform(1.4, 1.6))
    wheels = [
        _slab(rng, "car", x - 0.3, x + 0.3, y - 0.11, y + 0.11, 0.0, 0.55)
        for x in (-0.31 * length, 0.31 * length)
        for y in (-0.43 * width, 0.43 * width)
    ]
    return [body, cabin, *wheels]


def _truck(rng) -> list[Solid]:
    length, height = rng.uniform(5.5, 7.5), rng.uniform(2.9, 3.5)
    cargo = _slab(rng, "truck", -length / 2, length / 2 - 1.9, -1.2, 1.2, 0.8, height)
    cab = _slab(rng, "truck", length / 2 - 1.7, length / 2, -1.1, 1.1, 0.45, 2.5)
    wheels = [_slab(rng, "truck", x - 0.45, x + 0.45, -1.1, 1.1, 0.0, 0.9) for x in (-0.3 * length, 0.36 * length)]
    return [cargo, cab, *wheels]


def _person(rng) -> list[Solid]:
    height, stride = rng.uniform(1.6, 1.9), rng.uniform(0.1, 0.25)
    legs = [
        _solid(rng, "person", "cylinder", (x, y, 0.24 * height), (0.09, 0.09, 0.24 * height))
        for x, y in ((stride, 0.1), (-stride, -0.1))
    ]
    torso = _solid(rng, "person", "ellipsoid", (0, 0, 0.65 * height), (0.18, 0.27, 0.22 * height))
    head = _solid(rng, "person", "ellipsoid", (0, 0, 0.93 * height), (0.12, 0.12, 0.07 * height))
    return [*legs, torso, head]


def _tree(rng) -> list[Solid]:
    bole, radius = rng.uniform(2.0, 2.9), rng.uniform(1.2, 2.1)
    thickness = rng.uniform(0.14, 0.26)
    solids = [_solid(rng, "trunk", "cylinder", (0, 0, bole / 2), (thickness, thickness, bole / 2 + 0.3))]
    for _ in range(rng.integers(2, 4)):
        shift, size = rng.normal(0.0, 0.35 * radius, 3), radius * rng.uniform(0.7, 1.0)
        centre = (shift[0], shift[1], bole + 0.8 * radius + abs(shift[2]))
        half = (size, size, size * rng.uniform(0.7, 1.0))
        solids.append(_solid(rng, "vegetation", "ellipsoid", centre, half, porosity=0.3, depth=0.35))
    return solids


def _lamp(rng, towards_road: float) -> list[Solid]:
    """A lamp post; its arm points along y towards the road (-1 or 1)."""
    height, radius = rng.uniform(5.0, 6.5), rng.uniform(0.08, 0.12)
    post = _solid(rng, "pole", "cylinder", (0, 0, height / 2), (radius, radius, height / 2))
    arm = _solid(rng, "pole", "box", (0, 0.7 * towards_road, height), (0.07, 0.75, 0.07))
    return [post, arm]


def _sign(rng) -> list[Solid]:
    """A sign on a post that faces along -x."""
    post = _solid(rng, "pole", "cylinder", (0, 0, 1.2), (0.05, 0.05, 1.2))
    return [post, _solid(rng, "traffic-sign", "box", (-0.07, 0, 2.3), (0.02, 0.38, 0.38))]


def _block(rng, x0: float, x1: float, kerb: float, side: int, sidewalk: float) -> list[Solid]:
    """The land from x0 to x1 on one side of the road (side 1 is left): ground, lots, and what lines the kerb."""
    far = side * _EXTENT
    solids = [_slab(rng, "sidewalk", x0, x1, *sorted((kerb, far)), -0.5, _KERB)]
    fence_line = kerb + side * sidewalk
    garden = x0 + sidewalk, x1 - sidewalk, *sorted((fence_line, far))
    solids.append(_slab(rng, "terrain", *garden, -0.5, _KERB + 0.06, depth=0.04))

    x = x0 + sidewalk
    while x < x1 - sidewalk - 6.0:  # lots, one after the other along the sidewalk
        length = min(rng.uniform(9.0, 17.0), x1 - sidewalk - x)
        setback, front = rng.uniform(2.5, 6.0), rng.random()
        if rng.random() < 0.75:
            y0 = fence_line + side * setback
            y1, height = y0 + side * rng.uniform(8.0, 12.0), rng.uniform(4.5, 11.0)
            solids.append(_slab(rng, "building", x + 1.0, x + length - 1.0, *sorted((y0, y1)), 0.0, height))
            porch = x + rng.uniform(2.0, max(2.1, length - 4.0))
            solids.append(_slab(rng, "building", porch, porch + 2.2, *sorted((y0, y0 - side * 1.3)), 0.0, 2.8))
        else:
            for _ in range(rng.integers(2, 4)):
                at = x + rng.uniform(2.0, length - 1.0), fence_line + side * rng.uniform(4.0, 12.0)
                solids += [part.moved(*at, 0.0) for part in _tree(rng)]
        edge = *sorted((fence_line, fence_line + side * 0.1)), 0.0
        if front < 0.4:
            solids.append(_slab(rng, "fence", x + 0.3, x + length - 0.3, *edge, rng.uniform(1.1, 1.5), porosity=0.35))
        elif front < 0.7:
            edge = *sorted((fence_line, fence_line + side * 0.9)), 0.0
            height = rng.uniform(0.9, 1.5)
            hedge = _slab(rng, "vegetation", x + 0.4, x + length - 0.4, *edge, height, porosity=0.05, depth=0.15)
            solids.append(hedge)
        x += length

    line = kerb + side * 0.6
    x = x0 + rng.uniform(1.5, 4.0)
    kinds = rng.permutation(["tree", "lamp", "tree", "sign", "tree"])
    while x < x1 - 1.5:  # street furniture along the kerb
        kind, kinds = kinds[0], np.roll(kinds, -1)
        parts = {"tree": _tree, "lamp": lambda rng: _lamp(rng, -side), "sign": _sign}[kind](rng)
        solids += [part.moved(x, line, 0.0) for part in parts]
        x += rng.uniform(4.5, 9.0)
    for _ in range(rng.integers(2, 5)):  # people on the sidewalk
        at = rng.uniform(max(x0, -24.0), min(x1, 24.0)), kerb + side * rng.uniform(1.1, sidewalk - 0.5)
        if x0 < at[0] < x1:
            solids += [part.moved(*at, rng.uniform(0, 2 * np.pi)) for part in _person(rng)]
    return solids


def _traffic(rng, right: float, left: float, gap: tuple[float, float] | None) -> list[Solid]:
    """Cars along both kerbs (not in the crossing `gap`), vehicles in both lanes, people who cross."""
    solids = []
    for y, heading in ((right + 1.1, 0.0), (left - 1.1, np.pi)):
        x = -40.0 + rng.uniform(0.0, 5.0)
        while x < 40.0:
            if rng.random() < 0.5 and not (gap and gap[0] - 4.0 < x < gap[1] + 4.0):
                solids += [part.moved(x, y, heading + rng.normal(0.0, 0.02)) for part in _car(rng)]
            x += rng.uniform(5.6, 7.5)
    lanes = ((0.0, 0.0), (left + right, np.pi))
    for (y, heading), vehicle in zip(lanes + lanes[1:], (_car, _truck, _car), strict=True):
        x = rng.choice([-1, 1]) * rng.uniform(9.0, 28.0)
        solids += [part.moved(x, y, heading) for part in vehicle(rng)]
    for _ in range(2):
        at = rng.choice([-1, 1]) * rng.uniform(6.0, 8.5), rng.uniform(right + 2.5, left - 2.5)
        solids += [part.moved(*at, rng.uniform(0, 2 * np.pi)) for part in _person(rng)]
    return solids


def street_scene(rng: np.random.Generator) -> list[Solid]:
    """Solids of one random street around a sensor at x = y = 0."""
    half_width, sidewalk = rng.uniform(5.2, 6.4), rng.uniform(2.6, 3.6)
    right, left = -half_width + 1.9, half_width + 1.9  # kerbs; the sensor drives right of the middle
    solids = [_slab(rng, "road", -_EXTENT, _EXTENT, -_EXTENT, _EXTENT, -1.0, 0.0)]
    gap = None
    if rng.random() < 0.7:
        middle, half = rng.choice([-1, 1]) * rng.uniform(11.0, 20.0), rng.uniform(3.5, 4.5)
        gap = (middle - half, middle + half)
    for side, kerb in ((-1, right), (1, left)):
        ends = (-_EXTENT, _EXTENT) if gap is None else (-_EXTENT, *gap, _EXTENT)
        for x0, x1 in zip(ends[::2], ends[1::2], strict=True):
            solids += _block(rng, x0, x1, kerb, side, sidewalk)
    return solids + _traffic(rng, right, left, gap)


def street_scan(seed: int, lidar: Lidar = DEFAULT_LIDAR) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """xyz float32 [P, 3] in the sensor's frame, intensity float32 [P], class int32 [P] of the street with this seed."""
    rng = np.random.default_rng(seed)
    solids = street_scene(rng)
    heading = rng.uniform(-0.2, 0.2)  # the street does not run exactly along an axis of the voxel grid
    return measure(lidar, [solid.moved(0.0, 0.0, heading) for solid in solids], rng)
