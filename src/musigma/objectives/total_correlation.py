"""The dependence between latents over the whole data: total correlation and covariance."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from musigma.nets import MLP
from musigma.objectives.base import objective, register
from musigma.objectives.bounds import elbo
from musigma.objectives.parts import elements, latent
from musigma.trace import Recorder

__all__ = ["FactorVAE", "aggregate", "beta_tc", "dip_i", "dip_ii"]


def aggregate(log_q: Tensor, examples: int, estimator: Literal["mss", "mws"] = "mss") -> Tensor:
    r"""An estimate of log q(z), for q(z) the mean of q(z | x) over the data, from a batch.

    `mss`: minibatch stratified sampling. q(z) is estimated without bias, its logarithm is not:

    .. math:: \hat q(z_i) = \tfrac1N q(z_i|x_i) + \tfrac{N-1}{N (B-1)} \sum_{j \ne i} q(z_i|x_j)

    This is the estimator of Chen et al. averaged over the order of the other examples: they give
    one of them a smaller weight. It is exact if the batch is the data. `mws`: minibatch weighted
    sampling, which is biased:

    .. math:: \hat q(z_i) = \tfrac1{N B} \sum_j q(z_i|x_j)

    (Chen et al., "Isolating Sources of Disentanglement in VAEs", 2018, arXiv:1802.04942.)

    Args:
        log_q: log q(z_i | x_j) in [i, j], shape (B, B, ...).
        examples: N, the number of examples of the data.
        estimator: `mss` or `mws`.

    Returns:
        The estimate, shape (B, ...).

    Raises:
        ValueError: For another estimator.
    """
    if estimator not in ("mss", "mws"):
        raise ValueError(f"estimator: expected 'mss' or 'mws'; got {estimator!r}")
    n = len(log_q)
    if estimator == "mws":
        return log_q.logsumexp(1) - math.log(examples * n)
    others = (examples - 1) / (examples * max(n - 1, 1))
    weights = log_q.new_full((n, n), others).fill_diagonal_(1 / examples)
    return (log_q + weights.log().reshape(n, n, *[1] * (log_q.ndim - 2))).logsumexp(1)


@objective
def beta_tc(
    record: Recorder,
    *,
    beta: float = 6.0,
    alpha: float = 1.0,
    gamma: float = 1.0,
    estimator: Literal["mss", "mws"] = "mss",
    examples: int = 0,
) -> Tensor:
    r"""Distortion + alpha · I(x; z) + beta · TC(z) + gamma · Σ KL(q(z_j) || p(z_j)). Nats, (B,).

    .. math:: KL(q(z|x) \| p(z)) = \log\frac{q(z|x)}{q(z)} + \log\frac{q(z)}{\prod_j q(z_j)}
        + \log\frac{\prod_j q(z_j)}{p(z)} \quad \text{on average over } q(x, z)

    q(z) is the posterior of all data together; `aggregate` estimates it from the examples of the
    pass, so the value depends on the parts and processes that a batch is divided into. With all
    weights 1 it is -ELBO. (Chen et al., 2018, arXiv:1802.04942.)

    Args:
        record: A pass of a model with one latent whose dimensions are independent given x.
        beta: Weight of the total correlation.
        alpha: Weight of the mutual information.
        gamma: Weight of the dimension-wise KL.
        estimator: `mss` or `mws`, as in `aggregate`.
        examples: Number of examples of the data; 0: of the training data.

    Raises:
        ValueError: If the model is another, or the number of examples is not known.
    """
    n = examples or record.examples
    if not n:
        raise ValueError(
            "examples: beta-tc needs the number of examples of the data; give examples=N"
        )
    _, q, z, log_p = latent(record, "beta-tc")
    each = elements(q, "beta-tc").log_prob(z.unsqueeze(1)).flatten(2)  # of z_i given x_j
    log_joint = aggregate(each.sum(2), n, estimator)
    log_product = aggregate(each, n, estimator).sum(1)
    information = q.log_prob(z) - log_joint
    correlation = log_joint - log_product
    rest = log_product - log_p
    more = (alpha - 1) * information + (beta - 1) * correlation + (gamma - 1) * rest
    return elbo(record) + more


class FactorVAE(nn.Module):
    """-ELBO + gamma · TC(z), with the total correlation by a critic. Nats, (B,).

    The critic separates draws of z from draws whose dimensions are permuted over the batch, each
    by itself; its logit estimates log q(z) / Π q(z_j), and is as good as the critic. Its loss sees
    draws without gradients, so it does not train the encoder. (Kim & Mnih, "Disentangling by
    Factorising", 2018, arXiv:1802.05983.) Permutations are within one part and process of a batch.

    Args:
        record: A pass of a model with one latent, for its size.
        gamma: Weight of the total correlation.
        width: Width of the critic's hidden layers (1000 in the paper).
        depth: Number of its hidden layers (6 in the paper).
        lr: Learning rate of the critic.
    """

    def __init__(
        self,
        record: Recorder,
        *,
        gamma: float = 10.0,
        width: int = 256,
        depth: int = 3,
        lr: float = 1e-4,
    ):
        super().__init__()
        size = latent(record, "factor-vae").z[0].numel()
        self.critic, self.gamma, self.lr = MLP(size, 1, hidden=[width] * depth), gamma, lr

    def forward(self, record: Recorder) -> Tensor:
        """The objective."""
        return elbo(record) + self.gamma * self.total_correlation(record)

    def total_correlation(self, record: Recorder) -> Tensor:
        """The critic's estimate at each draw, (B,)."""
        return self.critic(latent(record, "factor-vae").z.flatten(1))[:, 0]

    def critic_loss(self, record: Recorder) -> Tensor:
        """The critic's loss, (B,), by draws without gradients."""
        z = latent(record, "factor-vae").z.flatten(1).detach()
        order = torch.rand(z.shape, device=z.device).argsort(0)  # one for each dimension
        permuted = z.gather(0, order)
        return 0.5 * (softplus(-self.critic(z)) + softplus(self.critic(permuted)))[:, 0]

    def critic_optimizer(self) -> torch.optim.Optimizer:
        """Adam, with the paper's decay rates."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.5, 0.9))


register(FactorVAE, "factor-vae")


def _moments(record: Recorder, name: str) -> tuple[Tensor, Tensor]:
    """The covariance of the posterior means over the batch (D, D), and the mean variance (D,)."""
    q = latent(record, name).q
    try:
        mean, variance = q.mean.flatten(1), q.variance.flatten(1)
    except NotImplementedError:
        raise ValueError(
            f"objective: {name} needs the mean and variance of the posterior; "
            f"{type(q).__name__} does not have them"
        ) from None
    centered = mean - mean.mean(0)
    return centered.T @ centered / len(mean), variance.mean(0)


def _distance(covariance: Tensor, off_diagonal: float, diagonal: float) -> Tensor:
    """The weighted squared distance of a covariance from the identity."""
    variance = covariance.diagonal()
    rest = covariance - torch.diag(variance)
    return off_diagonal * rest.square().sum() + diagonal * (variance - 1).square().sum()


@objective
def dip_i(record: Recorder, *, off_diagonal: float = 5.0, diagonal: float = 50.0) -> Tensor:
    r"""-ELBO + the distance of Cov[E(z | x)] over the data from the identity. Nats, (B,).

    .. math:: \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    C is the covariance of the examples of the pass (divided by B), so the estimate is biased, by
    O(1 / B), and depends on the parts and processes that a batch is divided into (Kumar,
    Sattigeri, Balakrishnan, "Variational Inference of Disentangled Latent Concepts from Unlabeled
    Observations", 2018, arXiv:1711.00848).

    Args:
        record: A pass of a model with one latent.
        off_diagonal: Weight of the covariances, λ_od.
        diagonal: Weight of the variances, λ_d.
    """
    covariance, _ = _moments(record, "dip-i")
    return elbo(record) + _distance(covariance, off_diagonal, diagonal)


@objective
def dip_ii(record: Recorder, *, off_diagonal: float = 5.0, diagonal: float = 5.0) -> Tensor:
    """As `dip-i`, with C = Cov[z] = Cov[E(z | x)] + E[Var(z | x)]. Nats, (B,).

    The dimensions of z are taken to be independent given x.
    """
    covariance, variance = _moments(record, "dip-ii")
    return elbo(record) + _distance(covariance + torch.diag(variance), off_diagonal, diagonal)
