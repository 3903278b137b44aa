"""How a figure is taken: fresh inputs each step, warmed up, median and quartiles, device time from the profiler.

A *step* is a function of one input that returns arrays; a *sync* waits for them. Outputs are dropped before the next
step, as a deployment drops them: XLA's CUDA graphs are captured again when output addresses move.
"""

import glob
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np


def add_device(parser):
    """Adds the option that `choose_device` takes."""
    parser.add_argument("--device", choices=["cpu", "gpu"], default=None, help="where to run (default: JAX's default)")


def choose_device(name):
    """Runs everything on the CPU or a GPU; ends the program where there is none."""
    if name is None:
        return
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[name])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {name}: JAX finds none here {error}".rstrip()) from error


@contextmanager
def awake_cores(are_wanted):
    """Keeps the processor's cores awake meanwhile, if that is wanted, as docs/deployment.md advises."""
    if not are_wanted:
        yield
        return
    program = pathlib.Path(__file__).parents[1] / "examples" / "awake.py"
    spinning = subprocess.Popen([sys.executable, str(program)])
    try:
        yield
    finally:
        spinning.terminate()
        spinning.wait()


def wall_ms(step, inputs, sync, steps):
    """Wall time of each step in milliseconds, synchronised before and after, going round the ring of inputs."""
    times, warmup = [], max(3, steps // 5)
    for i in range(warmup + steps):
        start = time.perf_counter()
        out = step(inputs[i % len(inputs)])
        sync(out)
        times.append(1e3 * (time.perf_counter() - start))
        del out
    return times[warmup:]


def pipelined_ms(step, inputs, sync, steps):
    """Wall time a step when steps are launched one after another and only the last is waited for."""
    start = time.perf_counter()
    for i in range(steps):
        out = step(inputs[i % len(inputs)])
    sync(out)
    return 1e3 * (time.perf_counter() - start) / steps


def summary(times):
    """Median, quartiles and count of a list of times."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": float(median), "quartiles": [float(low), float(high)], "steps": len(times)}


class Kernel(NamedTuple):
    """A kernel or copy on the GPU, and the compiled program and the instruction of its HLO that it belongs to.

    Inside a CUDA graph the instruction is unknown ("").
    """

    name: str
    program: str
    instruction: str
    start_ns: float
    ns: float


def gpu_kernels(run):
    """All kernels and copies on the GPU's streams while `run()` runs, in the order in which they started.

    Kernels inside CUDA graphs are traced one by one. A trace has come back empty for no reason found: then once more.
    It stays empty for good once torch's profiler has run in the process, so torch comes last.
    """
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run()
            found = [
                Kernel(
                    event.name,
                    str((stats := dict(event.stats)).get("hlo_module", "")),
                    str(stats.get("hlo_op", "")),
                    event.start_ns,
                    event.duration_ns,
                )
                for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
                for plane in jax.profiler.ProfileData.from_file(path).planes
                if plane.name.startswith("/device:GPU")
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ]
        if found:
            return sorted(found, key=lambda kernel: kernel.start_ns)
        if attempt == 1:
            print("the profiler's trace holds no event on a GPU stream; once more", file=sys.stderr)
    raise RuntimeError(
        "twice the profiler's trace held no event on a GPU stream, so GPU time is unknown; torch's profiler must not "
        "run before JAX's in a process"
    )


def run_steps(step, inputs, steps):
    """Runs the step on one input after another, waiting for each."""
    for i in range(steps):
        jax.block_until_ready(step(inputs[i % len(inputs)]))


def busy_ms(kernels):
    """Milliseconds in which at least one of the kernels and copies runs: the sum of their times, if none overlap."""
    busy, end = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        kernel_end = kernel.start_ns + kernel.ns
        busy += max(kernel_end - max(kernel.start_ns, end), 0.0)
        end = max(end, kernel_end)
    return busy / 1e6


def kernel_figures(kernels, steps):
    """GPU milliseconds and number of kernels (copies aside) of a step, from those of several."""
    launched = [kernel for kernel in kernels if not kernel.name.lower().startswith("mem")]
    return {"gpu_ms": busy_ms(kernels) / steps, "kernels": round(len(launched) / steps)}


def jax_gpu_ms(step, inputs, steps):
    """Milliseconds of a step in which the GPU runs kernels or copies, from a trace; None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return busy_ms(gpu_kernels(lambda: run_steps(step, inputs, steps))) / steps


class ProgramTimes(NamedTuple):
    """Microseconds of each step of a program, and on a GPU of each instruction that launched kernels: [steps]."""

    total: np.ndarray
    by_instruction: dict[str, np.ndarray] | None


def program_times(programs, inputs, steps):
    """GPU time of each step of many compiled programs, from one trace; wall time on a CPU.

    Args:
      programs: {key: compiled program}, each jitted from a function of another name.
      inputs: the ring, a tuple of operands each.
      steps: steps of each program, after one that warms it up.
    """
    run = {key: lambda operands, p=program: p(*operands) for key, program in programs.items()}
    if jax.default_backend() != "gpu":
        walls = {key: wall_ms(step, inputs, jax.block_until_ready, steps) for key, step in run.items()}
        return {key: ProgramTimes(1e3 * np.array(ms), None) for key, ms in walls.items()}
    for step in run.values():
        run_steps(step, inputs, 1)

    def all_programs():
        for step in run.values():
            run_steps(step, inputs, steps)

    kernels = defaultdict(list)
    for kernel in gpu_kernels(all_programs) if programs else []:
        kernels[kernel.program].append(kernel)
    found = {}
    for key, program in programs.items():
        name = program_name(program)
        of_program = kernels[name]
        if not of_program or len(of_program) % steps:
            raise RuntimeError(f"the trace holds {len(of_program)} kernels of {name}, which ran {steps} times")
        each = 1e-3 * np.array([k.ns for k in of_program]).reshape(steps, -1)
        by_instruction = defaultdict(lambda: np.zeros(steps))
        for i, kernel in enumerate(of_program[: each.shape[1]]):
            by_instruction[kernel.instruction] += each[:, i]
        found[key] = ProgramTimes(each.sum(axis=1), dict(by_instruction))
    return found


def program_name(compiled):
    """The name of a compiled program's HLO module."""
    return re.match(r"HloModule ([^ ,]+)", compiled.as_text())[1]


def custom_calls(compiled):
    """The custom calls of this library in a compiled program: {instruction: (name, whether in a backward pass)}."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*custom_call_target="jaxsparse_(\w+)_v\d+"(.*)$', re.MULTILINE)
    return {name: (target, "transpose(" in rest) for name, target, rest in pattern.findall(compiled.as_text())}


def torch_kernels(step, inputs, steps):
    """All kernels and copies on the GPU while a PyTorch program makes its steps."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(steps):
            step(inputs[i % len(inputs)])
        torch.cuda.synchronize()
    found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [Kernel(e.name, "", "", 1e3 * e.time_range.start, 1e3 * e.time_range.elapsed_us()) for e in found]


def torch_gpu_ms(step, inputs, steps):
    """Milliseconds of a step of a PyTorch program in which the GPU runs kernels or copies; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return kernel_figures(torch_kernels(step, inputs, steps), steps)["gpu_ms"]


def compile_seconds(lower):
    """A compiled program, and the seconds from Python to it: cold, and from the persistent cache that this filled.

    Args:
      lower: makes a new `jax.stages.Lowered` of the same program each time.
    """
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in (options | {"jax_compilation_cache_dir": folder}).items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                compiled = lower().compile()
                seconds.append(time.perf_counter() - start)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    return compiled, *seconds


@contextmanager
def stage(name):
    """Says on stderr how long a part of a benchmark took."""
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


@contextmanager
def count_compilations():
    """Yields a list that grows by one duration in seconds for each program that XLA compiles."""
    durations = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def memory_mb(compiled):
    """Device memory that a compiled program needs in MB: arguments (weights included), outputs and temporaries."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    size = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return (size - stats.alias_size_in_bytes) / 1e6
