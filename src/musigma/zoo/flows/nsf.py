"""Neural spline flow: splines of each feature, given other features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from musigma.layers import MADE, Autoregressive, Conditioner, Coupling, Spline
from musigma.model import Bijection, Chain
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.maf import vector_flow


@architecture
def nsf(
    shape: Sequence[int],
    *,
    bits: int | None = None,
    kind: Literal["coupling", "autoregressive"] = "coupling",
    depth: int = 5,
    hidden: int = 128,
    hidden_layers: int = 2,
    bins: int = 8,
    bound: float = 5.0,
    permutation: Literal["reverse", "lu", "conv", "shuffle"] = "lu",
    norm: bool = True,
    standardize: bool = False,
    alpha: float = 1e-5,
    context: int = 0,
) -> Chain:
    """Neural spline flow (Durkan, Bekasov, Murray, Papamakarios, 2019, arXiv:1906.04032).

    Args:
        shape: (D,); D of at least 2 for couplings.
        bits: Bits of each element; None for continuous data.
        kind: `coupling`: one half of the features transforms the other; both directions cost one
            pass. `autoregressive`: all previous features transform each one; sampling takes one
            step per feature.
        depth: Number of transforms.
        hidden: Width of each hidden layer of the networks.
        hidden_layers: Number of hidden layers.
        bins: Number of bins of each spline.
        bound: Splines act on [-bound, bound]; outside they are the identity.
        permutation: Reordering of the features before each transform: an invertible matrix (by
            its LU factors, or plain), a fixed shuffle, or a reversal.
        norm: Put an activation normalization before each transform.
        standardize: Standardize continuous data in the first layer, by the mean and standard
            deviation of the training data; the log-determinant counts.
        alpha: Margin of the logit that maps [0, 1] to the real line, for data with bits.
        context: Number of features of the context; it conditions the transforms.
    """
    at_least(1, depth=depth, hidden=hidden)
    at_least(0, hidden_layers=hidden_layers)
    spline, widths = Spline(bins=bins, bound=bound), [hidden] * hidden_layers

    def coupling(features: int) -> Bijection:
        if features < 2:
            raise ValueError(
                "shape: a coupling needs vectors of at least 2 elements; got 1 "
                "(kind autoregressive takes it)"
            )
        half = features // 2
        outputs = spline.outputs * (features - half)
        net = Conditioner(half, outputs, hidden=widths, context=context, zero=True)
        return Coupling(net, map=spline)

    def autoregressive(features: int) -> Bijection:
        net = MADE(spline.owners(features), hidden=widths, context=context, zero=True)
        return Autoregressive(net, map=spline)

    kinds = {"coupling": coupling, "autoregressive": autoregressive}
    if kind not in kinds:
        raise ValueError(f"kind: expected 'coupling' or 'autoregressive'; got {kind!r}")
    return vector_flow(
        "nsf",
        shape,
        kinds[kind],
        bits=bits,
        depth=depth,
        permutation=permutation,
        norm=norm,
        standardize=standardize,
        alpha=alpha,
    )
