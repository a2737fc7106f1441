"""Neural autoregressive flows of vectors."""

from __future__ import annotations

from musigma.layers import DeepSigmoid
from musigma.zoo.parts import map_flow


@map_flow(zero=True)
def naf(
    *,
    units: int = 8,
    layers: int = 2,
) -> DeepSigmoid:
    """Neural autoregressive flow (Huang, Krueger, Lacoste, Courville, 2018, arXiv:1804.00779).

    Each feature passes a small monotone network of sigmoids (the paper's deep sigmoidal flow),
    whose weights depend on other features. Sampling is by root finding.

    Args:
        units: Number of sigmoids of each layer of the monotone network.
        layers: Number of its layers.
    """
    return DeepSigmoid(units=units, layers=layers)
