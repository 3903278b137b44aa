"""Fits the rates of `jaxsparse/tuning/cost.py` to measured layers, and says how well they predict and choose.

    python benchmarks/fit_cost_model.py benchmarks/results/h200/layers_float16_all_tiles.json [...] [--steps 5000]

The files are those of `benchmarks/layers.py`. Without `--steps` the rates stay as they are. *error* is the root mean
square of log(predicted / measured); *regret* how much longer than the best measured tile the model's choice took.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import random
import re

import jax.numpy as jnp
import report
from layer_cases import DTYPES

from jaxsparse.ops.conv import Tile
from jaxsparse.ops.conv.choices import built_tiles, scheduled_widths
from jaxsparse.tuning import cost
from jaxsparse.tuning.result import show

RATES = ["step_bytes", "memory_bytes", "chain_us", "lone", "split_us", "block_us", "launch_us"]


def measured_layers(path):
    """What `layers.py` measured: a layer for each forward pass, sorted and not, and for each gradient of weights.

    Tiles that are no longer built are left out.
    """
    for row in json.loads(path.read_text())["results"]:
        name = re.match(r"\w+ ([\dx]+), (\d+) to (\d+), ", row["layer"])
        taps, c_in, c_out = math.prod(map(int, name[1].split("x"))), int(name[2]), int(name[3])
        dtype = jnp.dtype(DTYPES[row["dtype"]])
        width, _ = scheduled_widths(dtype, c_in, c_out)
        for sorts in {"forward": (True, False), "wgrad": (None,)}.get(row["pass"], ()):
            op, times = "wgrad" if sorts is None else "conv", {}
            built = built_tiles(op, dtype, width)
            for candidate in row["candidates"]:
                tile = re.match(r"(\d+)x(\d+)/(\d+)(?:x(\d+))?(, sorted)?$", candidate["kernel"])
                if tile and "us" in candidate and sorts in (None, tile[5] is not None):
                    times[Tile(*map(int, tile.groups("1")[:4]))] = candidate["us"]
            times = {tile: us for tile, us in times.items() if tile in built}
            if times:
                yield {
                    "op": op,
                    "dtype": "float16" if row["dtype"] == "bfloat16" else row["dtype"],
                    "rows": row["sites"],
                    "taps": taps,
                    "neighbours": row["pairs"] / row["sites"],
                    "c_in": c_in,
                    "c_out": c_out,
                    "sorts": sorts,
                    "us": times,
                }


def predicted(layer, tile, gpu):
    """Microseconds."""
    kernel_map = cost.Map(layer["rows"], layer["taps"], layer["neighbours"])
    sizes = tile, kernel_map, layer["c_in"], layer["c_out"], layer["dtype"]
    return cost.wgrad_us(*sizes, gpu) if layer["op"] == "wgrad" else cost.conv_us(*sizes, layer["sorts"], gpu)


def judge(layer, gpu):
    """Tiles with (measured, predicted) times, and the regret."""
    times = {tile: (us, predicted(layer, tile, gpu)) for tile, us in layer["us"].items()}
    chosen = min(times, key=lambda tile: times[tile][1])
    return times, times[chosen][0] / min(us for us, _ in times.values()) - 1


def loss(layers, gpu):
    """Error of times, of the ratios that decide within a layer, and regret."""
    logs, ratios, regrets = [], [], []
    for layer in layers:
        times, regret = judge(layer, gpu)
        own = [math.log(guess / us) for us, guess in times.values()]
        mean = sum(own) / len(own)
        logs += own
        ratios += [x - mean for x in own]
        regrets.append(regret)
    rms = [math.sqrt(sum(x * x for x in values) / len(values)) for values in (logs, ratios)]
    return rms[0] + 2 * rms[1] + 4 * sum(regrets) / len(regrets)


def fit(layers, gpu, steps):
    """Rates of less loss, by random steps downhill."""
    random.seed(0)
    least = loss(layers, gpu)
    for _ in range(steps):
        names = random.sample(RATES, random.choice([1, 1, 2, 3]))
        other = dataclasses.replace(gpu, **{n: getattr(gpu, n) * math.exp(random.gauss(0, 0.3)) for n in names})
        if (found := loss(layers, other)) < least:
            least, gpu = found, other
    return gpu


COLUMNS = {
    "layer": lambda r: f"{r['op']}, {r['rows']:,} rows, {r['taps']} taps, {r['c_in']} to {r['c_out']}",
    "measured / predicted us": lambda r: ", ".join(
        f"{show(tile)}: {us:.1f} / {guess:.1f}" for tile, (us, guess) in r["times"].items()
    ),
    "regret %": lambda r: 100 * r["regret"],
}


def main():
    """Prints the rates and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args()
    layers = [layer for path in args.files for layer in measured_layers(path)]
    gpu = fit(layers, cost.H200, args.steps)
    print(gpu)
    rows = []
    for layer in layers:
        times, regret = judge(layer, gpu)
        rows.append({**layer, "times": times, "regret": regret})
    print(report.table(COLUMNS, rows))
    logs = [math.log(guess / us) for row in rows for us, guess in row["times"].values()]
    print(f"error {math.sqrt(sum(x * x for x in logs) / len(logs)):.3f}, mean regret", end=" ")
    print(f"{100 * sum(row['regret'] for row in rows) / len(rows):.1f} %")


if __name__ == "__main__":
    main()
