"""The networks as a user of spconv writes them, with the weights of `reference.py`. Imports torch and spconv."""

import numpy as np
import reference
import spconv.pytorch as spconv
import torch
from torch import nn


def padding(kernel):
    """3 taps reach -1 to 1, 2 taps 0 to 1."""
    return [(k - 1) // 2 for k in kernel]


def subm(c_in, c_out, kernel, key):
    """A submanifold convolution; layers with the same key share their map."""
    return spconv.SubMConv3d(c_in, c_out, kernel, padding=padding(kernel), bias=False, indice_key=key)


def conv_norm_relu(conv):
    """The convolution, a batch norm and a ReLU."""
    return spconv.SparseSequential(conv, nn.BatchNorm1d(conv.out_channels), nn.ReLU(inplace=True))


class Block(spconv.SparseModule):
    """conv, norm, ReLU, conv, norm, plus the input, ReLU."""

    def __init__(self, c_in, c_out, key):
        super().__init__()
        self.conv1 = conv_norm_relu(subm(c_in, c_out, reference.THREE, key))
        self.conv2 = spconv.SparseSequential(subm(c_out, c_out, reference.THREE, key), nn.BatchNorm1d(c_out))
        self.shortcut = spconv.SparseSequential()
        if c_in != c_out:
            self.shortcut = spconv.SparseSequential(subm(c_in, c_out, reference.ONE, None), nn.BatchNorm1d(c_out))

    def forward(self, x):
        """The block's output on the sites of its input."""
        y = self.conv2(self.conv1(x))
        return y.replace_feature(torch.relu(y.features + self.shortcut(x).features))


class Network(nn.Module):
    """The stages of `reference.py` one after another; maps shared by `indice_key`."""

    def __init__(self, stages, in_features):
        super().__init__()
        self.kinds = [stage.kind for stage in stages]
        self.stages = nn.ModuleList()
        level, c_in, skips = 0, in_features, []
        for stage in stages:
            if stage.kind == "strided":
                skips.append(c_in)
                level += 1
                conv = spconv.SparseConv3d(
                    c_in,
                    stage.features,
                    stage.kernel,
                    stage.strides,
                    padding(stage.kernel),
                    bias=False,
                    indice_key=f"strided{level}",
                )
            elif stage.kind == "transposed":
                conv = spconv.SparseInverseConv3d(
                    c_in, stage.features, stage.kernel, indice_key=f"strided{level}", bias=False
                )
                level -= 1
            else:
                conv = subm(c_in, stage.features, stage.kernel, f"subm{level}")
            c_in = stage.features + (skips.pop() if stage.kind == "transposed" else 0)
            blocks = []
            for c in stage.blocks:
                blocks.append(Block(c_in, c, f"subm{level}"))
                c_in = c
            self.stages.append(nn.ModuleList([conv_norm_relu(conv), spconv.SparseSequential(*blocks)]))

    def forward(self, x):
        """The output of the last stage."""
        skips = []
        for kind, (conv, blocks) in zip(self.kinds, self.stages, strict=True):
            if kind == "strided" and "transposed" in self.kinds:
                skips.append(x)
            x = conv(x)
            if kind == "transposed":
                x = x.replace_feature(torch.cat([x.features, skips.pop().features], dim=1))
            x = blocks(x)
        return x


def to_spconv(kernel, size):
    """A kernel [taps, in, out] in spconv's layout [out, *size, in]; its axes are those of the coordinates, in order.

    Its 1x1 convolutions are the exception: spconv 2.3.8 declares [out, 1, 1, 1, in] and multiplies by the same memory
    read as [in, out].
    """
    _, c_in, c_out = kernel.shape
    if len(kernel) == 1:
        return torch.tensor(kernel.reshape(c_out, *size, c_in))
    return torch.from_numpy(np.moveaxis(kernel.reshape(*size, c_in, c_out), -1, 0).copy())


def from_spconv(weight):
    """The inverse of `to_spconv`, as a float32 numpy array."""
    weight = weight.float().cpu().numpy()
    c_out, *size, c_in = weight.shape
    if np.prod(size) == 1:
        return weight.reshape(1, c_in, c_out)
    return np.moveaxis(weight, 0, -1).reshape(-1, c_in, c_out)


def build(stages, weights, in_features, dtype, device):
    """The network with the given weights, which lie in the order of its modules."""
    net = Network(stages, in_features)
    left = iter(weights)
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "kernel_size"):
                module.weight.copy_(to_spconv(next(left), module.kernel_size))
            elif isinstance(module, nn.BatchNorm1d):
                state = (module.weight, module.bias, module.running_mean, module.running_var)
                for tensor, value in zip(state, next(left), strict=True):
                    tensor.copy_(torch.tensor(value))
    assert next(left, None) is None
    return net.to(device, getattr(torch, dtype))


def gradients(net):
    """Gradients in the order and layout of the weights that `build` takes."""
    found = []
    for module in net.modules():
        if hasattr(module, "kernel_size"):
            found.append(from_spconv(module.weight.grad))
        elif isinstance(module, nn.BatchNorm1d):
            found.append(tuple(p.grad.float().cpu().numpy() for p in (module.weight, module.bias)))
    return found


def inputs(ring, dtype, device):
    """Resident tensors of each batch: (features, coordinates, sizes of the box, batch size).

    The box is the same for the whole ring, a multiple of 16 with 16 cells to spare, so that no stride cuts sites off.
    """
    top = np.max([v.coords[:, 1:].max(axis=0) for v in ring], axis=0)
    box = [int(t) // 16 * 16 + 32 for t in top]
    return [
        (
            torch.tensor(v.feats).to(device, getattr(torch, dtype)),
            torch.tensor(v.coords).to(device),
            box,
            int(v.coords[:, 0].max()) + 1,
        )
        for v in ring
    ]


def tensor(batch):
    """A new sparse tensor, with no maps yet."""
    return spconv.SparseConvTensor(*batch)
