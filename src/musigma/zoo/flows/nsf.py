"""Neural spline flows of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from musigma.layers import CubicSpline, LinearSpline, QuadraticSpline, Spline
from musigma.model import Layer
from musigma.zoo import at_least
from musigma.zoo.parts import step, transform, vector_flow

SPLINES = {
    "rational-quadratic": Spline,
    "linear": LinearSpline,
    "quadratic": QuadraticSpline,
    "cubic": CubicSpline,
}


@vector_flow
def nsf(
    features: int,
    context: int,
    *,
    kind: Literal["coupling", "autoregressive"] = "coupling",
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    bins: int = 8,
    bound: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "lu",
    norm: bool = True,
    spline: Literal["rational-quadratic", "linear", "quadratic", "cubic"] = "rational-quadratic",
) -> Iterator[Layer]:
    """Neural spline flow (Durkan, Bekasov, Murray, Papamakarios, 2019, arXiv:1906.04032).

    Args:
        kind: `coupling`: one half of the features, and the context, transforms the other; both
            directions cost one pass. `autoregressive`: all previous features transform each one;
            sampling takes one step per feature.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        bins: Number of bins of each spline.
        bound: Splines act on [-bound, bound]; outside they are the identity.
        permutation: Reordering of the features before each transform: a fixed shuffle, a
            reversal, or an invertible matrix (by its LU factors, or plain), which begins as a
            shuffle.
        norm: Put an activation normalization before each transform.
        spline: `rational-quadratic`; `linear` or `quadratic` (Müller et al., 2019,
            arXiv:1808.03856); or `cubic` (Durkan et al., 2019, arXiv:1906.02145), which is
            inverted by root finding.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    if spline not in SPLINES:
        raise ValueError(f"spline: expected {' or '.join(SPLINES)}; got {spline!r}")
    map, widths = SPLINES[spline](bins=bins, bound=bound), [hidden] * hidden_layers
    for _ in range(depth):
        yield from step(features, norm, permutation)
        yield transform(map, kind, features, context, widths)
