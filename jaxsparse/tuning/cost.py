"""The cost model: predicted microseconds of each candidate. Its least is the heuristic, and the tuner's pruning.

Every prediction is built from the same terms: products over the matrix rate and bytes over a bandwidth, both for what
is *executed* rather than what is useful (the fill cost of skipping a tap for a whole tile of rows), what a block reads
again because another block needs it too (reuse, by tile size), the latency of a step, and whole waves of blocks. The
rates were fitted to layers measured on the device that they are named for (`benchmarks/tuning.py --part fit`); other
GPUs take them too, since a choice depends on their ratios.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Map:
    """What the model knows of a kernel map.

    Attributes:
      rows: rows computed.
      taps: number of taps, K.
      neighbours: present taps a row, on average.
    """

    rows: int
    taps: int
    neighbours: float

    @property
    def pairs(self) -> float:
        """Pairs of input and output rows."""
        return self.rows * self.neighbours

    def executed(self, tile_rows: int, is_sorted: bool) -> float:
        """Taps that a tile of rows does not skip, on average.

        Were a tile's rows independent, a tap would be skipped with (1 - density)^rows. They are alike: LiDAR scans show
        the same with rows^0.5 in their place, and with rows^0.17 where rows with like taps were sorted together.
        """
        density = min(self.neighbours / self.taps, 1.0)
        independent = tile_rows ** (0.17 if is_sorted else 0.5)
        return max(self.taps * (1 - (1 - density) ** independent), self.neighbours)


def expected_neighbours(taps: int, strides: Sequence[int], grid: Sequence[int], ratio: float, direction: str) -> float:
    """Present taps a row where no map has been seen: those of LiDAR scans, which grow from level to level.

    `ratio` is fine rows over coarse rows, the capacities. Of a strided map, a fine row lies under taps / strides
    windows.
    """
    stride = math.prod(strides)
    if stride > 1:
        of_fine = max(taps / stride, 1.0)
        return min(of_fine if direction == "reverse" else of_fine * ratio, taps)
    level = math.log2(max(grid, default=1))
    return max(taps * min(0.14 + 0.07 * level, 0.35), 1.0)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, for the tensor-core kernels.

    Attributes:
      multiprocessors: how many.
      products: of one multiprocessor, multiply-adds a microsecond, 16-bit.
      step_bytes: that one multiprocessor copies to shared memory, bytes a microsecond.
      memory_bytes: of the whole, bytes a microsecond.
      step_us: latency of a step with one copy on its way; a deeper ring divides it.
      block_us: latency of a block's beginning and end.
      launch_us: of a kernel.
      shared_bytes, registers: of a multiprocessor.
    """

    multiprocessors: int = 132
    products: float = 3.0e6
    step_bytes: float = 4.0e4
    memory_bytes: float = 3.0e6
    step_us: float = 1.2
    block_us: float = 2.0
    launch_us: float = 2.0
    shared_bytes: int = 227 * 1024
    registers: int = 65536

    def resident(self, threads: int, cols: int, shared: int) -> int:
        """Blocks on a multiprocessor at a time."""
        registers = 64 + cols // 2
        return max(min(self.shared_bytes // (shared + 1024), self.registers // (threads * registers)), 1)

    def blocks_us(self, blocks: float, resident: int, steps: float, step_us: float, latency_us: float) -> float:
        """Waves of `resident` blocks on each multiprocessor: throughput binds a full one, latency a lone block."""
        blocks_each = math.ceil(blocks / self.multiprocessors)
        full, rest = divmod(blocks_each, resident)
        wave = steps * max(resident * step_us, latency_us) + self.block_us
        last = steps * max(rest * step_us, latency_us) + self.block_us if rest else 0.0
        return full * wave + last + self.launch_us


H100 = Gpu()
STEP_BYTES = 128  # of depth, that a step multiplies


def conv_us(tile, kernel_map: Map, c_in: int, c_out: int, itemsize: int, is_sorted: bool, gpu: Gpu = H100) -> float:
    """An implicit product over a schedule, `cuda/conv/implicit_gemm.cuh`."""
    rows, cols, stages = tile
    taps = kernel_map.executed(rows, is_sorted)
    steps = taps * c_in * itemsize / STEP_BYTES
    gathered = rows * min(kernel_map.neighbours / taps, 1.0)  # absent rows are filled with zeros, not read
    step_us = max(
        rows * cols * (STEP_BYTES / 2) / gpu.products,  # as many 16-bit products whatever the width of an operand
        STEP_BYTES * (gathered + cols * 2 / itemsize) / gpu.step_bytes,
    )
    blocks = math.ceil(kernel_map.rows / rows) * math.ceil(c_out / cols)
    shared = stages * STEP_BYTES * (rows + cols) + min(kernel_map.taps, 32) * rows * 4 + 1024
    resident = gpu.resident(2 * rows, cols, shared)
    compute = gpu.blocks_us(blocks, resident, steps, step_us, gpu.step_us / (stages - 1))
    least_bytes = kernel_map.rows * (c_in + c_out) * itemsize + kernel_map.taps * c_in * c_out * itemsize
    return max(compute, least_bytes / gpu.memory_bytes)


def schedule_us(kernel_map: Map, sorts: bool, gpu: Gpu = H100) -> float:
    """The order of rows, and the map laid out in it: `cuda/conv/schedule.cu`."""
    entries = kernel_map.rows * kernel_map.executed(64, sorts) * 8
    return (
        gpu.launch_us
        + (SORT_US if sorts else 0.0)
        + (entries + kernel_map.rows * (40 if sorts else 8)) / gpu.memory_bytes
    )


SORT_US = 12.0  # passes of a radix sort, each a barrier of the grid
TYPICAL_LAYERS, TYPICAL_CHANNELS = 2, 64  # that share a schedule, where they are not known


def sort_us(sorts: bool, kernel_map: Map, tiles, itemsize: int = 2, gpu: Gpu = H100) -> float:
    """A schedule and the typical layers that use it."""
    channels = TYPICAL_CHANNELS
    layer = min(conv_us(tile, kernel_map, channels, channels, itemsize, sorts, gpu) for tile in tiles)
    return schedule_us(kernel_map, sorts, gpu) + TYPICAL_LAYERS * layer


def wgrad_slots(taps: int, c_in: int, c_out: int, tile, gpu: Gpu = H100) -> int:
    """Shares of the pairs in wgrad: as many as make two blocks for each multiprocessor, and two for each tap."""
    pieces = math.ceil(c_in / tile[0]) * math.ceil(c_out / tile[1])
    return max(2 * taps, 2 * gpu.multiprocessors // pieces)


def wgrad_us(tile, kernel_map: Map, c_in: int, c_out: int, itemsize: int, gpu: Gpu = H100) -> float:
    """A gradient of weights over pairs, `cuda/conv/wgrad_gemm.cuh`: partial sums of slots, then their sum."""
    rows, cols, stages = tile
    slots = wgrad_slots(kernel_map.taps, c_in, c_out, tile, gpu)
    pieces = math.ceil(c_in / rows) * math.ceil(c_out / cols)
    in_slot = max(kernel_map.pairs / max(slots - kernel_map.taps, 1), 256)
    used = min(slots, kernel_map.pairs / in_slot + kernel_map.taps / 2)
    depth = 64  # pairs a step
    step_us = max(rows * cols * depth * itemsize / 2 / gpu.products, depth * (rows + cols) * itemsize / gpu.step_bytes)
    shared = stages * depth * (rows + max(cols, 64)) * itemsize + 2 * stages * depth * 8 + 1024
    resident = gpu.resident(2 * rows, cols, shared)
    partial = gpu.blocks_us(used * pieces, resident, in_slot / depth, step_us, gpu.step_us / (stages - 1))
    sums = 2 * 4 * used * c_in * c_out / gpu.memory_bytes + gpu.launch_us
    return partial + sums


PLAIN_PRODUCTS = 2.0e5  # of one multiprocessor, without tensor-core tiles


def plain_conv_us(tile_rows: int, kernel_map: Map, c_in: int, c_out: int, itemsize: int, gpu: Gpu = H100) -> float:
    """The kernel for every dtype and width on CUDA, `cuda/conv/conv_forward.cu`."""
    taps = kernel_map.executed(tile_rows, is_sorted=False)
    cols = 32
    blocks = math.ceil(kernel_map.rows / tile_rows) * math.ceil(c_out / cols)
    depth = max(c_in, 16)
    step_us = max(tile_rows * cols * depth / PLAIN_PRODUCTS, itemsize * depth * (tile_rows + cols) / gpu.step_bytes)
    return gpu.blocks_us(blocks, max(256 // tile_rows, 1), taps, step_us, gpu.step_us)


CPU_PRODUCTS = 3e4  # of one core, multiply-adds a microsecond, float32
CPU_TILE_TAP_US = 0.08  # a tap of a tile, besides its pairs
CPU_ENTRY_US = 0.0005  # an entry of the table
CPU_CORES = 8
CPU_FAST_BYTES = 32 * 1024


def cpu_conv_us(tile_rows: int, kernel_map: Map, c_in: int, c_out: int, itemsize: int) -> float:
    """`bindings/cpu/conv.cc`: a task a tile, whose sums should stay in the first cache."""
    tiles = math.ceil(kernel_map.rows / tile_rows)
    entries = tile_rows * kernel_map.taps * CPU_ENTRY_US
    products = tile_rows * kernel_map.neighbours * c_in * c_out * itemsize / 4 / CPU_PRODUCTS
    spilled = 1.0 + 0.1 * max(math.log2(tile_rows * c_out * itemsize / CPU_FAST_BYTES), 0.0)
    weights = kernel_map.taps * c_in * c_out * itemsize / 4e4  # read anew by every tile, from a farther cache
    tile_us = kernel_map.taps * CPU_TILE_TAP_US + entries + products * spilled + weights
    return math.ceil(tiles / CPU_CORES) * tile_us


LOOK_UP_BYTES = 64  # of memory, that a key looked up or entered reads at random
SITES_IN_BLOCK = 3.0  # of LiDAR scans


def builder_us(builder: str, sites: int, taps: int, blocks: float, gpu: Gpu = H100) -> float:
    """A kernel map by look-ups, `cuda/coords/kernel_map.cu`: keys entered, keys looked up.

    `blocks` is how many blocks a window lies over. A look-up by blocks answers for all taps in the block.
    """
    entered, asked = (sites / SITES_IN_BLOCK, min(blocks, taps)) if builder == "blocks" else (sites, taps)
    return 2 * gpu.launch_us + LOOK_UP_BYTES * (2 * entered + sites * asked / 4) / gpu.memory_bytes
