"""spconv's side of `networks.py`: the same rows, where torch and spconv are installed."""

import os

import jax
import measure
import numpy as np
from workloads import IN_FEATURES, LEARNING_RATE, LOSS_SCALE, error, error_limit, first_scan, wall_figures


def rows(workload, weights, ring, args, expected):
    """The rows of one workload; none where spconv cannot run: not installed, or training or 16 bits without a GPU."""
    if jax.default_backend() == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # with more threads its scatter adds race, and rows lose taps
    try:
        import spconv_peer
        import torch
    except ImportError:
        return []
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu" and (workload.training or args.dtype != "float32"):
        return []  # spconv's CPU path has neither gradients nor 16-bit floats
    dtype = "float16" if args.dtype == "bfloat16" else args.dtype  # it knows no bfloat16
    scale = LOSS_SCALE[dtype]

    def row_of(task, step, inputs, first_output=None):
        row = {"task": task, "dtype": dtype}
        if first_output is not None:
            row["error"] = error(first_output(), expected)
            if row["error"] > error_limit(dtype, workload.training):
                return row
        sync = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
        row |= wall_figures(step, inputs, sync, args.steps)
        if device == "cuda":
            steps = min(args.steps, len(inputs))
            row |= measure.kernel_figures(measure.torch_kernels(step, inputs, steps), steps)
            torch.cuda.reset_peak_memory_stats()
            step(inputs[0])
            row["memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        return row

    def network(dtype):
        net = spconv_peer.build(workload.stages, weights, IN_FEATURES, dtype, device).train(workload.training)
        return net, spconv_peer.inputs(ring, dtype, device)

    def inference():
        net, inputs = network(dtype)

        def step(x):
            with torch.no_grad():
                return net(spconv_peer.tensor(x))

        def output():
            y = step(inputs[0])
            return first_scan(y.indices.cpu().numpy(), y.features.double().cpu().numpy())

        return row_of("inference", step, inputs, output)

    def gradients():
        net, inputs = network(dtype)

        def step(x):
            net.zero_grad(set_to_none=True)
            loss = net(spconv_peer.tensor(x)).features.float().square().mean() * scale
            loss.backward()
            return loss

        def output():
            step(inputs[0])
            return jax.tree.map(lambda g: g.astype(np.float64) / scale, spconv_peer.gradients(net))

        return row_of("forward + backward", step, inputs, output)

    def train_step():
        net, inputs = network("float32")
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=scale, enabled=dtype == "float16")

        def step(x):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
                loss = net(spconv_peer.tensor(x)).features.float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        return row_of("train step", step, inputs)

    found = []
    for task in (gradients, train_step) if workload.training else (inference,):
        try:
            found.append(task())
        except (RuntimeError, ValueError, KeyError, TypeError) as problem:
            print(f"no spconv beside it in {dtype}: {type(problem).__name__}: {str(problem)[:200]}")
    return found
