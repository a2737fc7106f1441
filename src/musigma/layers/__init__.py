"""The parts of a chain: bijections, and the two layers that draw (`Split`, `Dequantize`)."""

from musigma.layers.classifier import Classifier
from musigma.layers.coupling import Coupling
from musigma.layers.elementwise import Affine, Logit
from musigma.layers.linear import ActNorm, InvertibleConv, Permutation
from musigma.layers.reshape import Checkerboard, Squeeze
from musigma.layers.surjections import Dequantize, Split

__all__ = [
    "ActNorm",
    "Affine",
    "Checkerboard",
    "Classifier",
    "Coupling",
    "Dequantize",
    "InvertibleConv",
    "Logit",
    "Permutation",
    "Split",
    "Squeeze",
]
