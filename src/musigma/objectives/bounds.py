"""Bounds of log p(x): the ELBO, and those of several draws."""

from __future__ import annotations

import math

from torch import Tensor

from musigma.objectives.base import objective, register, straight, terms_of
from musigma.objectives.parts import log_q, reparameterized
from musigma.trace import Evidence, Recorder

__all__ = ["ciwae", "dreg", "elbo", "iwae", "miwae", "piwae", "renyi", "stl"]


@objective
def elbo(evidence: Evidence) -> Tensor:
    """-ELBO; for a flow the negative log-likelihood or an upper bound of it. Nats, (B,).

    Example:
        >>> import torch
        >>> from musigma.objectives import beta_elbo, free_bits
        >>> e = Evidence(*(torch.tensor([-2.0]), torch.tensor([[1.0]]), *torch.zeros(2, 1)))
        >>> elbo(e), beta_elbo(e, beta=4.0), free_bits(e, free=1.5)
        (tensor([3.]), tensor([6.]), tensor([3.5000]))
    """
    return -(evidence.elbo + evidence.auxiliary)


def _auxiliary(evidence: Evidence, draws: int) -> Tensor:
    """The auxiliary terms of each example, as the mean over its draws."""
    return evidence.auxiliary.expand(len(evidence.log_px)).reshape(-1, draws).mean(1)


@objective
def iwae(evidence: Evidence, k: int = 1) -> Tensor:
    """-log (1/k) Σ w_i (Burda et al., 2016, arXiv:1509.00519). Nats, (B,).

    Args:
        evidence: The terms of a batch in which every example is repeated k times, without closed
            forms (``model(x.repeat_interleave(k, 0), closed_form=False, whole_weights=True)``).
        k: Draws per example.
    """
    log_w = evidence.elbo.reshape(-1, k)
    return math.log(k) - log_w.logsumexp(1) - _auxiliary(evidence, k)


@objective
def miwae(evidence: Evidence, k: int = 5, m: int = 2) -> Tensor:
    """The mean of m independent bounds of k draws each, -1/m Σ log (1/k) Σ w_ij. Nats, (B,).

    More m reduce the variance of the gradient, and more k tighten the bound (Rainforth et al.,
    "Tighter Variational Bounds are Not Necessarily Better", 2018, arXiv:1802.04537).

    Args:
        evidence: As in `iwae`, with k · m rows for each example.
        k: Draws per bound.
        m: Bounds per example.
    """
    log_w = evidence.elbo.reshape(-1, m, k)
    return math.log(k) - log_w.logsumexp(2).mean(1) - _auxiliary(evidence, m * k)


@objective
def ciwae(evidence: Evidence, k: int = 5, *, weight: float = 0.5) -> Tensor:
    """weight · (-ELBO) + (1 - weight) · `iwae` (Rainforth et al., 2018). Nats, (B,).

    Args:
        evidence: As in `iwae`.
        k: Draws per example; the ELBO is their mean.
        weight: Weight of the ELBO, from 0 to 1 (β in the paper).

    Raises:
        ValueError: If the weight is not from 0 to 1, for which it would be no bound.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number from 0 to 1; got {weight}")
    log_w = evidence.elbo.reshape(-1, k)
    bound = log_w.logsumexp(1) - math.log(k)
    return -(weight * log_w.mean(1) + (1 - weight) * bound) - _auxiliary(evidence, k)


@objective
def renyi(evidence: Evidence, k: int = 5, *, alpha: float = 0.5) -> Tensor:
    r"""The negative variational Rényi bound of order alpha. Nats, (B,).

    .. math:: L_\alpha = \frac{1}{1-\alpha} \log \frac1k \sum_i w_i^{1-\alpha}

    alpha = 0 is `iwae`, and alpha = 1 the ELBO (the limit). With k draws the estimate of the
    bound is on average too low if alpha < 1, and too high if alpha > 1; it is consistent in k (Li
    & Turner, "Rényi Divergence Variational Inference", 2016, arXiv:1602.02311).

    Args:
        evidence: As in `iwae`.
        k: Draws per example.
        alpha: The order, any real number.
    """
    log_w, power = evidence.elbo.reshape(-1, k), 1 - alpha
    if power == 0:
        bound = log_w.mean(1)
    else:
        bound = ((power * log_w).logsumexp(1) - math.log(k)) / power
    return -bound - _auxiliary(evidence, k)


# --- other gradients of the same bounds --------------------------------------------------------


def stl(record: Recorder) -> Tensor:
    """-ELBO, whose gradient omits the score of q: "sticking the landing". Nats, (B,).

    The score ∂ log q / ∂φ at a fixed draw has mean zero. Without it, the gradient vanishes where q
    is the true posterior, for every draw (Roeder, Wu, Duvenaud, 2017, arXiv:1703.09194). The KL is
    that of the draw, also where it has a closed form. One more pass per step.

    Raises:
        ValueError: If the model draws no latents, or a draw is not reparameterized.
    """
    draws = reparameterized(record, "stl")
    evidence = terms_of(record)
    log_p = evidence.elbo + log_q(record, draws)
    fixed = record.again(given=draws, fixed=True)
    loss = straight(-evidence.elbo, log_q(fixed, draws) - log_p)
    return loss - evidence.auxiliary


register(stl, closed_form=False, whole_weights=True)


def dreg(record: Recorder, *, k: int = 5) -> Tensor:
    r"""`iwae` with the doubly reparameterized gradient. Nats, (B,).

    .. math:: \nabla_\phi = \sum_i \tilde w_i^2 \frac{\partial \log w_i}{\partial z_i}
        \frac{\partial z_i}{\partial \phi}, \quad
        \nabla_\theta = \sum_i \tilde w_i \nabla_\theta \log p(x, z_i)

    with normalized weights. It is an unbiased estimate of the gradient of `iwae`, with less
    variance (Tucker et al., "Doubly Reparameterized Gradient Estimators for Monte Carlo
    Objectives", 2019, arXiv:1810.04152). One more pass per step.

    Args:
        record: A pass in which every example is repeated k times.
        k: Draws per example.

    Raises:
        ValueError: As `stl`.
    """
    draws = reparameterized(record, "dreg")
    evidence = terms_of(record)
    log_w = evidence.elbo.reshape(-1, k)
    weights = log_w.detach().softmax(1)
    fixed = record.again(given=draws, fixed=True)
    path = terms_of(fixed).elbo.reshape(-1, k)  # depends on parameters through the draws only
    log_p = log_w + log_q(record, draws).reshape(-1, k)
    log_p_path = path + log_q(fixed, draws).reshape(-1, k)
    gradient = (weights * (log_p - log_p_path) + weights.square() * path).sum(1)
    bound = log_w.logsumexp(1) - math.log(k)
    return straight(-bound, -gradient) - _auxiliary(evidence, k)


register(dreg, closed_form=False, whole_weights=True)


def piwae(record: Recorder, *, k: int = 5, m: int = 2) -> Tensor:
    """The bound of k · m draws for the generative model, and `miwae` for q. Nats, (B,).

    The value is the bound of all draws. The generative model follows its gradient, at fixed draws;
    the inference follows that of the mean of m bounds of k draws, by its draws and its density
    (Rainforth et al., 2018, arXiv:1802.04537). One more pass per step.

    Args:
        record: A pass in which every example is repeated k · m times.
        k: Draws per bound of the inference.
        m: Number of its bounds.

    Raises:
        ValueError: As `stl`.
    """
    draws = reparameterized(record, "piwae")
    evidence = terms_of(record)
    log_w = evidence.elbo.reshape(-1, m, k)
    fixed = record.again(given=draws, fixed=True)
    log_p = log_w + log_q(record, draws).reshape(log_w.shape)
    path = (terms_of(fixed).elbo + log_q(fixed, draws)).reshape(log_w.shape)
    generative = log_p - path  # its gradient is that of log p at fixed draws
    inference = log_w - generative
    everything = log_w.detach().flatten(1).softmax(1).reshape(log_w.shape)
    each = log_w.detach().softmax(2) / m
    gradient = (everything * generative + each * inference).flatten(1).sum(1)
    bound = log_w.flatten(1).logsumexp(1) - math.log(k * m)
    return straight(-bound, -gradient) - _auxiliary(evidence, k * m)


register(piwae, closed_form=False, whole_weights=True)
