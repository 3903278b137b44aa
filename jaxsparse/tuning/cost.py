"""The cost model: predicted microseconds of each candidate. Its least is the heuristic, and the tuner's pruning.

Every prediction is built from the same terms: products over the matrix rate and bytes over a bandwidth, both for what
is *executed* rather than what is useful (the fill cost of skipping a tap for a whole tile of rows), what a block reads
again because another block needs it too (reuse, by tile size), and how blocks fill the multiprocessors: evenly, but
never faster than the longest of them. The rates were fitted by `benchmarks/fit_cost_model.py` to all tiles of the
single layers in `benchmarks/results/h200/layers_float16_all_tiles.json`: 20 % off in the mean square, and a choice by
them 2.2 % slower than the best. The steps of float32 and schedules were set by hand from the figures in `cuda/conv/`.
Look-ups follow from the same terms. Other GPUs take these rates too, since a choice depends on their ratios.
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
        the same with rows^0.5 in their place, and with rows^0.14 where rows with like taps were sorted together. Up to
        nine taps, they are sorted by all of them, and hardly a tile has two kinds of rows.
        """
        if is_sorted and self.taps <= 9:
            return min(1.05 * self.neighbours, self.taps)
        density = min(self.neighbours / self.taps, 1.0)
        independent = tile_rows ** (0.14 if is_sorted else 0.5)
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
    """Rates of a GPU, for the kernels on tensor cores.

    Attributes:
      multiprocessors: how many.
      memory_bytes: of the whole, bytes a microsecond.
      step_bytes: the copies of blocks that share a multiprocessor, bytes a microsecond.
      chain_us: a step where nothing else hides the waits between a block's own steps. With fewer stages less is copied
        ahead, which adds up to a fifth.
      lone: the share by which a step takes longer where no second block fits on the multiprocessor.
      block_us: for the beginning and end of a block.
      split_us: what a block of a cluster takes beyond that, to start together and to exchange sums.
      launch_us: for the launch of a kernel.
      shared_bytes, registers: what a multiprocessor has.
    """

    multiprocessors: int = 132
    memory_bytes: float = 4.7e6
    step_bytes: float = 6.9e4
    chain_us: float = 0.16
    lone: float = 0.185
    block_us: float = 0.24
    split_us: float = 0.92
    launch_us: float = 3.7
    shared_bytes: int = 227 * 1024
    registers: int = 65536

    def resident(self, threads: int, cols: int, shared: int) -> int:
        """Blocks on a multiprocessor at a time."""
        registers = 64 + cols // 2
        return max(min(self.shared_bytes // (shared + 1024), self.registers // (threads * registers)), 1)

    def step(self, products_us: float, copied: float) -> float:
        """Microseconds of a step where others run beside it."""
        return max(products_us, copied / self.step_bytes)

    def chain(self, stages: int) -> float:
        """Microseconds of a step that nothing runs beside."""
        return self.chain_us * (1 + 0.2 / (stages - 1))

    def blocks_us(
        self, blocks: float, resident: int, steps: float, most_steps: float, step: float, chain: float, splits: int = 1
    ) -> float:
        """Microseconds of all blocks, which have `steps` steps on average and at most `most_steps`.

        The multiprocessors share the blocks evenly, but none ends before the longest block does. The fourth powers make
        the result a little more than the larger of the two times where they are close.
        """
        if resident == 1:
            step *= 1 + self.lone
        block_us = self.block_us + (self.split_us if splits > 1 else 0)
        even = max(blocks / self.multiprocessors, 1.0) * (steps * step + block_us)
        longest = most_steps * max(step, chain) + block_us
        return (even**4 + longest**4) ** 0.25 + self.launch_us


H200 = Gpu()
STEP_BYTES = 128  # of each row and column that a step multiplies
PRODUCTS = {"float16": 3.0e6, "tf32": 1.5e6, "float32": 2.2e5}
"""Multiply-adds a microsecond of one multiprocessor, by dtype as `Key` names it."""
FLOAT_ROW_US, FLOAT_COL_US = 0.0027, 0.0014  # of a step of float32: tiles of 64 rows cost half of those of 128
BYTES = {"float16": 2, "tf32": 4, "float32": 4, "float64": 8}


def conv_shared_bytes(tile, taps: int) -> int:
    """Shared memory of a block of `cuda/conv/implicit_gemm.cuh`: stages, factors of an epilogue, taps, entries."""
    rows, cols, stages, splits = tile
    return stages * STEP_BYTES * (rows + _stored(cols)) + cols // splits * 8 + 128 + (min(taps, 32) + 1) * rows * 4


def wgrad_shared_bytes(tile) -> int:
    """Shared memory of a block of `cuda/conv/wgrad_gemm.cuh`: stages, and the pairs of eight steps."""
    rows, cols, stages, _ = tile
    return stages * STEP_BYTES * (rows + _stored(cols)) + 8 * 64 * 8


def _stored(cols: int) -> int:
    """Columns as they lie in shared memory, in blocks of 64 unless they are few."""
    return cols if cols <= 32 else math.ceil(cols / 64) * 64


def conv_us(tile, kernel_map: Map, c_in: int, c_out: int, dtype: str, is_sorted: bool, gpu: Gpu = H200) -> float:
    """An implicit product over a schedule, `cuda/conv/implicit_gemm.cuh`."""
    rows, cols, stages, splits = tile
    itemsize = BYTES[dtype]
    taps = kernel_map.executed(rows, is_sorted)
    products_us = rows * cols * STEP_BYTES / itemsize / PRODUCTS[dtype]
    copied = STEP_BYTES * (rows + cols)  # an absent row costs a copy too, of zeros
    if itemsize == 2:
        step = gpu.step(products_us, copied)
    else:
        step = max(products_us, FLOAT_ROW_US * rows + FLOAT_COL_US * cols)
    blocks = math.ceil(kernel_map.rows / rows) * math.ceil(c_out / cols) * splits
    resident = gpu.resident(2 * rows, cols, conv_shared_bytes(tile, kernel_map.taps))
    depth = c_in * itemsize / STEP_BYTES / splits  # steps a tap
    most = kernel_map.taps if kernel_map.taps > 9 or not is_sorted else taps
    chain = gpu.chain(stages)
    compute = gpu.blocks_us(blocks, resident, taps * depth, most * depth, step, chain, splits)
    least_bytes = kernel_map.rows * (c_in + c_out) * itemsize + kernel_map.taps * c_in * c_out * itemsize
    return (compute**4 + (least_bytes / gpu.memory_bytes + gpu.launch_us) ** 4) ** 0.25


def schedule_us(kernel_map: Map, sorts: bool, gpu: Gpu = H200) -> float:
    """The order of rows, and the map laid out in it: `cuda/conv/schedule.cu`."""
    entries = kernel_map.rows * kernel_map.executed(64, sorts)
    if sorts:
        return SORT_US + SORT_ROW_US * kernel_map.rows + SORTED_ENTRY_BYTES * entries / gpu.memory_bytes
    return LAY_OUT_US + ENTRY_BYTES * entries / gpu.memory_bytes


# Set by hand from the figures in `cuda/conv/schedule.cu`, which they meet within a tenth.
SORT_US, SORT_ROW_US, SORTED_ENTRY_BYTES = 8.4, 4.6e-5, 15.0
LAY_OUT_US, ENTRY_BYTES = 1.8, 7.5
LAYERS_OF_A_MAP = {"same": 4, "table": 1, "reverse": 1}  # by direction: what runs on a map in common networks
FIRST_CHANNELS, MOST_CHANNELS = {"same": 48, "table": 16, "reverse": 96}, 256  # doubled from grid to grid


def sort_us(sorts: bool, kernel_map: Map, direction: str, grid, tiles, gpu: Gpu = H200) -> float:
    """A schedule and the layers that typically use it. When a layer is lowered the others are unknown."""
    channels = min(FIRST_CHANNELS[direction] * max(grid, default=1), MOST_CHANNELS)
    layer = min(conv_us(tile, kernel_map, channels, channels, "float16", sorts, gpu) for tile in tiles)
    return schedule_us(kernel_map, sorts, gpu) + LAYERS_OF_A_MAP[direction] * layer


def wgrad_slots(taps: int, c_in: int, c_out: int, gpu: Gpu = H200) -> int:
    """Shares of the pairs in wgrad: as many blocks as a multiprocessor holds, two if they are large, and two a tap.

    The number of shares decides how sums are split and so how they round: it must not depend on tile or capacity.
    """
    pieces, channels = math.ceil(c_in / 128) * math.ceil(c_out / 128), max(c_in, c_out)
    blocks = 4 if channels <= 32 else 3 if channels <= 48 else 2
    return max(2 * taps, blocks * gpu.multiprocessors // pieces)


def wgrad_us(tile, kernel_map: Map, c_in: int, c_out: int, dtype: str, gpu: Gpu = H200) -> float:
    """A gradient of weights over pairs, `cuda/conv/wgrad_gemm.cuh`: partial sums of slots, then their sum."""
    rows, cols, stages, _ = tile
    slots = wgrad_slots(kernel_map.taps, c_in, c_out, gpu)
    pieces = math.ceil(c_in / rows) * math.ceil(c_out / cols)
    in_slot = max(kernel_map.pairs / max(slots - kernel_map.taps, 1), 256)
    used = min(slots, kernel_map.pairs / in_slot + kernel_map.taps / 2)
    depth = STEP_BYTES // BYTES[dtype]  # pairs a step
    copied = STEP_BYTES * (rows + cols)
    step = gpu.step(rows * cols * depth / PRODUCTS[dtype], copied)
    resident = gpu.resident(2 * rows, cols, wgrad_shared_bytes(tile))
    partial = gpu.blocks_us(used * pieces, resident, in_slot / depth, in_slot / depth, step, gpu.chain(stages))
    sums = 2 * 4 * used * c_in * c_out / gpu.memory_bytes + gpu.launch_us
    return partial + sums


CPU_PRODUCTS = 3e4  # of one core, multiply-adds a microsecond, float32
CPU_TILE_TAP_US = 0.08  # a tap of a tile, besides its pairs
CPU_ENTRY_US = 0.0005  # to read an entry of the table
CPU_CORES = 8
CPU_FAST_BYTES = 32 * 1024


def cpu_conv_us(tile_rows: int, kernel_map: Map, c_in: int, c_out: int, dtype: str) -> float:
    """`bindings/cpu/conv.cc`: a task a tile, whose sums should stay in the first cache."""
    itemsize = BYTES[dtype]
    tiles = math.ceil(kernel_map.rows / tile_rows)
    entries = tile_rows * kernel_map.taps * CPU_ENTRY_US
    products = tile_rows * kernel_map.neighbours * c_in * c_out * itemsize / 4 / CPU_PRODUCTS
    spilled = 1.0 + 0.1 * max(math.log2(tile_rows * c_out * itemsize / CPU_FAST_BYTES), 0.0)
    weights = kernel_map.taps * c_in * c_out * itemsize / 4e4  # read anew by every tile, from a farther cache
    tile_us = kernel_map.taps * CPU_TILE_TAP_US + entries + products * spilled + weights
    return math.ceil(tiles / CPU_CORES) * tile_us


LOOK_UP_BYTES = 110  # of memory read at random for each key that is looked up or entered
SITES_IN_BLOCK = 3.0  # of LiDAR scans


def builder_us(builder: str, sites: int, taps: int, blocks: float, gpu: Gpu = H200) -> float:
    """A kernel map by look-ups, `cuda/coords/kernel_map.cu`: keys entered, keys looked up.

    `blocks` is how many blocks a window lies over. A look-up by blocks answers for all taps in the block.
    """
    entered, asked = (sites / SITES_IN_BLOCK, min(blocks, taps)) if builder == "blocks" else (sites, taps)
    return 2 * gpu.launch_us + LOOK_UP_BYTES * (2 * entered + sites * asked / 4) / gpu.memory_bytes
