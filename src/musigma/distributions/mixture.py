"""Mixtures: of Gaussians, as posteriors and as priors, and of any distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.distributions.latents import POSTERIORS, PRIORS, Latents, PosteriorHead
from musigma.gaussian import DiagonalGaussian, EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, gumbel_like, per_example
from musigma.trace import center_of, with_gradient

__all__ = ["GaussianMixture", "Mixture"]


class Mixture(EventDistribution):
    r"""One of K distributions, chosen at random: :math:`p(z) = \sum_k \pi_k\, p_k(z)`.

    At temperature T the logarithms of the probabilities are divided by T, and the chosen component
    is drawn at T: at 0 a draw is the center of the most probable component.

    Args:
        logits: Log probabilities of the components up to a constant, shape (\*batch, K).
        components: A distribution with batch shape (\*batch, K).
        gradient: How draws carry a gradient. `implicit`: for Gaussians, the gradient of the draw
            by the derivative of the conditional distribution functions, unbiased and exact for
            the given draw (Figurnov, Mohamed, Mnih, "Implicit Reparameterization Gradients", 2018,
            arXiv:1805.08498). `score`: see `musigma.trace.with_gradient`. None: no gradient.

    Raises:
        ValueError: If `implicit` is asked of components other than `DiagonalGaussian` vectors.

    Example:
        >>> means = torch.tensor([[-2.0], [2.0]])
        >>> p = Mixture(torch.zeros(2), DiagonalGaussian(means, torch.zeros(2, 1), 1))
        >>> p.log_prob(torch.tensor([[-2.0], [2.0]]))
        tensor([-1.6118, -1.6118])
    """

    def __init__(
        self,
        logits: Tensor,
        components: Any,
        *,
        gradient: Literal["implicit", "score"] | None = None,
    ):
        self.log_weights = at_least_float32(logits).log_softmax(-1)
        self.components = components
        self.has_rsample = gradient == "implicit"
        vectors = isinstance(components, DiagonalGaussian) and len(components.event_shape) == 1
        if self.has_rsample and not vectors:
            raise ValueError(
                "gradient: 'implicit' is for components that are DiagonalGaussian vectors; got "
                f"{type(components).__name__}; use 'score'"
            )
        if gradient == "score":
            with_gradient(self, gradient)
        super().__init__(logits.shape[:-1], components.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """That of the components."""
        return self.components.support

    @property
    def mean(self) -> Tensor:
        """The mean."""
        weights = self._over_events(self.log_weights.exp())
        return (weights * self.components.mean).sum(-1 - len(self.event_shape))

    @property
    def center(self) -> Tensor:
        """The center of the most probable component."""
        return self._chosen(center_of(self.components), self.log_weights.argmax(-1))

    def _over_events(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape, *(1,) * len(self.event_shape))

    def _chosen(self, values: Tensor, index: Tensor) -> Tensor:
        """One of K values, (..., K, *event), for an index (...)."""
        at = self._over_events(index[..., None]).expand(*index.shape, 1, *self.event_shape)
        values = values.expand(*index.shape, *values.shape[-1 - len(self.event_shape) :])
        return values.gather(index.ndim, at).squeeze(index.ndim)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw a component, and a value from it."""
        with torch.no_grad():
            return self._drawn(sample_shape, temperature)

    def _drawn(self, sample_shape: Shape, temperature: float | Tensor) -> Tensor:
        logits = self.log_weights.expand(*sample_shape, *self.log_weights.shape)
        index = (logits + per_example(temperature, logits) * gumbel_like(logits)).argmax(-1)
        if isinstance(self.components, DiagonalGaussian):  # draw from the chosen one only
            g = self.components
            mean, log_std = (self._chosen(t, index) for t in (g.mean, g.log_std))
            return DiagonalGaussian(mean, log_std, g.event_ndims).rsample(temperature=temperature)
        hot = isinstance(temperature, float) and temperature == 1.0
        how = {} if hot else {"temperature": temperature}
        return self._chosen(self.components.sample(torch.Size(sample_shape), **how), index)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        value = value.unsqueeze(value.ndim - len(self.event_shape))
        return (self.log_weights + self.components.log_prob(value)).logsumexp(-1)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw with the implicit gradient.

        With the conditional distribution functions S_i(z_i | z_1 .. z_i-1), S(z) is uniform, and
        z moves with the parameters such that S does not: dz = -(∂S/∂z)^-1 ∂S.
        """
        z = self._drawn(sample_shape, temperature)
        if not torch.is_grad_enabled():
            return z
        uniform, slopes = self._conditional_distribution(z)
        moved = torch.linalg.solve_triangular(
            slopes.detach(), (uniform - uniform.detach())[..., None], upper=False
        )
        return z - moved[..., 0]  # the derivative of z itself, by its component, cancels

    def _conditional_distribution(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """S(z), (..., D), and its Jacobian in z, lower triangular, (..., D, D)."""
        g, z = self.components, z[..., None, :]
        noise = g.whiten(z)
        each = DiagonalGaussian(g.mean, g.log_std, 0).log_prob(z)  # (..., K, D)
        before = self.log_weights[..., None] + each.cumsum(-1) - each
        weights = before.softmax(-2)  # of the components, given the previous coordinates
        below = torch.special.ndtr(noise)
        slope = -noise * (-g.log_std).exp()  # of log p_k in z
        weighted = weights * below
        cross = torch.einsum("...kd,...ke->...de", weighted, slope)
        mean_slope = torch.einsum("...kd,...ke->...de", weights, slope)
        jacobian = (cross - weighted.sum(-2)[..., None] * mean_slope).tril(-1)
        density = (weights * each.exp()).sum(-2)
        return weighted.sum(-2), jacobian + density.diag_embed()

    def expand(self, batch_shape: Shape, _instance=None) -> Mixture:
        """The same distribution with another batch shape."""
        k = self.log_weights.shape[-1]
        return Mixture(
            self.log_weights.expand(*batch_shape, k), self.components.expand((*batch_shape, k))
        )


class GaussianMixture(nn.Module):
    """A mixture of Gaussians with learned weights, means and scales, as the head of a prior.

    Args:
        size: Number of dimensions.
        components: Number of components.
        bounds: Bounds of log_std, as in a `Format`.

    Example:
        >>> GaussianMixture(3, 5)().event_shape
        torch.Size([3])
    """

    def __init__(self, size: int, components: int, *, bounds: tuple[float, float] = (-6.0, 6.0)):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, size))
        self.log_std = nn.Parameter(torch.zeros(components, size))
        self.bounds = bounds

    def forward(self, given: Tensor | None = None, context: Tensor | None = None) -> Mixture:
        """The distribution, of batch shape ()."""
        log_std = self.log_std.clamp(*self.bounds)
        return Mixture(self.logits, DiagonalGaussian(self.means, log_std, 1))

    @torch.no_grad()
    def calibrate(self, z: Tensor) -> None:
        """Put the means on latents drawn from the posteriors of data, (N, D)."""
        k = len(self.means)
        self.means.copy_(z[torch.randperm(len(z)).repeat(-(-k // len(z)))[:k]])

    @torch.no_grad()
    def fit(self, z: Tensor, *, steps: int = 200, tolerance: float = 1e-5) -> None:
        """Fit the mixture to latents (N, D) by expectation-maximization, from `calibrate`.

        It ends when the mean log density rises by less than `tolerance` nats in a step.
        """
        self.calibrate(z)
        self.logits.zero_()
        self.log_std.copy_(z.std(0).clamp(min=1e-6).log().expand_as(self.log_std))
        least, before = math.exp(2 * self.bounds[0]), -math.inf
        for _ in range(steps):
            p = self()
            each = p.log_weights + p.components.log_prob(z[:, None])
            if (nats := float(each.logsumexp(1).mean())) - before < tolerance:
                return
            before, share = nats, each.softmax(1)
            size = share.sum(0).clamp(min=1e-8)[:, None]
            mean = share.T @ z / size
            deviation = (z[:, None] - mean).square()
            variance = torch.einsum("nk,nkd->kd", share, deviation) / size
            self.logits.copy_(size[:, 0].log())
            self.means.copy_(mean)
            self.log_std.copy_(0.5 * variance.clamp(min=least).log())


def mixture_prior(latents: Latents, *, components: int = 10) -> GaussianMixture:
    """A mixture of Gaussians, trained with the model."""
    return GaussianMixture(latents.vector("mixture"), components)


def mixture_posterior(
    size: int,
    net: Callable[[int], nn.Module],
    format: Format,
    *,
    components: int = 3,
    gradient: str = "implicit",
) -> PosteriorHead:
    """A mixture of Gaussians, which `format` reads; `gradient` as in `Mixture`."""
    if gradient not in ("implicit", "score"):
        raise ValueError(f"gradient: expected 'implicit' or 'score'; got {gradient!r}")

    how: Any = gradient

    def read(h: Tensor) -> Mixture:
        each = h[:, components:].reshape(-1, 2 * size)
        mean, log_std = (t.unflatten(0, (-1, components)) for t in format.split(each))
        return Mixture(h[:, :components], DiagonalGaussian(mean, log_std, 1), gradient=how)

    def saturation(h: Tensor) -> Tensor:
        return format.saturation(h[:, components:].reshape(-1, 2 * size))

    outputs = components * (1 + 2 * size)
    return PosteriorHead(net(outputs), read, event=(size,), saturation=saturation)


PRIORS.register(mixture_prior, "mixture")
POSTERIORS.register(mixture_posterior, "mixture")
