"""Monotone maps of one element, each driven by the numbers that a network emits for that element.

A coupling, an autoregressive layer and an elementwise layer all apply a map: they differ only in
where its parameters come from. A new map is one file with one class that follows the protocol
`Map`, and serves all three layers, in both directions.
"""

from musigma.layers.maps.affine import Additive, Affine
from musigma.layers.maps.base import Map
from musigma.layers.maps.spline import Spline

__all__ = ["Additive", "Affine", "Map", "Spline"]
