"""How a figure is taken: fresh inputs each step, warmed up, median and quartiles, device time from the profiler.

A *step* is a function of one input that returns arrays; a *sync* waits for them. Outputs are dropped before the next
step, as a deployment drops them: XLA's CUDA graphs are captured again when output addresses move.
"""

import glob
import tempfile
import time
from contextlib import contextmanager

import jax
import numpy as np


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


def jax_gpu_ms(step, inputs, steps):
    """Sum of kernel and copy times on the GPU's streams for one step, from a jax.profiler trace; None without a GPU.

    Kernels inside CUDA graphs are traced one by one, so they count.
    """
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                jax.block_until_ready(step(inputs[i % len(inputs)]))
        total = sum(
            event.duration_ns
            for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            for plane in jax.profiler.ProfileData.from_file(path).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
    if not total:
        raise RuntimeError("the profiler's trace holds no event on a GPU stream, so GPU time is unknown")
    return total / 1e6 / steps


def torch_gpu_ms(step, inputs, steps):
    """Sum of kernel and copy times of one step of a PyTorch program, from torch.profiler; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(steps):
            step(inputs[i % len(inputs)])
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(e.time_range.elapsed_us() for e in on_device) / 1e3 / steps


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
