"""The distance of the posterior of all data, q(z), from the prior, by samples of both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from musigma.objectives.base import objective, terms_of
from musigma.objectives.parts import latent_draws, prior_draws
from musigma.trace import Recorder

__all__ = ["info_vae", "mmd", "sliced_wasserstein", "swae", "wae_mmd"]

Kernel = Literal["imq", "rbf"]
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Scales of the inverse multiquadratic kernels that are averaged, as Tolstikhin et al. have."""


def mmd(x: Tensor, y: Tensor, kernel: Kernel = "imq", bandwidth: float = 1.0) -> Tensor:
    r"""The squared maximum mean discrepancy of two samples, without bias: it can be negative.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j}
        k(y_i, y_j) - \frac{2}{nm} \sum_{i,j} k(x_i, y_j)

    (Gretton et al., "A Kernel Two-Sample Test", 2012.) With h² = bandwidth² · D, D the number of
    dimensions, and r the distance,

    - `rbf`: k = exp(-r² / (2 h²));
    - `imq`: the mean of 2 h² s / (2 h² s + r²) over s = 0.1, 0.2, 0.5, 1, 2, 5, 10.

    So a bandwidth of 1 suits a standard normal prior, where r² is 2 D on average.

    Args:
        x: Sample (n, D), n at least 2.
        y: Sample (m, D), m at least 2.
        kernel: `imq` or `rbf`.
        bandwidth: In standard deviations of the prior.

    Returns:
        A number ().

    Raises:
        ValueError: For another kernel, a bandwidth that is not positive, or samples of one.

    Example:
        >>> x = torch.zeros(2, 1)
        >>> float(mmd(x, x + 1, "rbf"))  # 2 - 2 exp(-1/2)
        0.786938...
    """
    if kernel not in ("imq", "rbf"):
        raise ValueError(f"kernel: expected 'imq' or 'rbf'; got {kernel!r}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: expected a positive number; got {bandwidth}")
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"x: the discrepancy needs 2 examples or more in each part of a batch; got {len(x)} "
            f"and {len(y)}"
        )
    scale = 2 * bandwidth**2 * x.shape[1]

    def k(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, None] - b).square().sum(2)
        if kernel == "rbf":
            return (-squared / scale).exp()
        return torch.stack([s * scale / (s * scale + squared) for s in SCALES]).mean(0)

    def within(a: Tensor) -> Tensor:  # every kernel is 1 at distance 0
        return (k(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * k(x, y).mean()


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 50) -> Tensor:
    r"""The mean of the squared Wasserstein-2 distance of random one-dimensional projections.

    The distance of two empirical distributions of the same size, by sorting. It is positive even
    if both samples have one distribution: a bias that falls with their size. (Bonneel et al.,
    "Sliced and Radon Wasserstein Barycenters of Measures", 2015.)

    Args:
        x: Sample (n, D).
        y: Sample (n, D).
        projections: Number of directions, uniform on the sphere.

    Returns:
        A number ().
    """
    directions = torch.randn(x.shape[1], projections, dtype=x.dtype, device=x.device)
    directions = directions / directions.norm(dim=0)
    ordered = [(t @ directions).sort(0).values for t in (x, y)]
    return (ordered[0] - ordered[1]).square().mean()


@objective
def info_vae(
    record: Recorder,
    *,
    alpha: float = 0.0,
    scale: float = 1000.0,
    kernel: Kernel = "imq",
    bandwidth: float = 1.0,
) -> Tensor:
    r"""Distortion + (1 - alpha) · rate + (alpha + scale - 1) · MMD²(q(z), p(z)). Nats, (B,).

    `scale` is λ in the paper (Zhao, Song, Ermon, "InfoVAE", 2019, arXiv:1706.02262). MMD² is
    estimated from the draws of the pass, and as many from the prior (`mmd`), in each part and
    process of a batch; the estimate is unbiased in each. alpha = 1 is an MMD-VAE.

    Args:
        record: A pass of a model with latents.
        alpha: How much mutual information of x and z is preferred.
        scale: Weight of the divergence from the prior.
        kernel: `imq` or `rbf`.
        bandwidth: Of the kernel, in standard deviations.
    """
    evidence = terms_of(record)
    found = _discrepancy(record, "info-vae", kernel, bandwidth)
    rest = (1 - alpha) * evidence.rate + (alpha + scale - 1) * found
    return rest - evidence.log_px - evidence.auxiliary


@objective
def wae_mmd(
    record: Recorder, *, scale: float = 100.0, kernel: Kernel = "imq", bandwidth: float = 1.0
) -> Tensor:
    """Distortion + scale · MMD²(q(z), p(z)): a Wasserstein autoencoder. Nats, (B,).

    There is no KL divergence, so the value is not a bound of log p(x), and q may become
    deterministic (Tolstikhin et al., "Wasserstein Auto-Encoders", 2018, arXiv:1711.01558). The
    arguments are those of `info_vae`.
    """
    evidence = terms_of(record)
    found = _discrepancy(record, "wae-mmd", kernel, bandwidth)
    return scale * found - evidence.log_px - evidence.auxiliary


def _discrepancy(record: Recorder, name: str, kernel: Kernel, bandwidth: float) -> Tensor:
    return mmd(latent_draws(record, name), prior_draws(record, name), kernel, bandwidth)


@objective
def swae(record: Recorder, *, scale: float = 100.0, projections: int = 50) -> Tensor:
    """Distortion + scale · the sliced Wasserstein distance of q(z) from p(z). Nats, (B,).

    The distance is `sliced_wasserstein` of the draws of the pass, in each part and process of a
    batch, and its bias depends on their number (Kolouri et al., "Sliced-Wasserstein
    Auto-Encoder", 2018, arXiv:1804.01947).

    Args:
        record: A pass of a model with latents.
        scale: Weight of the distance.
        projections: Number of random directions.
    """
    evidence = terms_of(record)
    z = latent_draws(record, "swae")
    found = sliced_wasserstein(z, prior_draws(record, "swae"), projections)
    return scale * found - evidence.log_px - evidence.auxiliary
