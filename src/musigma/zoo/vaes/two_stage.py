"""The two-stage VAE: a second VAE of the latents of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import conditioned
from musigma.distributions import StandardNormal
from musigma.gaussian import GaussianHead
from musigma.model import VAE, Chain, Model, Prior
from musigma.nets import MLP
from musigma.trace import Trace
from musigma.zoo import architecture, at_least
from musigma.zoo.vaes.vae import vae


@architecture
def two_stage(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    net: Literal["auto", "mlp", "conv"] = "auto",
    latents: int = 32,
    width: int | None = None,
    blocks: int = 1,
    second_width: int = 256,
    second_blocks: int = 2,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "channel",
    standardize: Literal["quantile"] | bool = False,
    context: int = 0,
) -> Model:
    """The two-stage VAE (Dai & Wipf, 2019, arXiv:1903.05789).

    The second VAE is a prior whose samples are where the first has its latents. See
    `TwoStageVAE`.

    Args:
        shape: (C, H, W) of any size, or (D,).
        bits: Bits of each element; None for continuous data.
        net: As in `vae`, and so are the next three.
        latents: Dimensions of z, and of the latents of the second stage.
        width: Width of the networks of the first stage.
        blocks: Hidden layers, or residual blocks at each size, of the first stage.
        second_width: Width of the hidden layers of the second stage.
        second_blocks: Number of hidden layers of the second stage.
        likelihood: As in `vae`.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood, as in `vae`; the paper learns one.
        standardize: As in `vae`.
        context: Number of features of the context; it conditions all networks.
    """
    at_least(1, latents=latents, second_width=second_width)
    at_least(0, second_blocks=second_blocks)
    first = vae(
        shape,
        bits=bits,
        net=net,
        latents=latents,
        width=width,
        blocks=blocks,
        prior="normal",
        likelihood=likelihood,
        components=components,
        std=std,
        standardize=standardize,
        context=context,
    )
    how: Any = {"hidden": [second_width] * second_blocks, "context": context}
    second = VAE(
        GaussianHead(MLP(latents, 2 * latents, **how), event_ndims=1),
        GaussianHead(MLP(latents, latents, **how), event_ndims=1, log_std=torch.zeros(latents)),
        Prior(StandardNormal((latents,))),
    )
    return recomposed(first, lambda m: TwoStageVAE(m.encoder, m.decoder, second, latents))


def recomposed(model: Model, change: Callable[[VAE], Model]) -> Model:
    """A model with another in place of its VAE, below the same layers of the data."""
    if isinstance(model, Chain):
        return Chain(model.layers, recomposed(model.prior, change))
    assert isinstance(model, VAE)
    return change(model)


class TwoStageVAE(VAE):
    r"""A VAE whose prior is a model of z that is trained on z, and does not train the encoder.

    Training minimizes the sum of both stages' losses, which share no parameters:

    .. math:: -E_q[\log p(x|z)] + KL(q(z|x) \| N(0, I)) \quad - \log w_2(z), \ z \sim q \text{
        held constant}

    The first is the evidence of training, and the second is `Evidence.auxiliary`. Elsewhere log w
    has the second stage as prior: log p(x | z) + log w_2(z) - log q(z | x), a bound of log p(x).
    (Dai & Wipf, "Diagnosing and Enhancing VAE Models", 2019, arXiv:1903.05789, where the second
    stage is trained afterwards.)

    Args:
        encoder: A head of z.
        decoder: A head of x.
        prior: The second stage, a model of z.
        latents: Dimensions of z.
        penalty: A function of z and p(x | z) to nats (B,) that training adds.
    """

    first: Any

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Model,
        latents: int,
        penalty: Callable[[Tensor, Distribution], Tensor] | None = None,
    ):
        super().__init__(encoder, decoder, prior)
        self.first, self.penalty = Prior(StandardNormal((latents,))), penalty

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Both stages apart while training, and the whole model otherwise."""
        if not self.training:
            super().infer(x, trace, context)
            return
        q, p = conditioned(self.encoder, x, context), self.first.head(context)
        z = trace.latent(self.first, q, p)
        likelihood = conditioned(self.decoder, z, context)
        trace.p(self, likelihood, x)
        if self.penalty is not None and torch.is_grad_enabled():
            trace.auxiliary(self.decoder, -self.penalty(z, likelihood))
        second = self.prior(z.detach(), context, closed_form=trace.closed_form)
        trace.auxiliary(self.prior, second.elbo + second.auxiliary)

    def variables(self) -> Iterator[nn.Module]:
        """Those of the stage that is trained, or of the whole model."""
        yield from self.latents()
        yield self

    def latents(self) -> Iterator[nn.Module]:
        """z of the first stage while training, and the latents of both stages otherwise."""
        return iter([self.first]) if self.training else self.prior.variables()
