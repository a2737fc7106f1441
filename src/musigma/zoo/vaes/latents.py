"""Posteriors and priors of VAEs, as options name them; every flow of vectors is one of either."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from musigma.context import pooled
from musigma.distributions import POSTERIORS, PRIORS, FlowHead, Latents, StandardNormal
from musigma.gaussian import Format, GaussianHead
from musigma.layers import ActNorm, Affine, Coupling, InvertibleConv
from musigma.model import Bijection, Chain, Inverse, Model, Prior
from musigma.named import Registry, is_built_in
from musigma.nets import MLP
from musigma.zoo.parts import FLOWS

__all__ = ["chosen_posterior", "chosen_prior"]

FEATURES = 64
"""Number of features of x that condition the layers of a flow posterior."""


def chosen_posterior(
    text: str, size: int, net: Callable[[int], nn.Module], format: Format
) -> nn.Module:
    """The head of q(z | x): a posterior of `POSTERIORS`, or a flow of vectors given features of x.

    The base of a flow is a Gaussian that is emitted from the features. If the layers are slow in
    the direction of draws only, they are inverted: `maf` is then an inverse autoregressive flow
    (Kingma et al., 2016, arXiv:1606.04934).

    Raises:
        ValueError: If there is no such posterior, or it has no such option.
    """
    if not _is_flow(text, POSTERIORS):
        return POSTERIORS.choice(text)(size, net, format)
    layers = _bijections("posterior", text, size, FEATURES)
    if any(layer.slow_inverse for layer in layers):
        layers = [Inverse(layer) for layer in reversed(layers)]
    base = GaussianHead(nn.Linear(FEATURES, 2 * size), event_ndims=1, format=format)
    return FlowHead(net(FEATURES), Chain(layers, Prior(base)), (size,))


def chosen_prior(text: str, latents: Latents) -> Model:
    """The prior: one of `PRIORS`, or a flow of vectors; `auto` is that of the posterior.

    Raises:
        ValueError: If there is no such prior, it has no such option, or it does not fit.
    """
    name = text.partition(" ")[0]
    own = name in PRIORS and not is_built_in(PRIORS[name])
    if latents.depth != Latents.depth and name != "flow" and not own:
        raise ValueError(
            f"prior_depth: it is that of the prior 'flow'; got {latents.depth} with the prior "
            f"{name!r} (the depth of another flow follows its name: 'maf depth=3')"
        )
    if text == "auto" and latents.own_prior is not None:
        return Prior(latents.own_prior())
    if text == "auto":
        text = "conditional" if latents.context else "normal"
    if _is_flow(text, PRIORS):
        size = latents.vector(name)
        layers = _bijections("prior", text, size, latents.context)
        return Chain(layers, Prior(StandardNormal((size,))))
    prior = PRIORS.choice(text)(latents)
    return prior if isinstance(prior, Model) else Prior(prior)


def _is_flow(text: str, registry: Registry) -> bool:
    name = text.partition(" ")[0]
    return name in FLOWS and name not in registry


def _bijections(option: str, text: str, size: int, context: int) -> list[Bijection]:
    """The layers of a flow.

    Raises:
        ValueError: If one of them is no bijection.
    """
    choice = FLOWS.choice(text)
    layers = list(choice(size, context))
    if other := next((layer for layer in layers if not isinstance(layer, Bijection)), None):
        raise ValueError(
            f"{option}: {choice.name!r} draws or loses something in its {type(other).__name__}, "
            "so it has no exact density; use a flow of bijections, such as 'nsf'"
        )
    return layers


class _ContextNet(nn.Module):
    """An MLP of the context (B, F), or of the mean over the positions of a map (B, F, H, W)."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.net = MLP(features, outputs, hidden=(128,), zero=True)

    def forward(self, context: Tensor) -> Tensor:
        return self.net(pooled(context))


@PRIORS.register
def conditional(latents: Latents) -> GaussianHead:
    """A Gaussian whose mean and scale a network computes from the context."""
    size = latents.vector("conditional")
    if not latents.context:
        raise ValueError("prior: 'conditional' needs a context; use 'normal' or 'flow'")
    return GaussianHead(_ContextNet(latents.context, 2 * size), event_ndims=1)


@PRIORS.register
def flow(latents: Latents) -> Chain:
    """Affine couplings and invertible matrices over N(0, I); `--prior-depth` of them."""
    size, layers = latents.vector("flow"), []
    if size < 2:
        raise ValueError(f"latents: expected 2 or more; got {size}")
    half, widths = size // 2, (128, 128)
    for _ in range(latents.depth):
        net = MLP(half, 2 * (size - half), hidden=widths, context=latents.context, zero=True)
        coupling = Coupling(net, map=Affine(Format(scale="tanh")))
        layers += [ActNorm(size), InvertibleConv(size), coupling]
    return Chain(layers, Prior(StandardNormal((size,))))
