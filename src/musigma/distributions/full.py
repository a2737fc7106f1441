"""Gaussians with correlated coordinates: a full covariance, or a low rank plus a diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributions import register_kl
from torch.linalg import solve_triangular

from musigma.distributions.latents import POSTERIORS, PosteriorHead
from musigma.gaussian import DiagonalGaussian, EventDistribution, Format, Shape
from musigma.tensors import at_least_float32, per_example

__all__ = ["FullGaussian", "LowRankGaussian"]


class FullGaussian(EventDistribution):
    r"""A Gaussian of vectors, N(mean, L L^T), with a lower triangular L.

    .. math:: \log p(x) = -\tfrac12 |L^{-1}(x-\mu)|^2 - \sum_i \log L_{ii} - \tfrac D2\log 2\pi

    The KL divergences between any two of `DiagonalGaussian`, `FullGaussian` and `LowRankGaussian`
    are registered with torch.

    Args:
        mean: Shape (\*batch, D).
        scale_tril: L, with a positive diagonal, shape (\*batch, D, D).

    Example:
        >>> q = FullGaussian(torch.zeros(2), torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> q.covariance_matrix
        tensor([[ 1.,  3.],
                [ 3., 13.]])
    """

    has_rsample = True

    def __init__(self, mean: Tensor, scale_tril: Tensor):
        self._mean = at_least_float32(mean)
        self._scale_tril = at_least_float32(scale_tril)
        super().__init__(mean.shape[:-1], mean.shape[-1:])

    @property
    def scale_tril(self) -> Tensor:
        """L, the Cholesky factor of the covariance."""
        return self._scale_tril

    @property
    def factor(self) -> Tensor:
        """A matrix (D, M) whose product with its transpose is the covariance."""
        return self.scale_tril

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, (D, D)."""
        return self.factor @ self.factor.mT

    @property
    def half_log_det(self) -> Tensor:
        """Half the log-determinant of the covariance."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._mean

    @property
    def mode(self) -> Tensor:
        """The mode, which is the mean."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate."""
        return self.factor.square().sum(-1)

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw mean + temperature · A ε, differentiably, with the `factor` A."""
        shape = (*sample_shape, *self.batch_shape, self.factor.shape[-1])
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        return (
            self._mean
            + (self.factor @ (per_example(temperature, noise) * noise)[..., None])[..., 0]
        )

    def whiten(self, value: Tensor) -> Tensor:
        """L^-1 (value - mean)."""
        deviation = at_least_float32(value) - self._mean
        return solve_triangular(self.scale_tril, deviation[..., None], upper=False)[..., 0]

    def unwhiten(self, noise: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return self._mean + (self.scale_tril @ at_least_float32(noise)[..., None])[..., 0]

    def _squared_distance(self, value: Tensor) -> Tensor:
        return self.whiten(value).square().sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        constant = 0.5 * self._mean.shape[-1] * math.log(2 * math.pi)
        return -0.5 * self._squared_distance(value) - self.half_log_det - constant

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of the batch shape."""
        return self.half_log_det + 0.5 * self._mean.shape[-1] * math.log(2 * math.pi * math.e)


class LowRankGaussian(FullGaussian):
    r"""A Gaussian of vectors, N(mean, W W^T + diag(exp(2 · log_scale))).

    A draw and a density cost O(D R²) for a rank R, by the identities of Woodbury and Sylvester.

    Args:
        mean: Shape (\*batch, D).
        low_rank: W, shape (\*batch, D, R).
        log_scale: Shape (\*batch, D).
    """

    def __init__(self, mean: Tensor, low_rank: Tensor, log_scale: Tensor):
        super().__init__(mean, low_rank)
        self.low_rank, self.log_scale = at_least_float32(low_rank), at_least_float32(log_scale)

    @cached_property
    def scale_tril(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The Cholesky factor of the covariance, which costs O(D³)."""
        return torch.linalg.cholesky(self.covariance_matrix)

    @property
    def factor(self) -> Tensor:
        """W next to the diagonal matrix of standard deviations, (D, R + D)."""
        return torch.cat([self.low_rank, self.log_scale.exp().diag_embed()], -1)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate."""
        return self.low_rank.square().sum(-1) + (2 * self.log_scale).exp()

    @cached_property
    def _scaled(self) -> tuple[Tensor, Tensor]:
        """A = W / std, and the Cholesky factor of I + A^T A."""
        a = self.low_rank * (-self.log_scale).exp()[..., None]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return a, torch.linalg.cholesky(eye + a.mT @ a)

    @property
    def half_log_det(self) -> Tensor:
        """Half the log-determinant of the covariance."""
        inner = self._scaled[1].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_scale.sum(-1) + inner

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw mean + temperature · (W ε + std · ε'), differentiably."""
        shape = (*sample_shape, *self.batch_shape, sum(self.low_rank.shape[-2:]))
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        noise = per_example(temperature, noise) * noise
        common, own = noise.split([self.low_rank.shape[-1], self._mean.shape[-1]], -1)
        shared = (self.low_rank @ common[..., None])[..., 0]
        return self._mean + shared + self.log_scale.exp() * own

    def _squared_distance(self, value: Tensor) -> Tensor:
        a, inner = self._scaled
        deviation = (at_least_float32(value) - self._mean) * (-self.log_scale).exp()
        along = solve_triangular(inner, a.mT @ deviation[..., None], upper=False)[..., 0]
        return deviation.square().sum(-1) - along.square().sum(-1)


@register_kl(FullGaussian, FullGaussian)
@register_kl(DiagonalGaussian, FullGaussian)
@register_kl(FullGaussian, DiagonalGaussian)
def full_gaussian_kl(
    q: FullGaussian | DiagonalGaussian, p: FullGaussian | DiagonalGaussian
) -> Tensor:
    """KL(q || p) in nats: half of tr(P^-1 Q) + |P^-1/2 (mean_q - mean_p)|² - D + log |P| / |Q|."""
    if isinstance(p, DiagonalGaussian):
        trace, p_log_det = (q.variance / p.variance).sum(-1), p.log_std.sum(-1)
    else:
        a = q.stddev.diag_embed() if isinstance(q, DiagonalGaussian) else q.factor
        trace = solve_triangular(p.scale_tril, a, upper=False).square().sum((-2, -1))
        p_log_det = p.half_log_det
    q_log_det = q.log_std.sum(-1) if isinstance(q, DiagonalGaussian) else q.half_log_det
    distance = p.whiten(q.mean).square().sum(-1)
    return 0.5 * (trace + distance - q.mean.shape[-1]) + p_log_det - q_log_det


@POSTERIORS.register
def full(size: int, net: Callable[[int], nn.Module], format: Format) -> PosteriorHead:
    """A Gaussian with a full covariance, L = diag(std) (I + A), with A strictly lower triangular.

    `format` reads the mean and the standard deviations `std` of the first 2 D outputs; the others
    are A times sqrt(D), row by row, so that a network of random weights emits a covariance that
    is near a diagonal for any D. (Kingma & Welling, "An Introduction to Variational
    Autoencoders", 2019, arXiv:1906.02691, section 2.6.)
    """
    rows, columns = torch.tril_indices(size, size, -1)

    def read(h: Tensor) -> FullGaussian:
        mean, log_std = format.split(h[:, : 2 * size])
        unit = torch.eye(size, dtype=h.dtype, device=h.device).repeat(len(h), 1, 1)
        unit[:, rows, columns] = h[:, 2 * size :] / math.sqrt(size)
        return FullGaussian(mean, log_std.exp()[..., None] * unit)

    return _head(net(2 * size + len(rows)), read, size, format)


@POSTERIORS.register
def low_rank(
    size: int, net: Callable[[int], nn.Module], format: Format, *, rank: int = 4
) -> PosteriorHead:
    """A Gaussian whose covariance is of low rank plus a diagonal (`LowRankGaussian`).

    `format` reads the mean and the standard deviations of the first 2 D outputs; the others are W.
    """

    def read(h: Tensor) -> LowRankGaussian:
        mean, log_std = format.split(h[:, : 2 * size])
        return LowRankGaussian(mean, h[:, 2 * size :].unflatten(1, (size, rank)), log_std)

    return _head(net((2 + rank) * size), read, size, format)


def _head(
    net: nn.Module, read: Callable[[Tensor], FullGaussian], size: int, format: Format
) -> PosteriorHead:
    def saturation(h: Tensor) -> Tensor:
        return format.saturation(h[:, : 2 * size])

    return PosteriorHead(net, read, event=(size,), saturation=saturation)
