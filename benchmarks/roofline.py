"""Draws the results of `layers.py` under the roof that the device sets: useful FLOP/s against FLOPs a byte.

python benchmarks/roofline.py RESULTS/layers_float16.json ...      # writes layers_float16.png beside each
"""

import json
import pathlib
import sys

COLOURS = {"forward": "tab:blue", "dgrad": "tab:green", "wgrad": "tab:orange", "backward": "tab:red"}


def draw(folder, name, rows, rates):
    """Writes `name.png` into `folder` (not when it is None), or says that matplotlib is missing."""
    if folder is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no matplotlib here: python benchmarks/roofline.py {name}.json draws the picture elsewhere")
        return
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = [min(intensities) / 2, max(*intensities, rates["flops"] / rates["bytes"]) * 2]
    corner = [ends[0], rates["flops"] / rates["bytes"], ends[1]]
    axes.plot(corner, [min(rates["flops"], i * rates["bytes"]) / 1e12 for i in corner], color="black", label="roof")
    for of, colour in COLOURS.items():
        for key, face, who in (("us", colour, "jaxsparse"), ("spconv_us", "none", "spconv")):
            shown = [
                (r["flops"] / r["bytes"], r["flops"] / r[key] / 1e6) for r in rows if r["pass"] == of and r.get(key)
            ]
            # Our dgrad and wgrad stand apart; spconv's come together.
            if shown and not (of == "backward" and who == "jaxsparse"):
                axes.scatter(*zip(*shown, strict=True), edgecolors=colour, facecolors=face, s=28, label=f"{who}, {of}")
    axes.set(xscale="log", yscale="log", xlabel="useful FLOPs a byte of the least traffic", ylabel="useful TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(pathlib.Path(folder) / f"{name}.png", dpi=150)


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        content = json.loads(path.read_text())
        draw(path.parent, path.stem, content["results"], content["rates"])
