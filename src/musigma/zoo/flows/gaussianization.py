"""Gaussianization flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator

from musigma.layers import Elementwise, MixtureGaussianCDF, Rotation
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import vector_flow


@vector_flow
def gaussianization(
    features: int,
    context: int,
    *,
    depth: int = 8,
    components: int = 16,
) -> Iterator[Layer]:
    """Gaussianization flow (Meng, Song, Song, Ermon, 2020, arXiv:2003.01941).

    Layers that make every feature about normal, by the distribution function of a mixture of
    Gaussians, alternate with rotations. The mixtures are fitted to quantiles of the first batch,
    layer by layer, so that training begins near the data. A context shifts the parameters of the
    mixtures. Sampling is by root finding.

    Args:
        depth: Number of layers of mixtures.
        components: Number of components of each mixture.
    """
    at_least(1, depth=depth, components=components)
    for i in range(depth):
        if i:
            yield Rotation(features)
        yield Elementwise(features, map=MixtureGaussianCDF(components), context=context)
