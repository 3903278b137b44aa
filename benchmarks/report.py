"""Writes a benchmark's results: one JSON file with everything, and a Markdown table for people.

Every figure comes with what produced it: device, versions, commit, command line and date.
"""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import jax

import jaxsparse


def version(package):
    """A package's version, or None where it is not installed; jaxsparse may run from a checkout."""
    if package == "jaxsparse":
        return jaxsparse.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args):
    folder = pathlib.Path(__file__).parent
    try:
        return subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def context(peers=()):
    """What a reader needs to judge or repeat a figure."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        commit += " with local changes"
    names = ["jaxsparse", "jax", "jaxlib", "flax", *peers]
    # Where folders lie on this machine says nothing about the figure: names only.
    arguments = [pathlib.Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *arguments])
    return {
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else f"CPU, {_cpu_name()}",
        "versions": {name: version(name) for name in names if version(name)},
        "python": platform.python_version(),
        "commit": commit,
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def table(columns, rows):
    """A Markdown table. `columns` maps a heading to a function of one row (a dict); None prints as "-"."""

    def cell(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(get(row)) for get in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def write(folder, name, about, columns, rows, peers=(), **more):
    """Prints the table and writes `name.json`, with `more` in it, and `name.md` into `folder` (not when it is None)."""
    facts = context(peers) | more
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    text = "\n\n".join(
        [
            f"# {about}",
            f"{facts['device']}; {versions}; Python {facts['python']}; commit {facts['commit']}; {facts['date']}",
            f"`{facts['command']}`",
            table(columns, rows),
        ]
    )
    print(text)
    if folder is not None:
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text + "\n")
        (folder / f"{name}.json").write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n")
