"""One convolution by spconv on a map that is given: its GPU time and error for a case of `layers.py`."""

import inputs
import jax.numpy as jnp
import measure
import numpy as np
import spconv.pytorch as spconv
import torch
from reference import keys
from spconv import constants
from spconv.pytorch import functional
from spconv_peer import from_spconv, padding, to_spconv


def function(layer, dtype, coords, training):
    """The layer, its output sites, and a function of features that computes it; the map is built here.

    coords: int32 [N, 4] on the device, the sites of the finer grid.
    """
    box = [int(c) // 16 * 16 + 32 for c in coords[:, 1:].max(0).values]
    options = {"bias": False, "indice_key": "map", "large_kernel_fast_algo": True}
    taps = {"kernel_size": layer.kernel, "padding": padding(layer.kernel)}

    def tensor(channels):
        return spconv.SparseConvTensor(torch.zeros(len(coords), channels, device="cuda", dtype=dtype), coords, box, 1)

    def ready(module):
        return module.cuda().to(dtype).train(training)

    if layer.kind == "submanifold":
        conv = ready(spconv.SubMConv3d(layer.c_in, layer.c_out, **taps, **options))
        out = conv(tensor(layer.c_in))
        return conv, out.indices, lambda feats: conv(out.replace_feature(feats)).features  # `out` has the map
    down = ready(spconv.SparseConv3d(layer.c_in, layer.c_out, stride=layer.strides, **taps, **options))
    out = down(tensor(layer.c_in))
    if layer.kind == "inverse":
        conv = ready(spconv.SparseInverseConv3d(layer.c_in, layer.c_out, layer.kernel, bias=False, indice_key="map"))
        return conv, out.indices, lambda feats: conv(out.replace_feature(feats)).features
    m = out.indice_dict["map"]

    def strided(feats):  # what the layer does, which would build its map anew
        return functional.implicit_gemm(
            feats,
            down.weight,
            m.pair_fwd,
            m.pair_bwd,
            m.pair_mask_fwd_splits,
            m.pair_mask_bwd_splits,
            m.mask_argsort_fwd_splits,
            m.mask_argsort_bwd_splits,
            len(m.out_indices),
            m.masks,
            training,
            False,
            out._timer,
            down.fp32_accum,
        )

    return down, out.indices, strided


def order_of(found, wanted):
    """The row of `found` that holds each site of `wanted`."""
    found, wanted = keys(found.cpu().numpy()), keys(wanted)
    order = np.argsort(found)
    if not np.array_equal(found[order], np.sort(wanted)):
        raise ValueError("spconv has other sites")
    at = order[np.searchsorted(found[order], wanted)]
    return torch.tensor(at, device="cuda")


def on_torch(array, dtype):
    """An array of jax as a tensor."""
    return torch.tensor(np.asarray(array, np.float32)).cuda().to(dtype)


def figures(case, steps):
    """{"forward": {"us", "error"}, ...}: passes with the error of each, "backward" with the time of both."""
    layer = case.layer
    constants.SPCONV_ALLOW_TF32 = case.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    counts = [int(s.count) for s in case.sites]
    fine, (coords_in, coords_out) = inputs.real(case.fine), map(inputs.real, case.sites)
    try:
        found = {}
        for training in (False, True):
            conv, sites, run = function(layer, dtype, torch.tensor(fine).cuda(), training)
            # Rows of strided sites lie in spconv's own order.
            in_rows = order_of(sites, coords_in) if layer.kind == "inverse" else slice(None)
            out_rows = order_of(sites, coords_out) if layer.kind == "strided" else slice(None)
            with torch.no_grad():
                conv.weight.copy_(to_spconv(np.asarray(case.weights, np.float32), conv.kernel_size))
            first = [on_torch(a[:n], dtype) for a, n in zip(case.ring[0], counts, strict=True)]
            ring = [[a.roll(i, 0) for a in first] for i in range(len(case.ring))]
            for x, g in ring:
                x[in_rows], g[out_rows] = x.clone(), g.clone()
                x.requires_grad_(training)
            if training:
                made = [run(x) for x, _ in ring]
                step = lambda i: torch.autograd.grad(made[i], (ring[i][0], conv.weight), ring[i][1], retain_graph=True)  # noqa: B023, E731
                dx, dw = step(0)
                values = {"dgrad": dx[in_rows], "wgrad": from_spconv(dw)}
            else:
                step = lambda i: run(ring[i][0])  # noqa: B023, E731
                with torch.no_grad():
                    values = {"forward": step(0)[out_rows]}
            for name, value in values.items():
                value = value if isinstance(value, np.ndarray) else value.float().cpu().numpy()
                found[name] = {"error": case.error(name, jnp.asarray(value, case.weights.dtype))}
            with torch.set_grad_enabled(training):
                for i in range(len(ring)):
                    step(i)
                us = 1e3 * measure.torch_gpu_ms(step, range(len(ring)), steps)
            if all(found[name]["error"] < np.inf for name in values):
                found.setdefault("backward" if training else "forward", {})["us"] = us
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        print(f"no spconv beside {layer}, {case.dtype}: {str(error)[:200]}")
    return found
