"""GPU us of coordinates: growth, capacity, 8 maps; by kernel. Run in each tree; checksums must agree between trees."""
import collections, os, re, sys, time
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
T0 = time.time()
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "benchmarks")
import measure
import coordinates as bench
import jaxsparse as js
from jaxsparse.geometry import Geometry

DATA = os.environ.get("SCANS", "/work/shared/data")
GPU = jax.default_backend() == "gpu"
STEPS = 12 if GPU else 1
programs = {}  # name -> (label, compiled, ring, right)


@jax.jit
def checksum(x, count):  # of real rows (last axis for tables, first for coords)
    x = x.T if x.shape[0] < x.shape[-1] and x.ndim == 2 else x
    rows = jnp.arange(x.shape[0], dtype=jnp.uint32)
    w = (rows * jnp.uint32(2654435761) | 1)[:, None] + jnp.arange(x.shape[1], dtype=jnp.uint32)[None] * 40503
    return jnp.where(rows[:, None] < count, x.astype(jnp.uint32) * w, 0).sum(dtype=jnp.uint32)


@jax.jit
def padding_ok(coords, count):
    pad = jnp.arange(coords.shape[0])[:, None] >= count
    return jnp.where(pad, coords == -(2**31), True).all()


def add(name, label, build, ring, right):
    build.__name__ = name
    compiled = jax.jit(build).lower(ring[0]).compile()
    programs[name] = (label, compiled, ring, right(compiled(ring[0])))


def full(name):
    base = bench.real(bench.sites_ring(DATA, "semkitti_00_000000")[0])
    cases = ((10_000, 1), (100_000, 1), (100_000, 4), (1_000_000, 1), (4_000_000, 1))
    for count, factor in cases if GPU else cases[:1]:
        coords, capacity = bench.tiled(base, count), bench.capacity_for(count, factor)
        points = np.pad(coords[:, 1:] + np.float32(0.5), [(0, capacity - count), (0, 0)])
        inputs = [(jnp.asarray(points), jnp.asarray(points[:, :1]), jnp.int32(count))]
        vox = lambda p, c=capacity: js.voxelize(p[0], p[1], 1.0, capacity=c, count=p[2])
        sites = [jax.jit(lambda p, c=capacity: vox(p, c))(inputs[0])[0].check().sites]
        first = bench.real(sites[0])
        small = count <= 100_000
        tag, at = f"{count}x{factor}", f"{count:>9,} cap {factor}x"

        def vox_right(r, first=first):
            x = r[0]
            ok = np.array_equal(bench.real(x.sites), first) and bool(padding_ok(x.sites.coords, x.sites.count))
            return ok, len(np.unique(bench.keys(first))) == len(first) == count and bool((np.asarray(r[1])[:count] >= 0).all()), int(checksum(x.sites.coords, x.sites.count))

        add(f"vox_{tag}", f"voxels           {at}", vox, inputs, vox_right)

        def map_right(r, first=first, sites=sites, small=small):
            ok = bench.is_right(np.asarray(r[0]), first, first, 3) if small else None
            return ok, int(checksum(r[0], sites[0].count))

        def m(s):
            k = js.kernel_map(s, s, 3)
            return k.table, k.masks

        add(f"map_{tag}", f"3^3 map          {at}", m, sites, map_right)
        for kernel in (2, 3):
            def c(s, kernel=kernel):
                return s.coarse(Geometry.create(3, kernel, 2), "reachable")

            def c_right(r, first=first, kernel=kernel, small=small):
                ok = bench.reaches(bench.real(r), first, kernel) if small else None
                return ok, bool(padding_ok(r.coords, r.count)), int(r.count), int(checksum(r.coords, r.count))

            add(f"coarse{kernel}_{tag}", f"coarse {kernel}^3 str 2 {at}", c, sites, c_right)


def network(scan, label, convs, last, name):
    ring = bench.sites_ring(DATA, scan)
    probe = jax.jit(bench.network_maps(convs, last, [3 * ring[0].capacity] * len(convs)))
    counts = np.max([[int(c) for c in probe(s)[1]] for s in ring], axis=0)
    build = bench.network_maps(convs, last, [bench.capacity_for(c) for c in counts[-len(convs):]])

    def right(result):
        maps, counts, coords, status = result
        js.status.check(status)
        n = len(convs)
        levels = [bench.real(ring[0]), *(np.asarray(c)[: int(k)] for c, k in zip(coords[-n:], counts[-n:], strict=True))]
        strided = [(f, c, *conv) for f, c, conv in zip(levels[:-1], levels[1:], convs, strict=True)]
        cases = strided + [(s, s, 3, 1) for s in levels[: len(maps) - len(convs)]]
        return [bench.is_right(np.asarray(m[0]), *case) for m, case in zip(maps, cases, strict=True)], [len(x) for x in levels]

    add(name, label, build, ring, right)


def voxels(scan, name):
    ring = bench.points_ring(DATA, scan)
    build = bench.voxelizer(bench.SCANS[scan], bench.capacity_for(280_000 if "nusc" in scan else 92_000))
    add(name, f"voxels of {scan}", build, ring, lambda r: (int(r[0].check().sites.count), int(checksum(r[0].sites.coords, r[0].sites.count))))


network("nusc_10sweep", "8 maps ResNet21D nusc_10sweep", bench.DET, False, "det")
network("semkitti_00_000000", "9 maps ResUNet42 semkitti", bench.SEG, True, "seg")
voxels("semkitti_00_000000", "vox_semkitti")
voxels("nusc_10sweep", "vox_nusc")
full("growth")
print(f"compiled and checked after {time.time() - T0:.0f} s; {jax.devices()[0].device_kind}; {os.getcwd()}", flush=True)


def all_programs():
    for _, compiled, ring, _ in programs.values():
        measure.run_steps(compiled, ring, STEPS)


def short(name):
    found = re.findall(r"(\w+)(?:<|\()", name) if "(" in name or "<" in name else []
    kernels = [f for f in found if f.endswith("_kernel")]
    return kernels[0].removesuffix("_kernel") if kernels else name.split("(")[0][-28:]


if GPU:
    all_programs()
    by_program = collections.defaultdict(list)
    for k in measure.gpu_kernels(all_programs):
        by_program[k.program].append(k)
for name, (label, compiled, _, right) in programs.items():
    line = f"{label:32s}"
    if GPU:
        kernels = by_program[measure.program_name(compiled)]
        each = len(kernels) // STEPS
        exact = each and len(kernels) % STEPS == 0
        us = np.array([k.ns for k in kernels[: each * STEPS]]).reshape(STEPS, each) * 1e-3
        line += f" {us.sum(1).mean():8.2f} us (median {np.median(us.sum(1)):8.2f}) {each} kernels{'' if exact else ' UNEVEN'}"
        parts = collections.OrderedDict()
        for i, k in enumerate(kernels[:each]):
            parts.setdefault(short(k.name), []).append(np.median(us[:, i]))
        detail = "; ".join(f"{n} " + "+".join(f"{t:.1f}" for t in ts) for n, ts in parts.items())
    print(line, "| right:", right)
    if GPU:
        print("      ", detail)
print(f"done after {time.time() - T0:.0f} s")
