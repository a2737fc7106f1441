"""Increasing maps of one element, whose parameters a network emits for that element.

Coupling, autoregressive and elementwise layers all apply a map; they differ in the source of its
parameters. A new map is one class that implements `Map`; it works in all three layers, in both
directions. If its inverse has no closed form, it inherits from `Monotone`.
"""

from musigma.layers.maps.additive import Additive
from musigma.layers.maps.affine import Affine
from musigma.layers.maps.bernstein import Bernstein
from musigma.layers.maps.composed import Composed
from musigma.layers.maps.cubic_spline import CubicSpline
from musigma.layers.maps.deep_sigmoid import DeepSigmoid
from musigma.layers.maps.linear_spline import LinearSpline
from musigma.layers.maps.map import Map, Monotone
from musigma.layers.maps.mixture import MixtureGaussianCDF, MixtureLogisticCDF
from musigma.layers.maps.quadratic_spline import QuadraticSpline
from musigma.layers.maps.spline import CircularSpline, Spline
from musigma.layers.maps.sum_of_squares import SumOfSquares
from musigma.layers.maps.umnn import UMNN

__all__ = [
    "UMNN",
    "Additive",
    "Affine",
    "Bernstein",
    "CircularSpline",
    "Composed",
    "CubicSpline",
    "DeepSigmoid",
    "LinearSpline",
    "Map",
    "MixtureGaussianCDF",
    "MixtureLogisticCDF",
    "Monotone",
    "QuadraticSpline",
    "Spline",
    "SumOfSquares",
]
