"""SparseResUNet42 as a user of spconv writes it, with the weights of `reference.py`. Imports torch and spconv."""

import numpy as np
import reference
import spconv.pytorch as spconv
import torch
from torch import nn


def subm(c_in, c_out, kernel, key):
    """A submanifold convolution; layers with the same key share their map."""
    return spconv.SubMConv3d(c_in, c_out, kernel, padding=kernel // 2, bias=False, indice_key=key)


def conv_norm_relu(conv):
    """The convolution, a batch norm and a ReLU."""
    return spconv.SparseSequential(conv, nn.BatchNorm1d(conv.out_channels), nn.ReLU(inplace=True))


class Block(spconv.SparseModule):
    """conv, norm, ReLU, conv, norm, plus the input, ReLU."""

    def __init__(self, c_in, c_out, key):
        super().__init__()
        self.conv1 = conv_norm_relu(subm(c_in, c_out, 3, key))
        self.conv2 = spconv.SparseSequential(subm(c_out, c_out, 3, key), nn.BatchNorm1d(c_out))
        self.shortcut = spconv.SparseSequential()
        if c_in != c_out:
            self.shortcut = spconv.SparseSequential(subm(c_in, c_out, 1, None), nn.BatchNorm1d(c_out))

    def forward(self, x):
        """The block's output on the sites of its input."""
        y = self.conv2(self.conv1(x))
        return y.replace_feature(torch.relu(y.features + self.shortcut(x).features))


class SparseResUNet42(nn.Module):
    """Stem, four encoder stages, four decoder stages with skips; maps shared by `indice_key`."""

    def __init__(self, in_features, width):
        super().__init__()
        stem, encoder, decoder = reference.seg_widths(width)
        self.stem = spconv.SparseSequential(
            conv_norm_relu(subm(in_features, stem, 3, "subm0")), conv_norm_relu(subm(stem, stem, 3, "subm0"))
        )
        channels = [stem]
        self.encoder = nn.ModuleList()
        for level, c in enumerate(encoder):
            down = spconv.SparseConv3d(channels[-1], channels[-1], 2, 2, bias=False, indice_key=f"down{level}")
            key = f"subm{level + 1}"
            self.encoder.append(
                spconv.SparseSequential(conv_norm_relu(down), Block(channels[-1], c, key), Block(c, c, key))
            )
            channels.append(c)
        self.decoder = nn.ModuleList()
        c_in = channels.pop()
        for level, c in zip(reversed(range(len(encoder))), decoder, strict=True):
            up = spconv.SparseInverseConv3d(c_in, c, 2, indice_key=f"down{level}", bias=False)
            key = f"subm{level}"
            self.decoder.append(
                nn.ModuleList(
                    [conv_norm_relu(up), spconv.SparseSequential(Block(c + channels.pop(), c, key), Block(c, c, key))]
                )
            )
            c_in = c

    def forward(self, x):
        """Features on the sites of the input."""
        x = self.stem(x)
        skips = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        for up, blocks in self.decoder:
            x = up(x)
            x = blocks(x.replace_feature(torch.cat([x.features, skips.pop().features], dim=1)))
        return x


def to_spconv(kernel, size):
    """A kernel [taps, in, out] in spconv's layout [out, z, y, x, in].

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


def build(weights, in_features, width, dtype, device):
    """The network with the given weights, which lie in the order of its modules."""
    net = SparseResUNet42(in_features, width)
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

    The box is the same for the whole ring and a multiple of 16, so that no stride cuts voxels off.
    """
    top = max(v.coords[:, 1:].max() for v in ring)
    box = [int(-(-(top + 1) // 16) * 16)] * 3
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
