"""Terms for reconstructions: an adversarial critic, features of a network, equivariance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.named import Registry
from musigma.nets import MLP
from musigma.objectives.base import register
from musigma.objectives.bounds import elbo
from musigma.objectives.parts import Observation, latent, observation
from musigma.trace import Recorder

__all__ = ["FEATURES", "Adversarial", "Perceptual", "equivariance", "features"]

Features = Callable[[Tensor], Tensor | Sequence[Tensor]]

FEATURES = Registry("features", "")
"""Functions that make a feature network for `Perceptual`, by name."""


def features(function: Callable[..., Features]) -> Callable[..., Features]:
    """Register a function, without arguments, that makes a feature network for `Perceptual`."""
    return FEATURES.register(function)


def _scaled(record: Recorder, found: Observation) -> tuple[Tensor, Tensor]:
    """Data and reconstruction, with levels as numbers from -1 to 1."""
    levels = None if record.model.spec is None else record.model.spec.levels
    if not isinstance(levels, int) or not _is_discrete(record.ps[found.site]):
        return found.x, found.mean
    return 2 * found.x / (levels - 1) - 1, 2 * found.mean / (levels - 1) - 1


def _is_discrete(dist: Any) -> bool:
    return dist.support is not None and dist.support.is_discrete


class Adversarial(nn.Module):
    """-ELBO + weight · softplus(-critic(reconstruction)). Nats, (B,).

    The critic separates data from reconstructions, the means of p(x | z) (Larsen et al.,
    "Autoencoding beyond pixels using a learned similarity metric", 2016, arXiv:1512.09300), by the
    loss of a classifier; the model gets the non-saturating loss (Goodfellow et al., 2014). For
    images the critic is convolutional, and its logit is the mean over patches (Isola et al., 2017,
    arXiv:1611.07004); for vectors it is a perceptron.

    Args:
        record: A pass of a model with a likelihood, for the shape of its data.
        weight: Weight of the term.
        start: Share of the training budget before which the weight is zero. The critic learns from
            the beginning.
        width: Width of the critic: channels of its first layer for images.
        lr: Learning rate of the critic.
    """

    def __init__(
        self,
        record: Recorder,
        *,
        weight: float = 1.0,
        start: float = 0.0,
        width: int = 32,
        lr: float = 1e-4,
    ):
        super().__init__()
        self.weight, self.start, self.lr = weight, start, lr
        x = observation(record, "adversarial").x
        self.critic: nn.Module = (
            MLP(x[0].numel(), 1, hidden=[width] * 2)
            if x.ndim == 2
            else _patches(x.shape[1], width)
        )

    def forward(self, record: Recorder) -> Tensor:
        """The objective."""
        if record.share < self.start:
            return elbo(record)
        _, mean = _scaled(record, observation(record, "adversarial"))
        return elbo(record) + self.weight * F.softplus(-self.logits(mean))

    def logits(self, x: Tensor) -> Tensor:
        """The critic's logits that x are data, (B,)."""
        return self.critic(x).flatten(1).mean(1)

    def critic_loss(self, record: Recorder) -> Tensor:
        """The critic's loss, (B,), by reconstructions without gradients."""
        x, mean = (t.detach() for t in _scaled(record, observation(record, "adversarial")))
        return 0.5 * (F.softplus(-self.logits(x)) + F.softplus(self.logits(mean)))

    def critic_optimizer(self) -> torch.optim.Optimizer:
        """Adam, with decay rates that are usual for critics."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.5, 0.9))


def _patches(channels: int, width: int) -> nn.Module:
    """A convolutional critic of patches, for images of any size."""
    sizes = (channels, width, 2 * width)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(2 * width, 1, 3, padding=1))


register(Adversarial, "adversarial")


class Perceptual(nn.Module):
    r"""-ELBO + weight · the distance of features of data and reconstructions. Nats, (B,).

    .. math:: \sum_l \frac{1}{P_l} \sum_p \| \hat f_l(x)_p - \hat f_l(\bar x)_p \|^2

    for the feature maps f_l of a network that does not learn, each normalized over its channels at
    every position p, as by Zhang et al. ("The Unreasonable Effectiveness of Deep Features as a
    Perceptual Metric", 2018, arXiv:1801.03924) with equal weights of channels. The reconstruction
    is the mean of p(x | z).

    Args:
        record: A pass of a model with a likelihood.
        features: The network: it maps data (B, C, H, W), levels as numbers from -1 to 1, to one or
            several tensors (B, C', ...). In a text, the name of a function that makes one, which
            is registered by `musigma.objectives.features`, or FILE.py:NAME on the command line.
            Nothing is downloaded.
        weight: Weight of the term.

    Raises:
        ValueError: If no features are given, or none are registered under the name.
    """

    def __init__(self, record: Recorder, *, features: Any = "", weight: float = 1.0):
        super().__init__()
        if features == "" or features is None:
            raise ValueError(
                "features: perceptual needs a feature network; give features=FILE.py:NAME, a "
                "function that makes one, or a module"
            )
        network = FEATURES.choice(features)() if isinstance(features, str) else features
        if isinstance(network, nn.Module):
            network = network.eval().requires_grad_(False)
        self.__dict__["network"] = network  # no part of the run's state
        self.weight = weight
        self(record)

    def forward(self, record: Recorder) -> Tensor:
        """The objective."""
        x, mean = _scaled(record, observation(record, "perceptual"))
        if isinstance(self.network, nn.Module):
            self.network.to(x.device)
        pairs = zip(self._features(x), self._features(mean), strict=True)
        distance = sum((self._distance(a, b) for a, b in pairs), x.new_zeros(len(x)))
        return elbo(record) + self.weight * distance

    def _features(self, x: Tensor) -> list[Tensor]:
        found: Any = self.network(x)  # pyright: ignore[reportCallIssue]
        return [found] if isinstance(found, Tensor) else list(found)

    @staticmethod
    def _distance(a: Tensor, b: Tensor) -> Tensor:
        squared = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
        return squared.reshape(len(a), -1).mean(1)


register(Perceptual, "perceptual")


def equivariance(
    record: Recorder, *, weight: float = 1.0, smallest: float = 0.25, rate: float = 1.0
) -> Tensor:
    r"""-ELBO - weight · log p(τ x | τ z), for a random rotation and scaling τ. Nats, (B,).

    The decoder learns to map transformed latents to transformed images, so latents keep the
    structure of images. τ turns by a multiple of 90 degrees, and scales the sides of latents and
    images by one factor from `smallest` to 1, drawn for each pass. The term is scaled to as many
    pixels as x has; levels, if the likelihood is of levels, are rounded after scaling. (Kouzelis
    et al., "EQ-VAE", 2025, arXiv:2502.09509; there the term replaces the reconstruction of half of
    the batches.) One more pass through the decoder per step.

    Args:
        record: A pass of a model with one latent (B, C, h, w).
        weight: Weight of the term.
        smallest: Smallest factor of scale; 1: rotations only.
        rate: Share of passes in which the term is used.

    Raises:
        ValueError: If the latent has no height and width.
    """
    found = latent(record, "equivariance")
    z = found.z
    seen = observation(record, "equivariance")  # after dequantization
    decoder = getattr(seen.site, "decoder", None)
    if z.ndim != 4 or not isinstance(decoder, nn.Module):
        raise ValueError(
            "objective: equivariance is for latents with height and width (B, C, h, w), such as "
            f"those of autoencoder_kl; got {tuple(z.shape)}"
        )
    nats = elbo(record)
    if torch.rand(()) >= rate:
        return nats
    turns, height = int(torch.randint(4, ())), z.shape[2]
    smaller = int(torch.randint(max(1, math.ceil(smallest * height)), height + 1, ()))
    x = _moved(seen.x, turns, smaller / height, z.shape[2:])
    x = x.round() if _is_discrete(record.ps[seen.site]) else x
    moved = _moved(z, turns, smaller / height, z.shape[2:])
    with record.autocast():
        again = conditioned(decoder, moved, record.model.given(record.context)[1])
    ratio = seen.x[0].numel() / x[0].numel()
    return nats - weight * ratio * again.log_prob(x)


def _moved(maps: Tensor, turns: int, factor: float, grid: Sequence[int]) -> Tensor:
    """Maps (B, C, H, W), scaled and turned; H and W are multiples of those of `grid`."""
    if factor < 1:
        sides = zip(maps.shape[2:], grid, strict=True)
        size = [max(1, round(factor * cells)) * (side // cells) for side, cells in sides]
        maps = F.interpolate(maps, size, mode="bilinear", antialias=True)
    return maps.rot90(turns, (2, 3))


register(equivariance)
