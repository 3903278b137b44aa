"""Functions on sparse tensors; the layers of `jaxsparse.nn` hold parameters and call these."""

from jaxsparse._primitive import save_products
from jaxsparse.ops.channel_norm import ChannelNorm
from jaxsparse.ops.conv import ConvConfig, conv, conv_transpose
from jaxsparse.ops.elementwise import activate, gelu, leaky_relu, map_features, relu, silu
from jaxsparse.ops.join import add, concatenate
from jaxsparse.ops.linear import linear
from jaxsparse.ops.norm import batch_norm, batch_statistics, normalize_batch
from jaxsparse.ops.rows import gather_rows, sum_rows

__all__ = [
    "ChannelNorm",
    "ConvConfig",
    "activate",
    "add",
    "batch_norm",
    "batch_statistics",
    "concatenate",
    "conv",
    "conv_transpose",
    "gather_rows",
    "gelu",
    "leaky_relu",
    "linear",
    "map_features",
    "normalize_batch",
    "relu",
    "save_products",
    "silu",
    "sum_rows",
]
