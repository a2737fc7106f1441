"""Neural spline flows of angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from musigma.distributions import StandardUniform
from musigma.layers import Circle, CircularSpline, Conditioner, Coupling, Permutation, Rescale
from musigma.model import Chain, Layer, Prior
from musigma.nets import Periodic
from musigma.zoo import architecture, at_least


@architecture
def ncsf(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    depth: int = 6,
    hidden: int = 128,
    hidden_layers: int = 2,
    bins: int = 8,
    period: float = 2 * math.pi,
    low: float = -math.pi,
    context: int = 0,
) -> Chain:
    """Neural circular spline flow of angles (Rezende et al., 2020, arXiv:2002.02428).

    Each feature is a point of a circle: numbers that differ by a period are the same, and have the
    same density. Couplings map one half of the features by splines of the circle, given the
    cosines and sines of the other half. The density is continuous on the torus, its latents are
    uniform, and both directions take one pass.

    Args:
        shape: (D,).
        bits: None: angles are continuous.
        depth: Number of couplings.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        bins: Number of bins of each spline.
        period: The circumference, in the units of the data: 360 for degrees, 24 for hours.
        low: The least angle; draws lie in [low, low + period).
        context: Number of features of the context; it conditions the couplings.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    if len(shape) != 1 or bits is not None:
        kind = f"shape {tuple(shape)}" if len(shape) != 1 else f"{bits}-bit levels"
        raise ValueError(f"shape: ncsf is for vectors of continuous angles (D,); got {kind}")
    (d,), spline = shape, CircularSpline(bins=bins, period=1.0)
    half = d // 2
    layers: list[Layer] = [Circle(period, low), Rescale(1 / period), Circle(1.0)]
    for i in range(depth):
        if i:
            layers.append(Permutation.reverse(d))
        outputs, widths = spline.outputs * (d - half), [hidden] * hidden_layers
        net = Conditioner(2 * half, outputs, hidden=widths, context=context, zero=True)
        layers.append(Coupling(Periodic(net, 1.0), map=spline))
    return Chain([*layers, Circle(1.0)], Prior(StandardUniform((d,))))
