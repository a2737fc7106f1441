"""The VampPrior: the mean of the posteriors of learned inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from musigma.distributions.latents import PRIORS, Latents
from musigma.distributions.mixture import Mixture

__all__ = ["VampPrior"]


class VampPrior(nn.Module):
    r"""The mean of the posteriors of K learned inputs, as the head of a prior.

    .. math:: p(z) = \frac 1K \sum_k q(z | u_k)

    The encoder is that of the VAE. It is not a part of this module, so it is stored once, and
    every term counts once. The inputs begin at examples of the training data. A pass encodes all
    of them. (Tomczak & Welling, "VAE with a VampPrior", 2018, arXiv:1705.07120.)

    Args:
        encoder: The head of the posterior q, with reparameterized draws or not.
        shape: The shape of the encoder's input.
        components: K.

    Example:
        >>> from musigma.gaussian import GaussianHead
        >>> encoder = GaussianHead(nn.Linear(5, 4), event_ndims=1)
        >>> VampPrior(encoder, (5,), 10)().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    zeros: Tensor

    def __init__(self, encoder: nn.Module, shape: tuple[int, ...], components: int):
        super().__init__()
        self._encoder = [encoder]  # a list, so that it is not a submodule
        self.inputs = nn.Parameter(torch.randn(components, *shape))
        self.register_buffer("zeros", torch.zeros(components), persistent=False)

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> Mixture:
        """The distribution, of batch shape ()."""
        return Mixture(self.zeros, self._encoder[0](self.inputs))

    @torch.no_grad()
    def calibrate_on_data(self, x: Tensor) -> None:
        """Put the inputs on examples, with a little noise if there are fewer examples."""
        k = len(self.inputs)
        rows = torch.randperm(len(x)).repeat(-(-k // len(x)))[:k]
        spread = 0.0 if k <= len(x) else 0.01
        self.inputs.copy_(x[rows] + spread * torch.randn_like(self.inputs))

    def extra_repr(self) -> str:
        """Names the number of inputs."""
        return f"components={len(self.inputs)}"


@PRIORS.register
def vamp(latents: Latents, *, components: int = 500) -> VampPrior:
    """The VampPrior.

    Raises:
        ValueError: With a context, on which the posteriors of the inputs would depend; or if a
            flow takes many passes to score what it did not draw.
    """
    layers = [*getattr(getattr(latents.encoder, "flow", None), "layers", ())]
    if slow := next((how for layer in layers if (how := layer.slow_forward)), None):
        raise ValueError(
            f"prior: 'vamp' scores z under the posterior of every learned input, and this one "
            f"takes {slow}; use a posterior that scores in one pass, such as 'nsf', or a flow as "
            "the prior"
        )
    if latents.context:
        raise ValueError(
            "prior: 'vamp' takes no context, since its components are posteriors, which do; use "
            "'conditional', or a flow"
        )
    return VampPrior(latents.encoder, latents.data, components)
