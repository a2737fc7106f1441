"""The layers of a chain: bijections and their maps, and layers that draw."""

from musigma.layers.autoregressive import Autoregressive, AutoregressiveNet
from musigma.layers.classifier import Classifier
from musigma.layers.coupling import Coupling
from musigma.layers.elementwise import Elementwise, Logit, Rescale
from musigma.layers.linear import ActNorm, InvertibleConv, Permutation
from musigma.layers.maps import Additive, Affine, Map, Spline
from musigma.layers.quantize import Dequantize
from musigma.layers.reshape import Checkerboard, Squeeze
from musigma.layers.split import Split
from musigma.layers.standardize import Standardize, standardizer
from musigma.nets.made import MADE, Conditioner

__all__ = [
    "MADE",
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "AutoregressiveNet",
    "Checkerboard",
    "Classifier",
    "Conditioner",
    "Coupling",
    "Dequantize",
    "Elementwise",
    "InvertibleConv",
    "Logit",
    "Map",
    "Permutation",
    "Rescale",
    "Spline",
    "Split",
    "Squeeze",
    "Standardize",
    "standardizer",
]
