"""Losses: functions of `Evidence`, in nats per example, averaged over the batch and nothing else.

Terms are summed over all dimensions of an example, so the weight of the KL never depends on image,
latent or batch size; `beta` is the only knob there is. What a model asks to be trained for besides
(`Evidence.aside`, in nats and already weighed) is taken along by all of them.
"""

from __future__ import annotations

import math

from torch import Tensor

from musigma.trace import Evidence

__all__ = ["beta_elbo", "elbo", "free_bits", "iwae"]


def elbo(evidence: Evidence) -> Tensor:
    """-ELBO: for a flow the negative log-likelihood (or its bound). A scalar, nats per example.

    Example:
        >>> import torch
        >>> e = Evidence(*(torch.tensor([-2.0]), torch.tensor([[1.0]]), *torch.zeros(2, 1)))
        >>> elbo(e).item(), beta_elbo(e, 4.0).item(), free_bits(e, 1.5).item()
        (3.0, 6.0, 3.5)
    """
    return -(evidence.elbo + evidence.aside).mean()


def beta_elbo(evidence: Evidence, beta: float) -> Tensor:
    """Distortion + beta · rate (Higgins et al., "beta-VAE", 2017). A scalar, nats per example.

    The rate is everything that the latents cost; what a Bernoulli, say, gives for x stays
    untouched. Only for models with a likelihood: a flow has no distortion to weigh against.
    """
    return (beta * evidence.rate - evidence.log_px - evidence.aside).mean()


def free_bits(evidence: Evidence, free: float, *, beta: float = 1.0) -> Tensor:
    """`beta_elbo` in which each latent's KL, averaged over the batch, costs at least `free` nats.

    Below that there is nothing to gain from closing a latent (Kingma et al., "Improving
    Variational Inference with Inverse Autoregressive Flow", 2016, arXiv:1606.04934). A scalar,
    nats per example.
    """
    kl = evidence.kl.mean(0).clamp(min=free).sum()
    rate = kl + (evidence.log_q - evidence.log_det).mean()
    return beta * rate - (evidence.log_px + evidence.aside).mean()


def iwae(evidence: Evidence, k: int) -> Tensor:
    """-log (1/k) Σ w_i (Burda et al., 2016, arXiv:1509.00519). A scalar, nats per example.

    Args:
        evidence: Of a batch in which every example stands k times in a row, without closed forms
            (``model(x.repeat_interleave(k, 0), closed_form=False)``).
        k: Draws per example.
    """
    log_w = evidence.elbo.reshape(-1, k)
    return (math.log(k) - log_w.logsumexp(1)).mean() - evidence.aside.mean()
