"""Networks for heads and couplings.

Every network takes ``(x, context)``. A network built with ``context=n`` needs a context of n
features per example, which it concatenates to its input; others ignore the context.
"""

from musigma.context import join
from musigma.nets.conv import (
    ConvDecoder,
    ConvEncoder,
    CouplingNet,
    EdgeConv2d,
    ResBlock,
    ResNet,
    ToPixels,
    Upsample,
    ZeroConv2d,
    edge_bias,
    halved,
)
from musigma.nets.embed import Embedding
from musigma.nets.vectors import MADE, MLP, Conditioner, Scaled

__all__ = [
    "MADE",
    "MLP",
    "Conditioner",
    "ConvDecoder",
    "ConvEncoder",
    "CouplingNet",
    "EdgeConv2d",
    "Embedding",
    "ResBlock",
    "ResNet",
    "Scaled",
    "ToPixels",
    "Upsample",
    "ZeroConv2d",
    "edge_bias",
    "halved",
    "join",
]
