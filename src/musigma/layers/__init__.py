"""The parts of a chain: bijections, and the two layers that draw (`Split`, `Dequantize`)."""

from musigma.layers.autoregressive import Autoregressive
from musigma.layers.classifier import Classifier
from musigma.layers.conditioners import MADE, Conditioner
from musigma.layers.coupling import Coupling
from musigma.layers.elementwise import Affine, Logit
from musigma.layers.linear import ActNorm, InvertibleConv, Permutation
from musigma.layers.reshape import Checkerboard, Squeeze
from musigma.layers.spline import Spline
from musigma.layers.surjections import Dequantize, Split

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
