"""The layers of a chain: bijections and their maps, and layers that draw."""

from musigma.layers.block import BlockAutoregressive
from musigma.layers.classifier import Classifier
from musigma.layers.draws import Dequantize, Split
from musigma.layers.emerging import AutoregressiveConv
from musigma.layers.fixed import Checkerboard, Circle, Flip, Logit, Permutation, Rescale, Squeeze
from musigma.layers.haar import HaarSqueeze
from musigma.layers.integers import IntegerShift
from musigma.layers.linear import ActNorm, InvertibleConv, Rotation
from musigma.layers.mapped import (
    Autoregressive,
    AutoregressiveNet,
    Coupling,
    Elementwise,
    StreamedNet,
)
from musigma.layers.maps import (
    UMNN,
    Additive,
    Affine,
    Bernstein,
    CircularSpline,
    Composed,
    CubicSpline,
    DeepSigmoid,
    LinearSpline,
    Map,
    MixtureGaussianCDF,
    MixtureLogisticCDF,
    Monotone,
    QuadraticSpline,
    Spline,
    SumOfSquares,
)
from musigma.layers.marginals import Marginals
from musigma.layers.ode import NeuralODE
from musigma.layers.planar import Planar
from musigma.layers.radial import Radial
from musigma.layers.residual import Residual
from musigma.layers.standardize import Standardize, standardizer, standardizers
from musigma.layers.support import Unconstrain
from musigma.layers.surjections import Abs, Augment, MaxPool, Sort, Swapped
from musigma.layers.sylvester import Sylvester
from musigma.nets import MADE, Conditioner

__all__ = [
    "MADE",
    "UMNN",
    "Abs",
    "ActNorm",
    "Additive",
    "Affine",
    "Augment",
    "Autoregressive",
    "AutoregressiveConv",
    "AutoregressiveNet",
    "Bernstein",
    "BlockAutoregressive",
    "Checkerboard",
    "Circle",
    "CircularSpline",
    "Classifier",
    "Composed",
    "Conditioner",
    "Coupling",
    "CubicSpline",
    "DeepSigmoid",
    "Dequantize",
    "Elementwise",
    "Flip",
    "HaarSqueeze",
    "IntegerShift",
    "InvertibleConv",
    "LinearSpline",
    "Logit",
    "Map",
    "Marginals",
    "MaxPool",
    "MixtureGaussianCDF",
    "MixtureLogisticCDF",
    "Monotone",
    "NeuralODE",
    "Permutation",
    "Planar",
    "QuadraticSpline",
    "Radial",
    "Rescale",
    "Residual",
    "Rotation",
    "Sort",
    "Spline",
    "Split",
    "Squeeze",
    "Standardize",
    "StreamedNet",
    "SumOfSquares",
    "Swapped",
    "Sylvester",
    "Unconstrain",
    "standardizer",
    "standardizers",
]
