"""Networks for heads and couplings.

Every network takes ``(x, context)``. A network built with ``context=n`` needs a context of n
features per example, which it concatenates to its input; others ignore the context.
"""

from musigma.context import join
from musigma.nets.attention import AttentionNet, GatedAttention, GatedConv
from musigma.nets.constant import Constant
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
from musigma.nets.embed import EMBEDDINGS, Embedding, embedding, embedding_of
from musigma.nets.lipschitz import LipschitzMLP
from musigma.nets.quantiles import NormalScores, Quantiles
from musigma.nets.quantizers import (
    QUANTIZERS,
    FiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from musigma.nets.sequences import DeepSet, SequenceTransformer, SeriesNet
from musigma.nets.summary import Summary
from musigma.nets.transformer import CausalTransformer, Transformer
from musigma.nets.vectors import (
    MADE,
    MLP,
    Amortized,
    Conditioner,
    Logarithm,
    Periodic,
    ResidualMLP,
    Scaled,
)

__all__ = [
    "EMBEDDINGS",
    "MADE",
    "MLP",
    "QUANTIZERS",
    "Amortized",
    "AttentionNet",
    "CausalTransformer",
    "Conditioner",
    "Constant",
    "ConvDecoder",
    "ConvEncoder",
    "CouplingNet",
    "DeepSet",
    "EdgeConv2d",
    "Embedding",
    "FiniteScalarQuantizer",
    "GatedAttention",
    "GatedConv",
    "LipschitzMLP",
    "Logarithm",
    "NormalScores",
    "Periodic",
    "Quantiles",
    "ResBlock",
    "ResNet",
    "ResidualMLP",
    "ResidualQuantizer",
    "Scaled",
    "SequenceTransformer",
    "SeriesNet",
    "Summary",
    "ToPixels",
    "Transformer",
    "Upsample",
    "VectorQuantizer",
    "ZeroConv2d",
    "edge_bias",
    "embedding",
    "embedding_of",
    "halved",
    "join",
]
