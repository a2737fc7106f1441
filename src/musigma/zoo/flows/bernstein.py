"""Bernstein polynomial flows of vectors."""

from __future__ import annotations

from musigma.layers import Bernstein
from musigma.zoo.parts import map_flow


@map_flow(zero=True)
def bernstein(
    *,
    degree: int = 16,
    bound: float = 5.0,
) -> Bernstein:
    """Bernstein polynomial flow (Ramasinghe, Fernando, Khan, Barnes, 2021, arXiv:2102.03509).

    An increasing polynomial of each feature, whose coefficients depend on other features, is
    continued by straight lines outside [-bound, bound]. Sampling is by root finding.

    Args:
        degree: Degree of the polynomials.
        bound: Polynomials act on [-bound, bound].
    """
    return Bernstein(degree=degree, bound=bound)
