"""Sum-of-squares polynomial flows of vectors."""

from __future__ import annotations

from musigma.layers import SumOfSquares
from musigma.zoo.parts import map_flow


@map_flow(zero=False)
def sos(
    *,
    polynomials: int = 3,
    degree: int = 4,
    scale: float = 5.0,
) -> SumOfSquares:
    """Sum-of-squares polynomial flow (Jaini, Selby, Yu, 2019, arXiv:1905.02325).

    Each feature passes an increasing polynomial, the integral of a mean of squared polynomials,
    whose coefficients depend on other features. It grows fast, so densities fall fast far outside
    the data, and data should be standardized. Sampling is by root finding.

    Args:
        polynomials: Number of polynomials that are squared.
        degree: Degree of these; the transforms have twice this degree and one.
        scale: The unit of the features within the polynomials.
    """
    return SumOfSquares(polynomials=polynomials, degree=degree, scale=scale)
