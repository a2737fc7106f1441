"""Monotone maps of single elements, which couplings and autoregressive layers share."""

from musigma.layers.maps.element import ElementMap
from musigma.layers.maps.spline import Spline

__all__ = ["ElementMap", "Spline"]
