"""The parts of a chain: bijections, and the two layers that draw (`Split`, `Dequantize`)."""

from musigma.layers.autoregressive import Autoregressive
from musigma.layers.classifier import Classifier
from musigma.layers.coupling import Coupling
from musigma.layers.elementwise import Affine, Logit
from musigma.layers.linear import ActNorm, InvertibleConv, Permutation
from musigma.layers.maps.spline import Spline
from musigma.layers.quantize import Dequantize
from musigma.layers.reshape import Checkerboard, Squeeze
from musigma.layers.split import Split
from musigma.nets.made import MADE, Conditioner

__all__ = [
    "MADE",
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Checkerboard",
    "Classifier",
    "Conditioner",
    "Coupling",
    "Dequantize",
    "InvertibleConv",
    "Logit",
    "Permutation",
    "Spline",
    "Split",
    "Squeeze",
]
